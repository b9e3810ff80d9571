"""Lessons tell the truth: masks where something was drawn, nothing claimed where nobody looked."""

import numpy as np
import pandas as pd
import pytest

from tasks.training.screener_lessons import Lesson, draw_chests, draw_lessons, read_lessons


@pytest.fixture(scope="module")
def chests() -> Lesson:
    return draw_chests(60, seed=5)


def test_a_drawn_device_lies_within_its_mask_and_a_picture_without_one_has_an_empty_mask(
    chests: Lesson,
) -> None:
    bare = chests.pixels[chests.devices == 0][:20]
    drawn = draw_lessons(bare, np.random.default_rng(1))
    assert drawn.pixels.shape == drawn.masks.shape == (20, 224, 224)
    assert set(np.unique(drawn.masks)) <= {0, 255}
    np.testing.assert_array_equal(drawn.devices == 1, drawn.masks.any(axis=(1, 2)))
    assert 10 < drawn.devices.sum() < 20
    assert (drawn.exact == 1).all() and (drawn.weights == 1).all()


def test_the_same_generator_draws_the_same_lesson(chests: Lesson) -> None:
    first, again, other = (draw_lessons(chests.pixels[:4], np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert (first.pixels != other.pixels).any()


def test_drawn_chests_bring_masks_for_exactly_those_with_devices(chests: Lesson) -> None:
    np.testing.assert_array_equal(chests.devices == 1, (chests.masks > 127).any(axis=(1, 2)))
    assert 0.2 < chests.devices.mean() < 0.6


def test_a_reading_claims_a_box_for_a_device_and_an_empty_mask_without_one() -> None:
    rows = pd.DataFrame(
        {
            "device": [1, 0, 0],
            "confidence": [2, 2, 0],
            "x0": [0.1, np.nan, np.nan],
            "y0": [0.2, np.nan, np.nan],
            "x1": [0.3, np.nan, np.nan],
            "y1": [0.4, np.nan, np.nan],
        }
    )
    lesson = read_lessons(rows, np.zeros((3, 224, 224), np.uint8))
    np.testing.assert_allclose(lesson.boxes, [[0.1, 0.2, 0.3, 0.4], [0.0] * 4, [0.0] * 4], atol=1e-6)
    np.testing.assert_allclose(lesson.exact, [0.0, 1.0, 0.3])
    np.testing.assert_allclose(lesson.weights, [1.0, 1.0, 0.3])
    assert lesson.devices.tolist() == [1, 0, 0]


def test_lessons_are_taken_apart_and_joined_row_by_row(chests: Lesson) -> None:
    joined = Lesson.join([chests.take(np.array([3])), chests.take(np.array([1, 2]))])
    assert len(joined) == 3
    np.testing.assert_array_equal(joined.pixels, chests.pixels[[3, 1, 2]])
