"""The screener: its score rests on its mask alone, and the shipped one does what its card says."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from tasks.devices.files import SHIPPED_SCREENER, find_screener, known_readings
from tasks.devices.screener import (
    StrongestEvidence,
    build_core,
    build_screener,
    finish_screener,
    load_screener,
    score_pixels,
    screen_pixels,
)
from tasks.errors import RunError
from tasks.files import sha256_of_file
from tasks.networks.files import save_network
from tasks.pixels.decoding import decode
from tasks.pixels.greys import to_float
from tasks.settings import ScreeningSettings
from tasks.training.screener_lessons import Lesson, draw_chests
from tasks.training.screener_losses import BoxArea, build_screener_trainer

HOW = ScreeningSettings()


@pytest.fixture(scope="module")
def shipped() -> keras.Model:
    return load_screener(SHIPPED_SCREENER)


@pytest.fixture(scope="module")
def chests() -> Lesson:
    """Drawn chests that neither the sample nor the training of the shipped screener has drawn."""
    return draw_chests(300, seed=424_242)


# -- the network -------------------------------------------------------------------------------------------------------


def test_masks_and_scores_have_their_shapes_and_ranges() -> None:
    packed = np.random.default_rng(0).integers(0, 255, (5, 224, 224), dtype=np.uint8)
    said = list(screen_pixels(build_screener(1, (4, 4, 4)), packed, batch_size=2))
    assert [len(batch.scores) for batch in said] == [2, 2, 1]
    assert all(batch.masks.shape[1:] == (224, 224) and batch.masks.dtype == np.uint8 for batch in said)
    assert all(((batch.scores >= 0) & (batch.scores <= 1)).all() for batch in said)


def test_the_score_follows_from_the_mask_alone() -> None:
    core = build_core(1, (4, 4, 4))
    packed = np.random.default_rng(0).integers(0, 255, (8, 224, 224), dtype=np.uint8)
    logits, scores = (keras.ops.convert_to_numpy(part) for part in core.predict_on_batch(to_float(packed)))
    kernel, bias = core.get_layer("score_logit").get_weights()
    largest = -np.sort(-logits.reshape(8, -1), axis=1)
    evidence = np.stack([largest[:, :count].mean(axis=1) for count in (6, 32, 128)], axis=1)
    np.testing.assert_allclose(scores, evidence @ kernel + bias, atol=1e-3)
    assert (kernel >= 0).all()


def test_the_strongest_evidence_is_the_mean_of_the_largest_values() -> None:
    plane = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    found = StrongestEvidence((1, 4))(plane)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(found), [[15.0, 13.5]])


def test_an_empty_picture_of_any_grey_gives_finite_numbers() -> None:
    packed = np.stack([np.full((224, 224), grey, np.uint8) for grey in (0, 128, 255)])
    assert np.isfinite(score_pixels(build_screener(1, (4, 4, 4)), packed)).all()


def test_a_box_covers_its_place_and_no_box_covers_nothing() -> None:
    boxes = np.array([[0.25, 0.5, 0.5, 1.0], [0, 0, 0, 0]], np.float32)
    area = keras.ops.convert_to_numpy(BoxArea(100)(boxes))[..., 0]
    assert area[0, 60:99, 27:49].all() and not area[0, :45].any() and not area[0, :, 60:].any()
    assert not area[1].any()


def test_the_loss_of_a_right_answer_is_below_that_of_a_wrong_one() -> None:
    core = build_core(1, (4, 4, 4))
    trainer = build_screener_trainer(core, 1)
    packed = np.zeros((2, 224, 224, 1), np.float32)
    packed[:, 80:120, 80:120] = 1.0
    masks = (packed > 0).astype(np.float32)
    ones = np.ones((2, 1), np.float32)
    inputs = [packed, masks, np.zeros((2, 4), np.float32), ones, ones, ones]
    trainer.compile(keras.optimizers.Adam(1e-2), loss=lambda truth, losses: keras.ops.mean(losses))
    losses = [float(np.ravel(trainer.train_on_batch(inputs, np.zeros((2, 1))))[0]) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    screener = finish_screener(trainer.get_layer("core"))
    assert set(screener.output_names) == {"device_score", "mask"}


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_screener_is_found_by_its_folder_and_refused_when_it_is_none(tmp_path: Path) -> None:
    assert find_screener(None).folder == SHIPPED_SCREENER
    with pytest.raises(RunError, match=r"screening\.screener: .*model\.keras is missing"):
        find_screener(str(tmp_path))
    inputs = keras.Input((224, 224, 1))
    save_network(keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs)), tmp_path)
    with pytest.raises(RunError, match="holds no screener"):
        load_screener(tmp_path)
    (tmp_path / "model.keras").write_bytes(b"x")
    (tmp_path / "model.sha256").write_text(sha256_of_file(tmp_path / "model.keras"))
    with pytest.raises(RunError, match=r"^screening\.screener: .*model\.keras does not load \(.*\); name a folder"):
        load_screener(tmp_path)


def test_known_readings_are_those_fitted_and_tuned_to(tmp_path: Path) -> None:
    assert known_readings(tmp_path) is None
    (tmp_path / "readings.csv").write_text("sha256,part\naa,fit\nbb,tune\ncc,report\n")
    assert known_readings(tmp_path) == frozenset({"aa", "bb"})
    (tmp_path / "readings.csv").write_text("path,part\naa,fit\n")
    with pytest.raises(RunError, match="lacks the columns sha256,part"):
        known_readings(tmp_path)


# -- the shipped one ---------------------------------------------------------------------------------------------------


def test_the_shipped_screener_is_small_and_its_card_is_about_it() -> None:
    card = json.loads((SHIPPED_SCREENER / "card.json").read_text())
    assert (SHIPPED_SCREENER / "model.keras").stat().st_size < 6e6
    assert card["model_sha256"] == find_screener(None).sha256
    readings = (SHIPPED_SCREENER / "readings.csv").read_text().splitlines()
    assert len(readings) - 1 == sum(n for part in card["readings"].values() for n in part.values())


def test_the_shipped_screener_finds_nine_of_ten_drawn_devices_and_clears_nine_of_ten_chests_without(
    shipped: keras.Model, chests: Lesson
) -> None:
    scores = score_pixels(shipped, chests.pixels)
    cut = np.quantile(scores[chests.devices == 0], 0.9)
    assert (scores[chests.devices == 1] > cut).mean() >= 0.9
    called = scores >= HOW.threshold
    assert called[chests.devices == 1].mean() >= 0.87
    assert called[chests.devices == 0].mean() <= 0.1


def test_masks_of_drawn_devices_overlap_what_was_drawn(shipped: keras.Model, chests: Lesson) -> None:
    rows = np.flatnonzero(chests.devices)
    masks = np.concatenate([said.masks for said in screen_pixels(shipped, chests.pixels[rows])]) >= 128
    truth = chests.masks[rows] >= 128
    touched = (masks & truth).any(axis=(1, 2))
    assert touched.mean() >= 0.9
    iou = (masks & truth).sum() / (masks | truth).sum()
    assert iou >= 0.25


def test_an_original_and_its_small_copy_get_the_same_decision(shipped: keras.Model, shared_data: Path) -> None:
    import zipfile

    files = sorted((shared_data / "full_resolution").glob("*.jpeg"))
    assert len(files) == 2
    with zipfile.ZipFile(shared_data / "chest_xray_224.zip") as archive:
        for file in files:
            (small,) = [n for n in archive.namelist() if n.endswith("/" + file.name) and "__MACOSX" not in n][:1]
            pair = np.stack([decode(file.read_bytes()), decode(archive.read(small))])
            scores = score_pixels(shipped, pair)
            assert len(set((scores >= HOW.threshold).tolist())) == 1, file.name
            assert len(set((scores >= HOW.leaves_from).tolist())) == 1, file.name
