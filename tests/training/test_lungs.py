"""Training a segmenter of lungs: patients apart, another style left out, killed and unbroken trainings end alike."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tasks.errors import ArchiveError, SettingsError, TableError
from tasks.networks.segmenter import load_segmenter, segment_pixels
from tasks.runs.run import Run
from tasks.settings import Settings, StorageSettings
from tasks.training import epochs
from tasks.training.lung_lessons import LungLesson
from tasks.training.lung_quality import judge_lungs, lower_border, measure_dice
from tasks.training.lungs import LungRecipe, MaskedImages, join_masks, read_masks, train_lungs

RECIPE = LungRecipe(epochs=3, batch_size=8, widths=(4, 4), n_chests=40, n_chests_shown=4, learning_rate=5e-3)


def manifest_of(n_patients: int) -> pd.DataFrame:
    """Two images of each patient; every seventh patient is in validation."""
    patients = np.repeat(np.arange(n_patients), 2)
    kinds = np.array(["normal", "bacteria", "virus"])[patients % 3]
    return pd.DataFrame(
        {
            "image_id": [f"{i:016x}" for i in range(len(patients))],
            "path": [f"train/{i:04d}.jpeg" for i in range(len(patients))],
            "sha256": [f"{i:064x}" for i in range(1000, 1000 + len(patients))],
            "subtype": kinds,
            "group_id": [f"p{i}" for i in patients],
            "split": np.where(patients % 7 == 0, "val", "train"),
            "excluded": "",
        }
    )


def table_of(manifest: pd.DataFrame) -> pd.DataFrame:
    """Masks of all images, every fifth in another style."""
    shifts = np.where(np.arange(len(manifest)) % 5 == 0, 0.06, 0.01)
    return pd.DataFrame({"path": manifest["path"], "lower_border_below_prediction": shifts})


@pytest.fixture(scope="module")
def masked() -> MaskedImages:
    """Pictures with two dark fields at changing places, which are the lungs."""
    manifest = manifest_of(40)
    rows = join_masks(manifest, table_of(manifest))
    rng = np.random.default_rng(0)
    pixels = rng.integers(150, 180, (len(rows), 224, 224), dtype=np.uint8)
    lungs = np.zeros_like(pixels)
    for mask in lungs:
        top, left = rng.integers(30, 60, 2)
        mask[top : top + 120, left : left + 50] = mask[top : top + 120, left + 80 : left + 130] = 255
    pixels[lungs > 0] //= 3
    return MaskedImages(rows, pixels, lungs)


def test_no_mask_of_a_patient_in_validation_or_tuning_is_fitted_to_and_none_of_another_style() -> None:
    manifest = manifest_of(400)
    rows = join_masks(manifest, table_of(manifest)).merge(manifest[["path", "split"]], on="path")
    assert len(rows) == len(manifest)
    np.testing.assert_array_equal(rows["part"] == "report", rows["split"] == "val")
    fitted = rows[rows["part"] == "fit"]
    others = rows[rows["part"].isin(["tune", "report"])]
    assert not set(fitted["group_id"]) & set(others["group_id"])
    assert (fitted["shift"].abs() <= 0.03).all() and (rows[rows["part"] == "style"]["shift"] > 0.03).all()
    assert 0.05 < (rows["part"] == "tune").sum() / (rows["split"] == "train").sum() < 0.15


def test_of_equal_files_the_one_that_is_fitted_to_least_counts() -> None:
    manifest = manifest_of(400)
    fitted = manifest[manifest["split"] == "train"].index[4]
    manifest.loc[fitted, "sha256"] = manifest.loc[0, "sha256"]
    rows = join_masks(manifest, table_of(manifest))
    assert rows[rows["sha256"] == manifest.loc[0, "sha256"]]["part"].tolist() == ["report"]


def test_a_table_of_other_images_is_refused() -> None:
    table = pd.DataFrame({"path": ["elsewhere/a.jpeg"], "lower_border_below_prediction": [0.0]})
    with pytest.raises(TableError, match="no mask of the part 'fit' of the patients belongs to this source"):
        join_masks(manifest_of(20), table)


def test_masks_are_read_from_a_zip_at_the_paths_of_their_images(tmp_path: Path) -> None:
    mask = np.zeros((224, 224), bool)
    mask[50:100, 20:60] = True
    content = io.BytesIO()
    Image.fromarray(mask).save(content, "PNG")
    with zipfile.ZipFile(tmp_path / "masks.zip", "w") as archive:
        archive.writestr("train/a.png", content.getvalue())
        archive.writestr("train/b.png", b"no picture")
    run = Run(Settings(run_dir=str(tmp_path / "run"), storage=StorageSettings(raw=str(tmp_path / "raw"))))
    found = read_masks(tmp_path / "masks.zip", ["train/a.jpeg"], run)
    np.testing.assert_array_equal(found[0] == 255, mask)
    with pytest.raises(ArchiveError, match=r"masks: .*masks\.zip lacks train/c\.png; add it"):
        read_masks(tmp_path / "masks.zip", ["train/c.jpeg"], run)
    with pytest.raises(ArchiveError, match=r"masks: train/b\.png of .* again as a PNG"):
        read_masks(tmp_path / "masks.zip", ["train/b.jpeg"], run)


@pytest.mark.slow
def test_a_killed_training_resumes_and_ends_as_an_unbroken_one(
    masked: MaskedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_lungs(masked, RECIPE, 7, whole)
    run_epoch, calls = epochs.run_epoch, []

    def killed_in_the_third(*arguments: object) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_epoch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(epochs, "run_epoch", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        train_lungs(masked, RECIPE, 7, broken)
    card = train_lungs(masked, RECIPE, 7, broken)["card"]
    assert len(calls) == 4, "two whole epochs, the killed one, and only that one again"
    one, two = (np.concatenate(list(segment_pixels(load_segmenter(f), masked.pixels[:8]))) for f in (whole, broken))
    np.testing.assert_allclose(one, two, atol=1)
    files = ["card.json", "history.csv", "masks.csv", "model.keras", "model.sha256"]
    assert sorted(path.name for path in broken.iterdir()) == files
    listed = pd.read_csv(broken / "masks.csv", dtype=str)
    assert listed["part"].value_counts().to_dict() == {
        part: sum(kinds.values()) for part, kinds in card["masks"].items()
    }
    assert (
        card["figures"]["report"]["all"]["n"] + card["figures"]["report"]["other_style"]["n"]
        == (masked.rows["part"] == "report").sum()
    )


def test_a_batch_larger_than_an_epoch_is_refused(masked: MaskedImages, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"recipe\.batch_size: 4096 is more than"):
        train_lungs(masked, RECIPE.model_copy(update={"batch_size": 4096}), 7, tmp_path)


def test_a_lesson_is_joined_with_some_rows_of_another_and_feeds_what_it_holds() -> None:
    one = LungLesson(np.full((2, 224, 224), 51, np.uint8), np.zeros((2, 224, 224), np.uint8))
    other = LungLesson(np.full((3, 224, 224), 102, np.uint8), np.full((3, 224, 224), 255, np.uint8))
    joined = one.join(other, np.array([2]))
    pixels, lungs = joined.feed(np.array([0, 2]))
    assert len(joined) == 3
    np.testing.assert_allclose(pixels[:, 0, 0, 0], [0.2, 0.4])
    np.testing.assert_allclose(lungs[:, 0, 0, 0], [0.0, 1.0])


def test_overlap_and_lower_border_are_those_counted_by_hand() -> None:
    drawn, found = np.zeros((2, 100, 100), np.uint8), np.zeros((2, 100, 100), np.uint8)
    drawn[0, 20:60, 10:50] = 255
    found[0, 40:80, 10:50] = 255
    found[0, 90, 10:12] = 255  # two pixels are no border
    assert measure_dice(drawn, drawn)[0] == 1.0
    assert measure_dice(found, drawn)[0] == pytest.approx(2 * 800 / (1600 + 1602))
    assert measure_dice(found, drawn)[1] == 0.0
    assert lower_border(found).tolist() == [0.8, 0.0]
    rows = pd.DataFrame({"subtype": "virus", "group_id": ["a", "b"], "shift": [0.0, 0.05]})
    facts = judge_lungs(rows, found, drawn, 0.03, 1)
    assert facts["all"]["n"] == facts["virus"]["n"] == facts["other_style"]["n"] == 1
    assert facts["all"]["lower_border"]["value"] == pytest.approx(0.2)
    assert facts["class_gap"] == 0.0
