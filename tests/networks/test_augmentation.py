"""Augmentation: acts in training only, keeps the range, and follows from its seed."""

from typing import Any

import numpy as np
import pytest

from tasks.networks.augmentation import (
    Augmentation,
    BorderBlank,
    DetailShift,
    ExposureShift,
    FramingShift,
)
from tasks.networks.checkpoints import reseed
from tasks.networks.keras_backend import keras

KINDS = [ExposureShift, DetailShift, BorderBlank, FramingShift]
BOUNDLESS: dict[type[Augmentation], Any] = {
    ExposureShift: {"gamma": 0.0, "tilt": 0.0, "curve": 0.0},
    DetailShift: {"sharpness": 0.0, "noise": 0.0},
    BorderBlank: {"width": 0.0},
    FramingShift: {"degrees": 0.0, "scale": 0.0, "shift": 0.0},
}


def x_rays(n: int = 4) -> np.ndarray:
    return np.random.default_rng(0).random((n, 32, 32, 1), np.float32)


def change(layer: Augmentation, x: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(layer(x, training=True))


@pytest.mark.parametrize("kind", KINDS)
def test_augmentation_acts_in_training_only(kind: type[Augmentation]) -> None:
    x, layer = x_rays(), kind(seed=1)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer(x, training=False)), x)
    changed = change(layer, x)
    assert changed.shape == x.shape
    assert np.abs(changed - x).mean() > 0.005
    assert changed.min() >= 0
    assert changed.max() <= 1 + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_with_all_bounds_at_0_nothing_changes(kind: type[Augmentation]) -> None:
    x = np.maximum(x_rays(), 1e-3)
    np.testing.assert_allclose(change(kind(**BOUNDLESS[kind]), x), x, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_a_batch_are_changed_apart(kind: type[Augmentation]) -> None:
    same = np.repeat(x_rays(1), 8, axis=0)
    layer = DetailShift(noise=0.0, seed=2) if kind is DetailShift else kind(seed=2)  # grain differs anyhow
    assert np.ptp(change(layer, same), axis=0).max() > 0.01


def test_seed_and_epoch_decide_what_is_drawn() -> None:
    inputs = keras.Input((32, 32, 1))
    x = inputs
    for kind in KINDS:
        x = kind(seed=1)(x)
    model, shown = keras.Model(inputs, x), x_rays()
    drawn = []
    for seed, epoch in ((7, 1), (7, 2), (7, 1), (8, 1)):
        reseed(model, seed, epoch)
        drawn.append(keras.ops.convert_to_numpy(model(shown, training=True)))
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert np.abs(drawn[0] - drawn[1]).mean() > 0.01
    assert np.abs(drawn[0] - drawn[3]).mean() > 0.01


def test_a_blanked_border_takes_the_image_s_mean_and_leaves_the_middle() -> None:
    x = x_rays(64)
    changed = change(BorderBlank(width=0.25, seed=3), x)
    np.testing.assert_array_equal(changed[:, 8:24, 8:24], x[:, 8:24, 8:24])
    means = x.mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose((changed - x)[changed != x], (means - x)[changed != x], atol=1e-5)
    untouched = (changed[:, 16, :4, 0] == x[:, 16, :4, 0]).all(1).mean()
    assert 0.3 < untouched < 0.75, "an edge stays in about half of the draws"
