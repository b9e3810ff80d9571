"""A device is lifted off one X-ray and put on another without its lung, or filled from what surrounds it."""

import numpy as np
import pytest
from audit_scene import add_devices, soft_chest

from tasks.drawings.transplant import MARGIN_PX, fill_place, grow_mask, lift_density, put_density
from tasks.pixels.masks import SURE

SIDE = 112
SEEDS = range(6)


def test_a_mask_grows_by_its_margin_and_doubtful_pixels_are_no_device() -> None:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[50, 50], mask[90, 90] = SURE, SURE - 1
    grown = grow_mask(mask)
    assert grown[50 - MARGIN_PX, 50] and grown[50, 50 + MARGIN_PX]
    assert not grown[50 - MARGIN_PX - 1, 50] and not grown[90, 90]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_device_put_on_another_image_appears_on_its_place_and_nowhere_else(seed: int) -> None:
    donor, target = soft_chest(seed, SIDE), soft_chest(seed + 1, SIDE)
    drawn, mask = add_devices(donor, seed)
    place = grow_mask(mask)
    changed = put_density(target, lift_density(drawn, place))
    assert np.allclose(changed[~place], target[~place], atol=1e-6)
    assert (changed >= target - 1e-6).all()
    seen = drawn - donor > 0.1
    assert seen.any()
    assert (changed - target)[seen].mean() > 0.5 * ((drawn - donor) * (1 - target) / (1 - donor))[seen].mean()


def test_little_is_lifted_off_the_same_place_of_an_image_without_a_device() -> None:
    lifted, empty = [], []
    for seed in SEEDS:
        drawn, mask = add_devices(soft_chest(seed, SIDE), seed)
        place = grow_mask(mask)
        lifted.append(lift_density(drawn, place)[mask > 0].mean())
        empty.append(lift_density(soft_chest(seed + 1, SIDE), place)[mask > 0].mean())
    assert np.mean(empty) < 0.25 * np.mean(lifted)


def test_filling_takes_most_of_a_device_away() -> None:
    before, after = [], []
    for seed in SEEDS:
        plain = soft_chest(seed, SIDE)
        drawn, mask = add_devices(plain, seed)
        filled = fill_place(drawn, grow_mask(mask))
        before.append(np.abs(drawn - plain)[mask > 0].mean())
        after.append(np.abs(filled - plain)[mask > 0].mean())
        assert np.array_equal(filled[~grow_mask(mask)], drawn[~grow_mask(mask)])
    assert np.mean(after) < 0.3 * np.mean(before)


def test_an_empty_mask_changes_nothing_and_lifts_nothing() -> None:
    image, nowhere = soft_chest(0, SIDE), np.zeros((SIDE, SIDE), bool)
    assert np.array_equal(fill_place(image, nowhere), image)
    assert not lift_density(image, nowhere).any()
    assert np.allclose(put_density(image, lift_density(image, nowhere)), image, atol=1e-6)


def test_where_all_is_masked_nothing_is_left_to_fill_from_and_the_image_stays() -> None:
    image, everywhere = soft_chest(0, SIDE), grow_mask(np.full((SIDE, SIDE), 255, np.uint8))
    assert everywhere.all()
    assert np.array_equal(fill_place(image, everywhere), image)
    assert np.allclose(lift_density(image, everywhere), 0, atol=1e-5)


@pytest.mark.parametrize("level", [0.0, 0.4, 0.998, 1.0])
def test_a_constant_image_has_no_device_to_lift_or_fill(level: float) -> None:
    image = np.full((SIDE, SIDE), level, np.float32)
    place = np.zeros((SIDE, SIDE), bool)
    place[30:60, 40:44] = True
    assert np.allclose(fill_place(image, place), image, atol=1e-3)
    assert lift_density(image, place).max() < 0.01


@pytest.mark.parametrize("level", [0.0, 1.0, None])
def test_all_that_comes_out_is_float32_from_0_to_1(level: float | None) -> None:
    rng = np.random.default_rng(0)
    image = np.full((64, 64), level, np.float32) if level is not None else rng.random((64, 64), np.float32)
    for place in (
        rng.random((64, 64)) < 0.7,
        np.eye(64, dtype=bool),
        np.zeros((64, 64), bool),
        np.ones((64, 64), bool),
    ):
        density = lift_density(image, place)
        for out in (fill_place(image, place), density, put_density(image, density)):
            assert out.dtype == np.float32 and out.shape == image.shape
            assert np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
