"""Training a screener: patients apart, killed and unbroken trainings end alike, the score is balanced at 0.5."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tasks.devices.screener import build_core, build_screener, finish_screener, load_screener, score_pixels
from tasks.errors import SettingsError, TableError
from tasks.networks.files import save_network
from tasks.pixels.packed import PackedImages
from tasks.training import epochs
from tasks.training.screener import (
    ReadImages,
    ScreenerRecipe,
    balance_score,
    join_readings,
    part_of_patient,
    start_core,
    train_screener,
)

RECIPE = ScreenerRecipe(
    epochs=3, batch_size=8, widths=(4, 4, 4), n_composites=12, n_chests=40, n_chests_shown=6, learning_rate=5e-3
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, pd.DataFrame, PackedImages]:
    """60 packed pictures, a third with a bright bar; readings of all, and their manifest."""
    folder = tmp_path_factory.mktemp("screener_data")
    rng = np.random.default_rng(0)
    n = 60
    devices = (np.arange(n) % 3 == 0).astype(int)
    pixels = rng.integers(40, 90, (n, 224, 224), dtype=np.uint8)
    for picture, device in zip(pixels, devices, strict=True):
        if device:
            picture[100:104, 60:180] = 240
    np.save(folder / "one.npy", pixels)
    ids = [f"{i:016x}" for i in range(n)]
    index = {"shards": [{"name": "one.npy"}], "images": {image: [0, i] for i, image in enumerate(ids)}}
    (folder / "arrays").mkdir()
    (folder / "arrays" / "index.json").write_text(json.dumps(index))
    manifest = pd.DataFrame(
        {
            "image_id": ids,
            "path": [f"train/{i}" for i in range(n)],
            "sha256": [f"{i:064x}" for i in range(1000, 1000 + n)],
            "label": (np.arange(n) % 4 > 0).astype(int),
            "group_id": [f"p{i}" for i in range(n)],
            "split": "train",
            "excluded": "",
        }
    )
    table = pd.DataFrame({"path": manifest["path"], "device": devices.astype(str)})
    for name, place in zip(("x0", "y0", "x1", "y1"), ("0.25", "0.44", "0.8", "0.47"), strict=True):
        table[name] = np.where(devices == 1, place, "")
    return join_readings(manifest, table), manifest, PackedImages(folder, folder)


def test_a_patient_is_always_in_one_part_and_the_parts_have_their_shares() -> None:
    parts = [part_of_patient(f"person{i}") for i in range(4000)]
    assert parts == [part_of_patient(f"person{i}") for i in range(4000)]
    shares = pd.Series(parts).value_counts(normalize=True)
    assert shares["fit"] == pytest.approx(0.7, abs=0.03) and shares["report"] == pytest.approx(0.2, abs=0.03)


def test_readings_are_joined_a_row_per_file_and_a_device_seen_in_one_copy_counts() -> None:
    manifest = pd.DataFrame(
        {
            "path": ["train/a", "train/b", "train/c"],
            "image_id": ["1", "2", "3"],
            "sha256": ["x", "x", "y"],
            "label": 1,
            "group_id": ["p", "q", "r"],
            "split": "train",
            "excluded": ["", "duplicate of train/a", "undecodable: no"],
        }
    )
    table = pd.DataFrame({"path": ["train/a", "train/b", "train/c"], "device": ["0", "1", "1"]})
    rows = join_readings(manifest, table)
    assert rows[["path", "device", "confidence"]].to_numpy().tolist() == [["train/b", 1, 2]]


@pytest.mark.slow
def test_a_killed_training_ends_as_an_unbroken_one_and_its_card_names_parts_and_figures_of_patients_not_fitted_to(
    data: tuple[pd.DataFrame, pd.DataFrame, PackedImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, manifest, images = data
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_screener(ReadImages(rows, manifest, images), RECIPE, 7, whole)
    run_epoch, calls = epochs.run_epoch, []

    def killed_in_the_third(*arguments: object) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_epoch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(epochs, "run_epoch", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        train_screener(ReadImages(rows, manifest, images), RECIPE, 7, broken)
    card = train_screener(ReadImages(rows, manifest, images), RECIPE, 7, broken)["card"]
    assert len(calls) == 4, "two whole epochs, the killed one, and only that one again"
    pixels = images.read(list(manifest["image_id"]))
    one, two = (score_pixels(load_screener(folder), pixels) for folder in (whole, broken))
    np.testing.assert_allclose(one, two, atol=1e-4)
    files = ["card.json", "history.csv", "model.keras", "model.sha256", "readings.csv"]
    assert sorted(path.name for path in broken.iterdir()) == files
    assert sum(sum(part.values()) for part in card["readings"].values()) == len(rows)
    assert card["figures"]["report"]["all"]["n"] == (rows["part"] == "report").sum()
    listed = pd.read_csv(broken / "readings.csv", dtype=str)
    parts = dict(zip(rows["sha256"].str[:16], rows["part"], strict=True))
    assert dict(zip(listed["sha256"], listed["part"], strict=True)) == parts


def test_training_starts_from_the_weights_of_a_screener_that_is_named(tmp_path: Path) -> None:
    screener = build_screener(3, (4, 4, 4))
    save_network(screener, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (4, 224, 224), dtype=np.uint8)
    named = RECIPE.model_copy(update={"start_from": str(tmp_path)})
    np.testing.assert_array_equal(
        score_pixels(finish_screener(start_core(named, 7)), pixels), score_pixels(screener, pixels)
    )
    with pytest.raises(SettingsError, match=r"recipe\.start_from: .* has other widths"):
        start_core(named.model_copy(update={"widths": (4, 4, 8)}), 7)


def test_calibration_puts_the_balanced_threshold_at_one_half() -> None:
    core = build_core(1, (4, 4, 4))
    pixels = np.random.default_rng(0).integers(0, 255, (40, 224, 224), dtype=np.uint8)
    pixels[::2] //= 3
    pixels[::2, 50:60] = 255
    devices = (np.arange(40) % 2 == 0).astype(int)
    screener = finish_screener(core)
    before = score_pixels(screener, pixels)
    if before[devices == 1].mean() < before[devices == 0].mean():
        devices = 1 - devices
    balance_score(core, devices, before)
    called = score_pixels(screener, pixels) >= 0.5
    assert abs(called[devices == 1].mean() - (1 - called[devices == 0].mean())) < 0.15
    assert (
        np.corrcoef(np.argsort(np.argsort(before)), np.argsort(np.argsort(score_pixels(screener, pixels))))[0, 1] > 0.99
    )


def test_parts_without_devices_are_refused_in_words(
    data: tuple[pd.DataFrame, pd.DataFrame, PackedImages], tmp_path: Path
) -> None:
    rows, manifest, images = data
    few = rows[(rows["part"] != "tune") | (rows["device"] == 0)]
    with pytest.raises(TableError, match="part 'tune' of the patients lack images with or without a device"):
        train_screener(ReadImages(few, manifest, images), RECIPE, 7, tmp_path)
    with pytest.raises(SettingsError, match=r"recipe\.batch_size: 4096 is more than"):
        train_screener(ReadImages(rows, manifest, images), RECIPE.model_copy(update={"batch_size": 4096}), 7, tmp_path)
