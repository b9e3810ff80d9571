"""Shifts: each changes the images, none changes their shape, and the border is the outer 3/28."""

import numpy as np
import pytest

from tasks.pixels.shifts import SHIFTS, keep_border, remove_border


def x_rays() -> np.ndarray:
    """Two smooth pictures with some grain, brighter to one side."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(40, 180, 224)
    return (ramp[None, None, :] + rng.uniform(-20, 20, (2, 224, 224))).astype(np.uint8)


@pytest.mark.parametrize("name", [name for name in SHIFTS if name != "as it is"])
def test_a_shift_changes_pixels_and_not_shape_or_type_and_comes_out_the_same_twice(name: str) -> None:
    packed = x_rays()
    before = packed.copy()
    changed = SHIFTS[name](packed)
    assert changed.dtype == np.uint8
    assert changed.shape == packed.shape
    assert np.abs(changed.astype(int) - packed).mean() > 1
    np.testing.assert_array_equal(packed, before)
    np.testing.assert_array_equal(SHIFTS[name](packed), changed)


def test_the_first_is_validation_as_it_is() -> None:
    assert next(iter(SHIFTS)) == "as it is"
    np.testing.assert_array_equal(SHIFTS["as it is"](x_rays()), x_rays())


def test_darker_is_darker_and_brighter_is_brighter() -> None:
    packed = x_rays()
    assert SHIFTS["darker"](packed).mean() < packed.mean() - 10 < packed.mean() + 10 < SHIFTS["brighter"](packed).mean()


def test_blurring_takes_away_what_sharpening_brings() -> None:
    def roughness(images: np.ndarray) -> float:
        return float(np.abs(np.diff(images.astype(int), axis=1)).mean())

    packed = x_rays()
    assert roughness(SHIFTS["blurred"](packed)) < roughness(packed) / 2
    assert roughness(SHIFTS["sharpened"](packed)) > 1.5 * roughness(packed)


def test_border_and_rest_are_the_two_parts_of_an_image() -> None:
    packed = x_rays()
    inside = np.s_[:, 24:-24, 24:-24]
    only, removed = keep_border(packed), remove_border(packed)
    np.testing.assert_array_equal(removed[inside], packed[inside])
    assert np.ptp(only[inside], axis=(1, 2)).max() == 0, "one grey, the mean"
    np.testing.assert_allclose(only[inside].mean((1, 2)), packed.mean((1, 2)), atol=0.5)
    outside = np.ones((224, 224), bool)
    outside[24:-24, 24:-24] = False
    np.testing.assert_array_equal(only[:, outside], packed[:, outside])
    assert np.ptp(removed[:, outside], axis=1).max() == 0
