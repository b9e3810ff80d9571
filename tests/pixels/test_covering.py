"""What is covered tells nothing but its shape, and what is left stays."""

import numpy as np

from tasks.pixels.covering import LUNG_MARGIN_PX, cover, find_lungs, widen_lungs

SIDE = 40


def two_lungs() -> np.ndarray:
    """The masks of an image with lungs, one of which the network is not sure, and one that is all lung."""
    masks = np.zeros((3, SIDE, SIDE), np.uint8)
    masks[0, 10:20, 10:16] = 128
    masks[1, 10:20, 10:16] = 127
    masks[2] = 255
    return masks


def test_lungs_are_widened_by_four_pixels_on_each_side_and_begin_at_one_half() -> None:
    places = widen_lungs(two_lungs())
    expected = np.zeros((SIDE, SIDE), bool)
    expected[10 - LUNG_MARGIN_PX : 20 + LUNG_MARGIN_PX, 10 - LUNG_MARGIN_PX : 16 + LUNG_MARGIN_PX] = True
    np.testing.assert_array_equal(places[0], expected)
    assert not places[1].any()
    assert find_lungs(places).tolist() == [True, False, False], "of the others nothing can be covered, or left"


def test_what_is_covered_has_the_mean_of_what_is_left_of_its_own_image() -> None:
    packed = np.random.default_rng(1).integers(0, 255, (2, SIDE, SIDE), dtype=np.uint8)
    packed[1] //= 3
    places = np.stack([np.eye(SIDE, dtype=bool), ~np.eye(SIDE, dtype=bool)])
    covered = cover(packed, places)
    for before, after, place in zip(packed, covered, places, strict=True):
        np.testing.assert_array_equal(after[~place], before[~place])
        assert (after[place] == np.rint(before[~place].mean())).all()
    np.testing.assert_array_equal(cover(packed, places[0])[0], covered[0])
