"""Smoothing: products of matrices do what filters of images do."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, uniform_filter

from tasks.networks.keras_backend import keras
from tasks.networks.smoothing import blur, mean_around, resize


def pictures(side: int = 48) -> np.ndarray:
    return np.random.default_rng(0).random((3, side, side, 1), dtype=np.float32)


@pytest.mark.parametrize("deviation_px", [0.6, 2.8])
def test_a_blur_is_a_gaussian_one(deviation_px: float) -> None:
    expected = gaussian_filter(pictures()[..., 0], (0, deviation_px, deviation_px))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(blur(pictures(), deviation_px))[..., 0], expected, atol=1e-5)


def test_the_mean_around_a_pixel_is_that_of_a_square() -> None:
    expected = uniform_filter(pictures()[..., 0], (0, 7, 7))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(mean_around(pictures(), 3))[..., 0], expected, atol=1e-5)


@pytest.mark.parametrize("side_px", [32, 128, 150, 224, 256])
def test_images_are_resized_as_keras_resizes_them(side_px: int) -> None:
    expected = keras.layers.Resizing(side_px, side_px, interpolation="bilinear", antialias=True)(pictures(224))
    found = keras.ops.convert_to_numpy(resize(pictures(224), side_px))
    np.testing.assert_allclose(found, keras.ops.convert_to_numpy(expected), atol=5e-5)
