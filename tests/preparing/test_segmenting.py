"""The lungs of each image: which images set the bounds, which are named, and that none leaves training for it."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from small_run import write_run

from tasks.files import read_json
from tasks.networks.lung_fields import load_bounds
from tasks.networks.shipped import find_network
from tasks.pixels.masks import IMPLAUSIBLE, write_shard
from tasks.preparing.mask_shards import find_targets
from tasks.preparing.segmenting import count_implausible, find_learnt, segment
from tasks.records import READ_DEVICE
from tasks.runs.manifest import read_manifest
from tasks.runs.run import Run
from tasks.settings import Settings


def draw_lungs(shift: float, lower: int = 180) -> np.ndarray:
    image = Image.new("L", (224, 224))
    for left in (36, 128):
        ImageDraw.Draw(image).ellipse((left + shift, 42, left + 60 + shift, 182), fill=250)
    return np.asarray(image) * (np.arange(224) < lower)[:, None].astype(np.uint8)


def put_lungs(run: Run, lungs: np.ndarray) -> None:
    """Puts masks of lungs where the segmenter's would be."""
    (target,) = find_targets(run, "lungs").values()
    write_shard(run.cache / target, lungs)


def test_images_unlike_the_training_images_lungs_are_named_in_all_splits_and_stay(tmp_path: Path) -> None:
    places = {"run_dir": str(tmp_path / "run"), "storage": {"cache": str(tmp_path / "cache")}}
    run = Run(Settings.model_validate(places))
    manifest = write_run(run.folder, [0.1] * 60, run.cache)
    lungs = np.stack([draw_lungs(shift) for shift in np.linspace(-8, 8, 60)])
    lungs[31], lungs[33] = draw_lungs(0, lower=90), 0  # of the test split
    put_lungs(run, lungs)
    facts = segment.fn(run)
    ids = list(manifest["image_id"])
    assert list(read_json(run.folder / IMPLAUSIBLE)) == [ids[31], ids[33]]
    assert (facts["n_learnt"], facts["n_images"], facts["n_implausible"]) == (30, 60, 2)
    assert facts["counts"][-1] == {"split": "test", "class": "pneumonia", "images": 30, "without_lungs": 2}
    assert load_bounds(run.folder).segmenter == find_network("segmenter", None).sha256
    np.testing.assert_array_equal(run.lungs().read([ids[31]])[0], lungs[31])
    assert read_manifest(run.folder)["excluded"].eq("").all()


def test_bounds_come_from_training_images_those_with_devices_too_and_no_copies() -> None:
    table = pd.DataFrame(
        {
            "split": ["train", "train", "train", "val", "test"],
            "excluded": pd.array(["", READ_DEVICE, "duplicate of x", "", ""], "string"),
        }
    )
    assert find_learnt(table).tolist() == [True, True, False, False, False]


def test_counts_are_by_split_and_class_and_leave_out_what_is_empty() -> None:
    table = pd.DataFrame({"split": ["train", "train", "val"], "label": [0, 0, 1]})
    assert count_implausible(table, [True, False, False]) == [
        {"split": "train", "class": "normal", "images": 2, "without_lungs": 1},
        {"split": "val", "class": "pneumonia", "images": 1, "without_lungs": 0},
    ]
