"""Equal pictures by bytes and by pixels under one rule; nearly equal ones; and what stands for an unknown patient."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image
from stage_steps import ingest_all, pack_all

from tasks.pixels.decoding import decode
from tasks.preparing.copies import exclude_copies, hash_looks, shrink
from tasks.preparing.splitting import draw_splits
from tasks.runs.manifest import image_id, read_manifest
from tasks.settings import Settings, SplittingSettings

# -- the rule ----------------------------------------------------------------------------------------------------------


def judged(*rows: tuple[str, str, int], splits: dict[str, str] | None = None) -> dict[str, tuple[str, str | None]]:
    """path -> (excluded, duplicate_of) for rows (path, content, label); the split is the path's first part."""
    table = pd.DataFrame(rows, columns=["path", "sha256", "label"]).assign(excluded="").sort_values("path")
    table["source_split"] = [(splits or {}).get(path, path.split("/")[0]) for path in table["path"]]
    out = exclude_copies(table.reset_index(drop=True))
    return {
        str(path): (str(reason), None if pd.isna(of) else str(of))
        for path, reason, of in zip(out["path"], out["excluded"], out["duplicate_of"], strict=True)
    }


def test_files_that_differ_are_left_alone() -> None:
    assert judged(("train/a", "1", 0), ("train/b", "2", 1)) == {"train/a": ("", None), "train/b": ("", None)}


def test_of_copies_in_train_the_first_by_path_stays() -> None:
    found = judged(("train/c", "1", 0), ("train/a", "1", 0), ("train/b", "1", 0))
    assert found["train/a"] == ("", None)
    assert found["train/b"] == found["train/c"] == ("duplicate of train/a", "train/a")


def test_of_copies_in_train_and_val_one_stays() -> None:
    found = judged(("train/a", "1", 1), ("val/a", "1", 1))
    assert sorted(reason for reason, _ in found.values()) == ["", "duplicate of train/a"]


def test_a_copy_of_a_test_image_leaves_train_and_val() -> None:
    found = judged(("train/a", "1", 0), ("val/a", "1", 0), ("test/z", "1", 0))
    assert found["test/z"] == ("", None)
    assert found["train/a"] == found["val/a"] == ("duplicate of test/z", "test/z")


def test_a_copy_of_a_test_image_leaves_train_whatever_the_files_are_called() -> None:
    found = judged(("a.png", "1", 0), ("b.png", "1", 0), splits={"a.png": "train", "b.png": "test"})
    assert found == {"a.png": ("duplicate of b.png", "b.png"), "b.png": ("", None)}


def test_test_keeps_all_its_copies_and_names_them() -> None:
    found = judged(("test/a", "1", 0), ("test/b", "1", 0), ("test/c", "1", 0))
    assert [reason for reason, _ in found.values()] == ["", "", ""]
    assert [of for _, of in found.values()] == [None, "test/a", "test/a"]


def test_identical_files_with_opposite_labels_all_leave_train_and_val() -> None:
    found = judged(("train/a", "1", 0), ("train/b", "1", 1), ("val/c", "1", 1))
    assert found["train/a"][0] == "conflict: the same picture as train/b, which has the other label"
    assert (
        found["train/b"][0] == found["val/c"][0] == "conflict: the same picture as train/a, which has the other label"
    )


def test_a_train_file_that_contradicts_a_test_file_leaves_and_the_test_file_stays() -> None:
    found = judged(("train/a", "1", 0), ("test/a", "1", 1))
    assert found["test/a"][0] == ""
    assert found["train/a"][0] == "conflict: the same picture as test/a, which has the other label"


def test_marks_of_bytes_are_decided_again_by_pixels() -> None:
    rows = [("test/c", "3", "p"), ("train/a", "1", "p"), ("train/b", "1", "p"), ("train/d", "4", "q")]
    table = pd.DataFrame(rows, columns=["path", "sha256", "pixels"]).assign(label=1, excluded="")
    table["source_split"] = [path.split("/")[0] for path in table["path"]]
    by_bytes = exclude_copies(table)
    assert by_bytes["excluded"].tolist() == ["", "", "duplicate of train/a", ""]
    by_pixels = exclude_copies(by_bytes.assign(pixels_sha256=table["pixels"]))
    assert by_pixels["excluded"].tolist() == ["", "duplicate of test/c", "duplicate of test/c", ""]
    assert by_pixels["duplicate_of"].fillna("").tolist() == ["", "test/c", "test/c", ""]


