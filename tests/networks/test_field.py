"""The field: what a network sees of a picture, and what training makes of the rest."""

from pathlib import Path

import numpy as np
import pytest

from tasks.networks.classifier import answer, build_member, join_members
from tasks.networks.field import KeepLungs, Widen, widen
from tasks.networks.field_augmentation import VaryMasks, VaryOutside
from tasks.networks.files import load_network, save_network
from tasks.networks.keras_backend import keras
from tasks.settings import TrainingSettings
from tasks.training.members import build_trainer

SIDE_PX = 64
SETTINGS = TrainingSettings(side_px=SIDE_PX, width=4, field="lungs")


def half(n: int = 3) -> np.ndarray:
    """Masks of the left half."""
    masks = np.zeros((n, SIDE_PX, SIDE_PX, 1), np.float32)
    masks[:, :, : SIDE_PX // 2] = 1
    return masks


def pictures(n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).random((n, SIDE_PX, SIDE_PX, 1), dtype=np.float32)


@pytest.mark.parametrize("px", [2.0, 9.0, 16.0])
def test_a_mask_is_widened_by_so_many_pixels_of_224(px: float) -> None:
    wide = keras.ops.convert_to_numpy(widen(half(1), px))[0, SIDE_PX // 2, :, 0]
    assert (wide > 0.5).sum() - SIDE_PX // 2 == pytest.approx(px * SIDE_PX / 224, abs=0.6)
    assert wide[: SIDE_PX // 2].min() == 1


def test_the_outside_has_the_mean_grey_of_the_inside() -> None:
    seen = keras.ops.convert_to_numpy(KeepLungs()(pictures(), half()))
    inside = pictures()[:, :, : SIDE_PX // 2]
    np.testing.assert_array_equal(seen[:, :, : SIDE_PX // 2], inside)
    np.testing.assert_allclose(seen[:, :, SIDE_PX // 2 :] - inside.mean((1, 2, 3), keepdims=True), 0, atol=1e-4)


def test_training_varies_masks_by_width_and_child() -> None:
    masks = np.repeat(half(1), 200, axis=0)
    masks[::2] = 1 - masks[::2]  # of two children in turn
    varied = keras.ops.convert_to_numpy(VaryMasks(seed=1)(masks, training=True))
    foreign = (varied * masks).sum((1, 2, 3)) < 0.5 * masks.sum((1, 2, 3))
    assert 0.04 < foreign.mean() < 0.2
    widths = (varied[~foreign] > 0.5).sum((1, 2, 3)) / SIDE_PX - SIDE_PX / 2
    assert 0 <= widths.min() < 1.5 and 3.5 < widths.max() < 5.5


def test_varied_training_changes_the_outside_alone_and_a_finished_network_nothing() -> None:
    images, masks = pictures(60), half(60)
    layer = VaryOutside(seed=1)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer([images, masks], training=False)), images)
    varied = keras.ops.convert_to_numpy(layer([images, masks], training=True))
    np.testing.assert_array_equal(varied[:, :, : SIDE_PX // 2], images[:, :, : SIDE_PX // 2])
    outside = varied[:, :, SIDE_PX // 2 :]
    kept = (outside == images[:, :, SIDE_PX // 2 :]).all((1, 2, 3))
    constant = np.ptp(outside, axis=(1, 2, 3)) == 0
    others = (outside == np.roll(images, 1, axis=0)[:, :, SIDE_PX // 2 :]).all((1, 2, 3))
    assert (kept.astype(int) + constant + others == 1).all()
    assert min(kept.sum(), constant.sum(), others.sum()) >= 10


def left_half() -> keras.Model:
    """A segmenter that takes what is bright for lung."""
    pixels = keras.Input((224, 224, 1))
    return keras.Model(pixels, keras.layers.Rescaling(1.0)(pixels), name="segmenter")


def test_a_model_that_sees_lungs_alone_minds_nothing_outside_of_them(tmp_path: Path) -> None:
    save_network(join_members([build_member(SETTINGS, 1)], left_half()), tmp_path, "model")
    model = load_network(tmp_path, "model")
    packed = np.zeros((4, 224, 224), np.uint8)
    packed[:, 60:160, 40:180] = 255
    packed[1, :20, :20] = 40  # dark: outside
    packed[2, 90:110, 90:110] = 60  # a hole in what is bright
    said = answer(model, packed).members[:, 0]
    logits = np.log(said / (1 - said))
    assert abs(logits[1] - logits[0]) < 0.2 * abs(logits[2] - logits[0])
    assert logits[3] == pytest.approx(logits[0], abs=1e-5)


@pytest.mark.parametrize("field", ["lungs", "varied"])
def test_a_trainer_brings_the_masks_of_the_rows_to_the_network(field: str) -> None:
    trainer = build_trainer(build_member(SETTINGS.model_copy(update={"field": field}), 1), 8, 1, field)
    trainer.get_layer("resident").put((pictures(8)[..., 0] * 255).astype(np.uint8))
    trainer.get_layer("resident_lungs").put((half(8)[..., 0] * 255).astype(np.uint8))
    assert trainer(np.arange(4, dtype=np.int32), training=True).shape == (4, 2)


def test_a_finished_network_widens_by_the_mean_of_what_training_draws() -> None:
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(Widen()(half())), keras.ops.convert_to_numpy(widen(half(), 9.0))
    )
