"""Each content is decoded once; next week only new files are."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from stage_steps import pack_all

from tasks.errors import RunError, SourceError
from tasks.pixels.decoding import decode
from tasks.pixels.greys import SIDE_PX
from tasks.pixels.packed import PackedImages
from tasks.preparing.packing import (
    index_arrays,
    known_files,
    mark_undecodable,
    pack,
    pack_shard,
    pack_shards,
    plan_packing,
)
from tasks.runs.manifest import image_id, read_manifest, write_manifest
from tasks.runs.run import Run
from tasks.settings import Settings


def picture(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def settings(tmp_path: Path, **others: Any) -> Settings:
    storage = {"raw": str(tmp_path / "raw"), "cache": str(tmp_path / "cache")}
    return Settings.model_validate({"run_dir": str(tmp_path / "run"), "storage": storage, **others})


def put(tmp_path: Path, files: dict[str, bytes], excluded: dict[str, str] | None = None) -> Path:
    """Writes files and the manifest that lists them."""
    rows = []
    for name, content in files.items():
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / name).write_bytes(content)
        reason = (excluded or {}).get(name, "")
        sha = hashlib.sha256(content).hexdigest()
        rows.append({"path": name, "image_id": image_id(name), "sha256": sha, "excluded": reason})
    (tmp_path / "run").mkdir(exist_ok=True)
    write_manifest(tmp_path / "run", pd.DataFrame(rows))
    return tmp_path / "source"


def excluded_in(tmp_path: Path) -> dict[str, str]:
    manifest = read_manifest(tmp_path / "run")
    return dict(zip(manifest["path"], manifest["excluded"], strict=True))


def test_every_image_comes_back_as_it_decodes_excluded_ones_too(tmp_path: Path) -> None:
    files = {f"{i}.png": picture(i) for i in range(5)}
    facts = pack_all(settings(tmp_path), str(put(tmp_path, files, {"3.png": "odd"})))
    packed = PackedImages(tmp_path / "run", tmp_path / "cache").read([image_id(name) for name in files])
    assert (facts["n_packed"], facts["n_new"], facts["n_undecodable"]) == (5, 5, 0)
    assert np.array_equal(packed, np.stack([decode(content) for content in files.values()]))
    assert excluded_in(tmp_path)["3.png"] == "odd"


def test_the_same_content_is_packed_once_and_found_under_each_name(tmp_path: Path) -> None:
    facts = pack_all(settings(tmp_path), str(put(tmp_path, {"a.png": picture(1), "b.png": picture(1)})))
    images = PackedImages(tmp_path / "run", tmp_path / "cache")
    (shard,) = json.loads((tmp_path / "run/arrays/index.json").read_text())["shards"]
    assert (facts["n_packed"], facts["n_new"]) == (2, 1)
    assert np.load(tmp_path / "cache" / shard["name"]).shape == (1, SIDE_PX, SIDE_PX)
    assert np.array_equal(images.read([image_id("a.png")]), images.read([image_id("b.png")]))


def test_a_second_run_with_three_more_files_packs_only_these(tmp_path: Path) -> None:
    files = {f"{i}.png": picture(i) for i in range(4)}
    pack_all(settings(tmp_path), str(put(tmp_path, files)))
    files |= {f"{i}.png": picture(i) for i in range(4, 7)}
    facts = pack_all(settings(tmp_path), str(put(tmp_path, files)))
    packed = PackedImages(tmp_path / "run", tmp_path / "cache").read([image_id(name) for name in files])
    assert (facts["reused"], facts["n_new"], facts["n_packed"], facts["n_shards"]) == (False, 3, 7, 2)
    assert np.array_equal(packed, np.stack([decode(content) for content in files.values()]))


def test_more_files_than_fit_in_a_shard_fill_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.preparing.packing.SHARD_IMAGES", 2)
    files = {f"{i}.png": picture(i) for i in range(5)}
    assert pack_all(settings(tmp_path), str(put(tmp_path, files)))["n_shards"] == 3
    packed = PackedImages(tmp_path / "run", tmp_path / "cache").read([image_id("4.png"), image_id("0.png")])
    assert np.array_equal(packed, np.stack([decode(picture(4)), decode(picture(0))]))


def test_what_an_interrupted_packing_finished_is_not_planned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.preparing.packing.SHARD_IMAGES", 2)
    files = {f"{i}.png": picture(i) for i in range(5)}
    how, source = settings(tmp_path), str(put(tmp_path, files))
    planned = plan_packing.fn(Run(how), 16)
    assert [list(shard.values()) for shard in planned] == [["0.png", "1.png"], ["2.png", "3.png"], ["4.png"]]
    pack_shards.fn(Run(how), source, 16, planned[1:2])
    assert plan_packing.fn(Run(how), 16) == [planned[0], planned[2]]
    with pytest.raises(RunError, match=r"^scaling\.runner: 3 of the packed images not found; "):
        pack.fn(Run(how), 16, 5)
    pack_shards.fn(Run(how), source, 16, [planned[0], planned[2]])
    assert plan_packing.fn(Run(how), 16) == []
    assert pack.fn(Run(how), 16, 3)["n_packed"] == 5


def test_a_file_that_does_not_decode_is_excluded_with_the_reason_and_has_no_pixels(tmp_path: Path) -> None:
    files = {"good.png": picture(1), "cut.png": picture(2)[:900]}
    facts = pack_all(settings(tmp_path), str(put(tmp_path, files)))
    assert excluded_in(tmp_path) == {
        "good.png": "",
        "cut.png": "undecodable: does not decode (image file is truncated)",
    }
    assert (facts["n_packed"], facts["n_undecodable"]) == (1, 1)
    assert image_id("cut.png") not in PackedImages(tmp_path / "run", tmp_path / "cache")


def test_a_file_that_did_not_decode_is_not_tried_again_but_still_marked(tmp_path: Path) -> None:
    files = {"cut.png": picture(2)[:900]}
    pack_all(settings(tmp_path), str(put(tmp_path, files)))
    files |= {"good.png": picture(1)}
    assert pack_all(settings(tmp_path), str(put(tmp_path, files)))["n_new"] == 1
    assert excluded_in(tmp_path)["cut.png"].startswith("undecodable: ")


def test_a_source_of_which_nothing_decodes_gives_an_empty_index(tmp_path: Path) -> None:
    facts = pack_all(settings(tmp_path), str(put(tmp_path, {"a.png": b"x", "b.png": b"y"})))
    assert (facts["n_packed"], facts["n_shards"], facts["n_undecodable"]) == (0, 0, 2)


def test_a_file_that_ingestion_found_undecodable_is_not_read(tmp_path: Path) -> None:
    source = put(tmp_path, {"a.png": b"text", "b.png": picture(1)}, {"a.png": "undecodable: is not a JPEG or PNG"})
    (source / "a.png").unlink()
    assert pack_all(settings(tmp_path), str(source))["n_new"] == 1
    assert excluded_in(tmp_path)["a.png"] == "undecodable: is not a JPEG or PNG"


def test_packing_is_reused_while_its_shards_are_there_and_done_again_when_they_are_gone(tmp_path: Path) -> None:
    files = {"a.png": picture(1)}
    assert [pack_all(settings(tmp_path), str(put(tmp_path, files)))["reused"] for _ in range(2)] == [False, True]
    for shard in (tmp_path / "cache" / "arrays").rglob("*.npy"):
        shard.unlink()
    put(tmp_path, files)
    assert [list(shard.values()) for shard in plan_packing.fn(Run(settings(tmp_path)), 16)] == [["a.png"]]
    pack_all(settings(tmp_path), str(tmp_path / "source"))
    assert image_id("a.png") in PackedImages(tmp_path / "run", tmp_path / "cache")


def test_the_bits_in_use_shape_the_pixels_and_have_a_shelf_of_their_own(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.linspace(0, 4095, 40 * 50).reshape(40, 50).astype(np.uint16)).save(stream, "PNG")
    source, run = put(tmp_path, {"a.png": stream.getvalue()}), Run(settings(tmp_path))
    brightest = []
    for bits in (16, 12, 16):
        shards = plan_packing.fn(run, bits)
        pack_shards.fn(run, str(source), bits, shards)
        pack.fn(run, bits, len(shards))
        brightest.append((len(shards), int(run.images().read([image_id("a.png")]).max())))
    assert brightest == [(1, 16), (1, 255), (0, 16)]


def test_another_preprocessing_has_a_shelf_of_its_own(tmp_path: Path) -> None:
    source = put(tmp_path, {"a.png": picture(1)})
    stretched = pack_all(settings(tmp_path), str(source))
    first = PackedImages(tmp_path / "run", tmp_path / "cache").read([image_id("a.png")])
    padded = pack_all(settings(tmp_path, packing={"padding": True}), str(put(tmp_path, {"a.png": picture(1)})))
    second = PackedImages(tmp_path / "run", tmp_path / "cache").read([image_id("a.png")])
    assert (stretched["n_new"], padded["n_new"]) == (1, 1)
    assert first[:, 0].any()
    assert not second[:, 0].any()


def test_a_file_that_is_gone_meanwhile_ends_in_a_sentence(tmp_path: Path) -> None:
    source = put(tmp_path, {"a.png": picture(1)})
    (source / "a.png").unlink()
    with pytest.raises(SourceError, match=r"a\.png cannot be read"):
        pack_all(settings(tmp_path), str(source))


def test_a_shard_without_its_list_or_a_list_without_its_shard_is_not_known(tmp_path: Path) -> None:
    np.save(tmp_path / "killed.npy", np.zeros((1, 2, 2), np.uint8))
    (tmp_path / "lost.json").write_text(json.dumps({"rows": ["sha"], "failed": {}}))
    assert known_files(tmp_path) == {}
    assert known_files(tmp_path / "not there") == {}


def test_rows_are_marked_by_content_in_whatever_split() -> None:
    manifest = pd.DataFrame({"sha256": ["1", "2", "1"], "split": ["train", "test", "test"], "excluded": ["", "", ""]})
    assert mark_undecodable(manifest, {"1": "broken"})["excluded"].tolist() == [
        "undecodable: broken",
        "",
        "undecodable: broken",
    ]
    assert mark_undecodable(manifest, {})["excluded"].tolist() == ["", "", ""]


def test_the_index_names_each_shard_once_and_leaves_out_what_has_no_pixels() -> None:
    manifest = pd.DataFrame({"image_id": ["a", "b", "c", "d"], "sha256": ["1", "2", "3", "4"]})
    known = {"1": ("y.npy", 5, ""), "2": ("x.npy", 0, ""), "3": ("", -1, "broken"), "9": ("z.npy", 0, "")}
    index = index_arrays(manifest, known)
    assert index["shards"] == [{"name": "y.npy"}, {"name": "x.npy"}]
    assert index["images"] == {"a": [0, 5], "b": [1, 0]}


def test_a_file_that_changed_since_it_was_listed_is_refused_and_not_packed_under_its_old_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"other bytes than those that were listed")
    with pytest.raises(SourceError, match=r"a\.png changed while it was read; run again"):
        pack_shard(tmp_path, {"0" * 64: "a.png"}, tmp_path / "shelf", padding=False, max_side_px=100)
    assert not list(tmp_path.glob("shelf/*.npy"))
