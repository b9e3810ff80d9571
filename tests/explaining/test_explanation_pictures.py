"""Pictures of maps: which panels there are, what their colours say, and that doubt is written on them."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tasks.explaining.pictures import OUTLINE, STRIP_PX, WARNING, draw_explanation, tint
from tasks.records import Facts

SIDE, STEP = 320, 320 + 8
GREY = np.full((64, 64), 0.5, np.float32)
HALVES = np.zeros((64, 64), np.intp)
HALVES[:, 32:] = 1


def make_said(weights: tuple[float, ...] = (1.0, -1.0), stable: bool | None = None, **more: Facts) -> Facts:
    return {"probability": 0.87, "weights": list(weights), "stability": {"stable": stable}, **more}


def draw(said: Facts, mask: NDArray[np.uint8] | None = None) -> NDArray[np.int64]:
    return np.asarray(draw_explanation(GREY, HALVES, said, mask)).astype(np.int64)


def panel(picture: NDArray[Any], number: int) -> NDArray[Any]:
    return picture[STRIP_PX:, number * STEP : number * STEP + SIDE]


def strip(picture: NDArray[Any], number: int) -> NDArray[Any]:
    return picture[:STRIP_PX, number * STEP : number * STEP + SIDE]


def has_colour(picture: NDArray[Any], colour: tuple[int, int, int]) -> NDArray[np.bool_]:
    return np.asarray((picture == np.array(colour)).all(axis=-1))


def test_there_are_two_panels_and_a_third_for_the_twin() -> None:
    assert draw(make_said()).shape == (STRIP_PX + SIDE, 2 * SIDE + 8, 3)
    assert draw(make_said(unfiltered=make_said())).shape == (STRIP_PX + SIDE, 3 * SIDE + 16, 3)


def test_the_first_panel_is_the_plain_x_ray() -> None:
    assert set(panel(draw(make_said()), 0).ravel()) == {127}


def test_pieces_that_speak_for_pneumonia_are_red_and_those_against_it_blue() -> None:
    shown = panel(draw(make_said()), 1)
    red, blue = shown[160, 80], shown[160, 240]
    assert red[0] > red[2] + 50
    assert blue[2] > blue[0] + 50


def test_the_twin_comes_before_the_model_each_with_its_own_map() -> None:
    picture = draw(make_said((1.0, -1.0), unfiltered=make_said((-1.0, 1.0))))
    twin, model = panel(picture, 1)[160, 80], panel(picture, 2)[160, 80]
    assert twin[2] > twin[0] and model[0] > model[2]


def test_a_tint_grows_with_the_weight_relative_to_the_largest() -> None:
    plain = np.full((SIDE, SIDE, 3), 128, np.float32)
    even, faint = (tint(plain, HALVES, np.array(weights)) for weights in ((0.2, 0.2), (0.2, 0.05)))
    moved_even, moved_faint = (np.abs(shown[160, 240] - 128).sum() for shown in (even, faint))
    assert 0 < moved_faint == pytest.approx(moved_even / 4)
    np.testing.assert_array_equal(tint(plain, HALVES, np.array([0.4, 0.1])), faint)


def test_a_map_on_which_nothing_depends_is_as_pale_as_it_is() -> None:
    plain = np.full((SIDE, SIDE, 3), 128, np.float32)
    np.testing.assert_array_equal(tint(plain, HALVES, np.zeros(2)), plain)
    strong, weak = (tint(plain, HALVES, np.array([size, -size])) for size in (0.1, 0.001))
    assert np.abs(weak - plain).max() < 0.2 * np.abs(strong - plain).max()


def test_an_unstable_map_says_so_in_the_colour_of_a_warning() -> None:
    unstable, stable, unknown = (draw(make_said(stable=stable)) for stable in (False, True, None))
    np.testing.assert_array_equal(stable, unknown)
    np.testing.assert_array_equal(unstable[STRIP_PX:], stable[STRIP_PX:])
    assert has_colour(strip(unstable, 1), WARNING).any() and not has_colour(strip(stable, 1), WARNING).any()
    longer, shorter = (np.argwhere(strip(picture, 1) < 255)[:, 1].max() for picture in (unstable, stable))
    assert 1.5 * shorter < longer < SIDE - 1, "a few words more, and not cut off"


def test_an_unstable_map_of_the_twin_is_no_word_about_the_model() -> None:
    steady = draw(make_said(stable=True, unfiltered=make_said(stable=True)))
    shaky = draw(make_said(stable=True, unfiltered=make_said(stable=False)))
    assert has_colour(strip(shaky, 1), WARNING).any()
    np.testing.assert_array_equal(strip(shaky, 2), strip(steady, 2))
    np.testing.assert_array_equal(strip(shaky, 0), strip(steady, 0))


def test_devices_are_outlined_on_every_panel_and_only_where_a_mask_is_given() -> None:
    said = make_said(unfiltered=make_said())
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 8:24] = 255
    bare, outlined = draw(said), draw(said, mask)
    assert not has_colour(bare, OUTLINE).any()
    for number in range(3):
        line = has_colour(panel(outlined, number), OUTLINE)
        np.testing.assert_array_equal(panel(outlined, number)[~line], panel(bare, number)[~line])
        rows, columns = line.nonzero()
        assert (rows.min(), rows.max()) == pytest.approx((100, 200), abs=5)
        assert (columns.min(), columns.max()) == pytest.approx((40, 120), abs=5)
        assert not line[110:190, 50:110].any()


def test_a_mask_that_is_sure_of_nothing_is_not_outlined() -> None:
    unsure = np.zeros((64, 64), np.uint8)
    unsure[20:40, 8:24] = 100
    np.testing.assert_array_equal(draw(make_said(), unsure), draw(make_said()))
