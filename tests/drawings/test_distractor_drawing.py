"""The things on an X-ray that are no devices, and where they may lie."""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.ndimage import white_tophat

from tasks.drawings.distractors import DISTRACTORS, draw_distractors

SOFT = ("bone", "clavicle_end", "gas", "skin_fold", "cloth_fold", "hand")


def grey(height: int = 224, width: int = 256, level: float = 0.45) -> np.ndarray:
    return np.full((height, width, 1), level, np.float32)


def change(kind: str, seed: int, shape: tuple[int, int] = (224, 256)) -> np.ndarray:
    return (draw_distractors(grey(*shape), np.random.default_rng(seed), [kind]) - grey(*shape))[:, :, 0]


@pytest.mark.parametrize("shape", [(64, 64), (150, 97), (224, 224), (700, 900)])
@pytest.mark.parametrize("kind", DISTRACTORS)
def test_each_kind_shows_at_any_size_and_leaves_most_of_the_picture_alone(kind: str, shape: tuple[int, int]) -> None:
    for seed in range(12):
        drawn = np.abs(change(kind, seed, shape))
        assert drawn.shape == shape and drawn.max() > 0.03, seed
        assert (drawn > 0.02).mean() < 0.5, seed


def test_each_kind_lies_where_it_belongs() -> None:
    for seed in range(40):
        touched = {kind: np.argwhere(np.abs(change(kind, seed)) > 0.01) / (224, 256) for kind in DISTRACTORS}
        assert touched["clavicle_end"][:, 0].max() < 0.33, seed
        assert touched["gas"][:, 0].min() > 0.62, seed
        for kind, reach in {"collimation": 0.2, "text": 0.35, "hand": 0.5}.items():
            to_edge = np.minimum(touched[kind], 1 - touched[kind]).min(axis=1)
            assert to_edge.max() < reach, (kind, seed)
            assert to_edge.min() < 0.06, (kind, seed)
        assert np.ptp(touched["side_letter"], axis=0).max() < 0.2, seed


def test_gas_is_darker_than_what_is_around_it_and_bones_are_brighter() -> None:
    for seed in range(20):
        assert change("gas", seed).sum() < 0
        assert change("bone", seed).min() >= -1e-6 and change("cloth_fold", seed).min() >= -1e-6


@pytest.mark.parametrize("kind", SOFT)
def test_no_soft_kind_leaves_a_line_as_thin_and_bright_as_a_wire(kind: str) -> None:
    for seed in range(20):
        assert white_tophat(change(kind, seed, (256, 256)), size=4).max() < 0.1, seed


def test_a_skin_fold_is_a_step_and_not_a_line() -> None:
    for seed in range(20):
        drawn = change("skin_fold", seed, (256, 256))
        assert white_tophat(drawn, size=4).max() < 0.6 * drawn.max(), seed


def test_the_same_seed_draws_the_same_bytes_and_another_seed_something_else() -> None:
    first, second, other = (draw_distractors(grey(), np.random.default_rng(seed)) for seed in (4, 4, 5))
    assert first.tobytes() == second.tobytes() != other.tobytes()


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_the_image_stays_in_range_and_the_input_is_not_modified(level: float) -> None:
    image = grey(level=level)
    for kinds in (None, DISTRACTORS):
        drawn = draw_distractors(image, np.random.default_rng(1), kinds)
        assert drawn.dtype == np.float32 and drawn.shape == image.shape
        assert drawn.min() >= 0.0 and drawn.max() <= 1.0
    assert np.array_equal(image, grey(level=level))


def test_anatomy_stays_visible_through_a_hand() -> None:
    image = np.clip(grey() + np.random.default_rng(5).normal(0, 0.05, (224, 256, 1)), 0, 1).astype(np.float32)
    drawn = draw_distractors(image, np.random.default_rng(2), ["hand"])
    here = np.abs(drawn - image) > 0.02
    assert np.corrcoef(drawn[here], image[here])[0, 1] > 0.3


def test_no_kinds_leave_the_image_as_it_is() -> None:
    assert np.array_equal(draw_distractors(grey(), np.random.default_rng(0), []), grey())


@pytest.mark.parametrize(
    ("image", "kinds", "named"),
    [
        (grey(), ["hand", "toy"], "toy"),
        (grey()[:, :, 0], None, r"\(224, 256\)"),
        (grey(40, 80), None, r"\(40, 80, 1\)"),
        (np.zeros((80, 80, 1), np.uint8), None, "uint8"),
    ],
)
def test_wrong_input_is_refused_by_name(image: np.ndarray, kinds: Sequence[str] | None, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        draw_distractors(image, np.random.default_rng(0), kinds)