# -- pixels ------------------------------------------------------------------------------------------------------------


def chest(seed: int, side_px: int = 224) -> NDArray[np.uint8]:
    """A smooth picture of its own, as chests are smooth."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8))
    return np.asarray(small.resize((side_px, side_px), Image.Resampling.BICUBIC))


def dimmed(pixels: NDArray[np.uint8], share: float) -> NDArray[np.uint8]:
    return (pixels * share).astype(np.uint8)


def encoded(pixels: NDArray[np.uint8], form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def reopened(data: bytes) -> bytes:
    """The same picture as a PNG."""
    return encoded(np.asarray(Image.open(io.BytesIO(data))))


def packed(tmp_path: Path, files: dict[str, bytes]) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """Facts, manifest by path, and same_pictures.csv of a source with these files and a few others."""
    more = {f"{split}/{folder}/own.png": encoded(chest(900 + i)) for i, (split, folder) in enumerate(FOLDERS)}
    for name, content in {**more, **files}.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(content)
    storage = {"raw": str(tmp_path / "raw"), "cache": str(tmp_path / "cache")}
    run = tmp_path / "run"
    settings = Settings.model_validate({"source": str(tmp_path / "set"), "run_dir": str(run), "storage": storage})
    facts = pack_all(settings, ingest_all(settings)["folder"])
    return facts, read_manifest(run).set_index("path"), pd.read_csv(run / "same_pictures.csv")


FOLDERS = [(split, folder) for split in ("train", "test") for folder in ("NORMAL", "PNEUMONIA")]


def test_a_test_jpeg_saved_as_png_into_train_leaves_train(tmp_path: Path) -> None:
    jpeg = encoded(chest(1), "JPEG")
    facts, manifest, pairs = packed(tmp_path, {"test/NORMAL/a.jpeg": jpeg, "train/NORMAL/b.png": reopened(jpeg)})
    assert manifest.loc["train/NORMAL/b.png", "excluded"] == "duplicate of test/NORMAL/a.jpeg"
    assert manifest.loc["test/NORMAL/a.jpeg", "excluded"] == ""
    assert (facts["n_other_files"], facts["n_duplicates_excluded"], facts["n_near"]) == (2, 1, 0)
    assert pairs[["kind", "path", "other"]].to_numpy().tolist() == [
        ["equal", "train/NORMAL/b.png", "test/NORMAL/a.jpeg"]
    ]


@pytest.mark.parametrize("options", [{"form": "PNG"}, {"form": "JPEG", "quality": 75}])
def test_a_large_jpeg_that_is_saved_again_is_the_same_picture(tmp_path: Path, options: dict[str, Any]) -> None:
    jpeg = encoded(chest(1, 1_200), "JPEG", quality=90)
    saved = encoded(np.asarray(Image.open(io.BytesIO(jpeg))), **options)
    assert not np.array_equal(decode(jpeg), decode(saved)), "else this shows nothing"
    facts, manifest, _ = packed(tmp_path, {"test/NORMAL/a.jpeg": jpeg, "train/NORMAL/b.png": saved})
    assert facts["n_near"] == 0
    assert manifest.loc["train/NORMAL/b.png", "excluded"] == "duplicate of test/NORMAL/a.jpeg"


def test_equal_pictures_with_two_labels_leave_training_and_those_in_test_are_named(tmp_path: Path, capsys: Any) -> None:
    jpeg = encoded(chest(1), "JPEG")
    files = {"test/NORMAL/a.jpeg": jpeg, "train/PNEUMONIA/b.png": reopened(jpeg), "train/NORMAL/c.jpeg": jpeg}
    facts, manifest, pairs = packed(tmp_path, files)
    assert manifest.loc[list(files), "excluded"].tolist() == [
        "",
        "conflict: the same picture as test/NORMAL/a.jpeg, which has the other label",
        "conflict: the same picture as train/PNEUMONIA/b.png, which has the other label",
    ]
    assert (facts["n_conflicts"], facts["n_conflicts_test"]) == (3, 1)
    assert f"1 of them stay in test, such as image {image_id('test/NORMAL/a.jpeg')}" in capsys.readouterr().out
    assert pairs["kind"].tolist() == ["contradicting", "contradicting"]


def test_nearly_equal_pictures_are_listed_and_stay(tmp_path: Path) -> None:
    files = {"test/NORMAL/a.png": encoded(chest(1)), "train/NORMAL/b.jpeg": encoded(dimmed(chest(1), 0.8), "JPEG")}
    facts, manifest, pairs = packed(tmp_path, files)
    assert (manifest["excluded"] == "").all()
    assert (facts["n_near"], facts["n_near_test"], facts["n_near_apart"], facts["n_other_files"]) == (1, 1, 0, 0)
    (row,) = pairs.to_dict("records")
    assert (row["kind"], {row["path"], row["other"]}) == ("near", set(files))
    assert 0.99 <= row["correlation"] < 1


def test_black_pictures_are_equal_but_like_no_other_grey(tmp_path: Path) -> None:
    black, grey = np.zeros((64, 64), np.uint8), np.full((64, 64), 90, np.uint8)
    files = {"train/NORMAL/a.png": encoded(black), "train/NORMAL/b.png": encoded(grey)}
    facts, _, _ = packed(tmp_path, {**files, "train/NORMAL/c.png": encoded(np.zeros((80, 80), np.uint8))})
    assert (facts["n_near"], facts["n_other_files"]) == (0, 2)


def test_the_perceptual_hash_proposes_every_pair_that_correlation_confirms() -> None:
    rng = np.random.default_rng(3)
    first = np.stack([chest(i) for i in range(40)])
    noise = rng.normal(0, rng.uniform(0, 40, (40, 1, 1)), first.shape)
    looks, others = shrink(first), shrink(np.clip(first + noise, 0, 255).astype(np.uint8))
    correlation = (looks * others).sum(1)
    apart = np.linalg.norm(hash_looks(looks) - hash_looks(others), axis=1)
    assert (apart <= np.sqrt(2 - 2 * correlation) + 1e-4).all()
    assert 0 < (correlation >= 0.99).sum() < 40


# -- what stands for a patient -----------------------------------------------------------------------------------------


def test_unknown_patients_stand_for_themselves_and_nearly_equal_pictures_stay_together(tmp_path: Path) -> None:
    copies = {f"train/NORMAL/x{i}.png": encoded(dimmed(chest(1), 1 - 0.1 * i)) for i in range(5)}
    _, manifest, _ = packed(tmp_path, copies)
    groups = manifest["group_id"]
    assert groups[list(copies)].nunique() == 1
    assert groups.nunique() == 1 + len(FOLDERS)
    for salt in "abcdefgh":
        drawn = draw_splits(manifest.reset_index(), SplittingSettings(salt=salt, val_fraction=0.4)).set_index("path")
        assert drawn.loc[list(copies), "split"].nunique() == 1


def test_an_unknown_patient_goes_with_the_known_one_of_a_nearly_equal_picture(tmp_path: Path) -> None:
    table = "path,label,patient_id\na.png,0,p1\nb.jpeg,0,NA\nc.png,1,-\nd.png,1,p2\n"
    files = {"a.png": encoded(chest(1)), "b.jpeg": encoded(dimmed(chest(1), 0.8), "JPEG")}
    files |= {"c.png": encoded(chest(2)), "d.png": encoded(chest(3)), "index.csv": table.encode()}
    _, manifest, _ = packed(tmp_path, files)
    assert manifest["patient_id"].fillna("?").to_dict() == {"a.png": "p1", "b.jpeg": "?", "c.png": "?", "d.png": "p2"}
    assert manifest["group_id"].to_dict() == {
        "a.png": "p1",
        "b.jpeg": "p1",
        "c.png": f"image {image_id('c.png')}",
        "d.png": "p2",
    }


def test_the_checksum_of_pixels_is_that_of_the_packed_picture(tmp_path: Path) -> None:
    _, manifest, _ = packed(tmp_path, {"train/NORMAL/a.png": encoded(chest(1))})
    found = manifest.loc["train/NORMAL/a.png", "pixels_sha256"]
    assert found == hashlib.sha256(chest(1).tobytes()).hexdigest()
