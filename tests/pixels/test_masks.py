"""Masks come back as they were written, in the order asked for."""

from pathlib import Path

import numpy as np
import pytest

from tasks.errors import RunError
from tasks.files import write_json
from tasks.pixels.masks import Masks, read_scores, write_shard


def write_run(run: Path) -> np.ndarray:
    rng = np.random.default_rng(3)
    masks = rng.integers(0, 255, (4, 224, 224), dtype=np.uint8)
    for shard in (0, 1):
        scores = np.array([0.25, 0.75], np.float32) + shard / 8
        write_shard(run / f"{shard}.npz", masks[2 * shard : 2 * shard + 2], scores=scores)
    images = {"a": [0, 0], "b": [0, 1], "c": [1, 0], "d": [1, 1]}
    shards = [{"name": f"{shard}.npz"} for shard in (0, 1)]
    write_json(run / "masks" / "index.json", {"shards": shards, "images": images})
    return masks


def test_masks_come_in_the_order_asked_for_over_all_shards(tmp_path: Path) -> None:
    masks = write_run(tmp_path)
    found = Masks(tmp_path, tmp_path).read(["d", "a", "c", "a"])
    np.testing.assert_array_equal(found, masks[[3, 0, 2, 0]])
    assert "a" in Masks(tmp_path, tmp_path) and "x" not in Masks(tmp_path, tmp_path)


def test_scores_are_read_without_the_masks(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert read_scores(tmp_path / "1.npz").tolist() == [0.375, 0.875]


def test_an_image_that_was_not_screened_and_a_shard_that_is_gone_are_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    with pytest.raises(RunError, match="lacks the image"):
        Masks(tmp_path, tmp_path).read(["x"])
    (tmp_path / "1.npz").unlink()
    with pytest.raises(RunError, match=r"1\.npz is gone from the cache"):
        Masks(tmp_path, tmp_path).read(["d"])
