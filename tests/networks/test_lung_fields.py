"""Whether a mask of lungs shows two plausible ones: what is refused, what is not, and the file of the bounds."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tasks.errors import RunError
from tasks.networks.lung_fields import (
    FILE,
    MEASURES,
    MIN_IMAGES,
    LungBounds,
    describe_lungs,
    fit_bounds,
    load_bounds,
    measure_fields,
    save_bounds,
)


def draw_lungs(rng: np.random.Generator) -> np.ndarray:
    """Two ellipses of about the size and place of a child's lungs, uint8 ``(224, 224)``."""
    image = Image.new("L", (224, 224))
    x, y, across, down = 112 + rng.normal(0, 6), 112 + rng.normal(0, 6), rng.normal(30, 2), rng.normal(70, 4)
    for centre in (x - 46, x + 46):
        ImageDraw.Draw(image).ellipse((centre - across, y - down, centre + across, y + down), fill=250)
    return np.asarray(image)


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.stack([draw_lungs(rng) for _ in range(100)])


@pytest.fixture(scope="module")
def bounds(masks: np.ndarray) -> LungBounds:
    return fit_bounds(measure_fields(masks[:60]), "ab" * 32)


def refused(bounds: LungBounds, masks: np.ndarray) -> float:
    """The share of masks that are refused."""
    return float(np.mean([bool(describe_lungs(row, bounds)) for row in measure_fields(masks)]))


def test_lungs_like_those_of_the_training_images_are_not_refused_mirrored_or_not(
    bounds: LungBounds, masks: np.ndarray
) -> None:
    assert refused(bounds, masks[60:]) == refused(bounds, masks[60:, :, ::-1]) == 0


SPOILT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "the upper half of the picture is missing": lambda m: np.repeat(m[:, 112:], 2, 1),
    "the upper part is black": lambda m: m * (np.arange(224) >= 126)[:, None],
    "the lower half is missing": lambda m: np.repeat(m[:, :112], 2, 1),
    "one lung is missing": lambda m: m * (np.arange(224) < 112),
    "one half of the picture is missing": lambda m: np.repeat(m[:, :, :112], 2, 2),
    "it is turned by 90 degrees": lambda m: np.rot90(m, axes=(1, 2)),
    "it is a third as large": lambda m: np.pad(m[:, 1::3, 1::3], ((0, 0), (75, 75), (75, 75)))[:, :224, :224],
    "it is a middle part, enlarged": lambda m: np.repeat(np.repeat(m[:, 56:168, 56:168], 2, 1), 2, 2),
    "a third field lies in a corner": lambda m: np.maximum(m, np.pad(np.full((40, 40), 200, np.uint8), (0, 184))),
    "nothing is sure": lambda m: m // 250 * 140,
    "there is no lung": np.zeros_like,
    "all is lung": lambda m: np.full_like(m, 255),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_lungs_are_refused_when(kind: str, bounds: LungBounds, masks: np.ndarray) -> None:
    assert refused(bounds, SPOILT[kind](masks[60:])) == 1


def test_a_refusal_names_the_measure_that_is_furthest_off_its_value_and_its_bound(
    bounds: LungBounds, masks: np.ndarray
) -> None:
    (row,) = measure_fields(masks[:1] * (np.arange(224) < 112))
    least = bounds.bounds["right_area"][0]
    assert describe_lungs(row, bounds) == (
        "shows no two lungs like those of the training images "
        f"(area of the right field, as a share of the image: 0.000, bound {least:.3f})"
    )


def test_after_too_few_images_only_two_fields_at_all_are_asked_for(masks: np.ndarray) -> None:
    few = fit_bounds(measure_fields(masks[: MIN_IMAGES - 1]), "")
    assert refused(few, np.rot90(masks, 2, axes=(1, 2))) == refused(few, np.repeat(masks[:, 112:], 2, 1)) == 0
    assert refused(few, np.zeros_like(masks)) == refused(few, masks * (np.arange(224) < 112)) == 1
    assert fit_bounds(measure_fields(masks[:0]), "").bounds == few.bounds


def test_the_measures_of_an_image_do_not_depend_on_the_others_and_none_give_none(masks: np.ndarray) -> None:
    together = measure_fields(masks)
    np.testing.assert_array_equal(together[7:8], measure_fields(masks[7:8]))
    assert measure_fields(masks[:0]).shape == (0, len(MEASURES))


def test_bounds_that_were_saved_are_what_is_loaded(bounds: LungBounds, tmp_path: Path) -> None:
    save_bounds(bounds, tmp_path)
    assert load_bounds(tmp_path) == bounds
    assert load_bounds(tmp_path) != replace(bounds, n=1)


def test_a_missing_or_foreign_file_is_refused_by_name(bounds: LungBounds, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"bounds\.json is missing: run the prepare flow on this run folder first"):
        load_bounds(tmp_path)
    save_bounds(bounds, tmp_path)
    whole = json.loads((tmp_path / FILE).read_text())
    changes: list[dict[str, Any]] = [
        {"bounds": {"left_area": [0.1]}},
        {"bounds": {"left_area": ["a", "b"]}},
        {"bounds": {"left_area": [0.2, 0.1]}},
        {"bounds": {"left_area": [0.2, float("nan")]}},
        {"bounds": {"colour": [0, 1]}},
        {"bounds": {"left_area": None}},
        {"bounds": []},
        {"segmenter": 1},
    ]
    for change in changes:
        (tmp_path / FILE).write_text(json.dumps(whole | change))
        with pytest.raises(RunError, match=r"bounds\.json"):
            load_bounds(tmp_path)
