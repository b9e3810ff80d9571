"""How far a map can be believed: alike seeds are stable, and only a map that the network follows beats chance."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from tasks.explaining.lime_quality import measure_faithfulness, measure_stability
from tasks.explaining.lime_sampling import CutImage

Network = Callable[[NDArray[np.float32]], NDArray[np.float64]]

# -- stability ---------------------------------------------------------------------------------------------------------


def draw_maps(n: int, n_pieces: int = 60) -> list[NDArray[np.float64]]:
    return list(np.random.default_rng(4).normal(size=(n, n_pieces)))


def test_identical_maps_correlate_fully_and_are_stable() -> None:
    (weights,) = draw_maps(1)
    found = measure_stability([weights, weights.copy(), 3 * weights])
    assert found == {"n_seeds": 3, "rank_correlation": 1.0, "top5_overlap": 1.0, "stable": True}


def test_unrelated_maps_are_unstable() -> None:
    found = measure_stability(draw_maps(5))
    assert abs(found["rank_correlation"]) < 0.2
    assert found["top5_overlap"] < 0.4
    assert found["stable"] is False


@pytest.mark.parametrize(("other", "correlation", "stable"), [([1, 2, 4, 3], 0.8, True), ([2, 1, 4, 3], 0.6, False)])
def test_maps_count_as_stable_from_a_rank_correlation_of_0_7_on(
    other: list[float], correlation: float, stable: bool
) -> None:
    found = measure_stability([np.array([1.0, 2.0, 3.0, 4.0]), np.array(other, float)])
    assert found["rank_correlation"] == correlation and found["stable"] is stable


def test_the_largest_pieces_are_compared_by_size_whatever_they_speak_for() -> None:
    weights = np.array([9.0, -8.0, 7.0, -6.0, 5.0, 0.4, 0.3, 0.2, 0.1, 0.0])
    opposite = measure_stability([weights, -weights])
    assert opposite["rank_correlation"] == -1 and opposite["top5_overlap"] == 1
    moved = weights.copy()
    moved[[0, 1, 8, 9]] = moved[[8, 9, 0, 1]]
    assert measure_stability([weights, moved])["top5_overlap"] == 0.6


def test_figures_are_means_over_pairs_of_maps() -> None:
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    found = measure_stability([weights, weights, weights[::-1]])
    assert found["rank_correlation"] == pytest.approx(-1 / 3, abs=1e-4)


def test_of_a_single_map_nobody_knows_whether_it_is_stable() -> None:
    found = measure_stability(draw_maps(1))
    assert found == {"n_seeds": 1, "rank_correlation": None, "top5_overlap": None, "stable": None}


def test_of_a_map_without_any_difference_nobody_knows_whether_it_is_stable() -> None:
    found = measure_stability([np.zeros(20), *draw_maps(1, 20)])
    assert found == {"n_seeds": 2, "rank_correlation": None, "top5_overlap": None, "stable": None}


# -- faithfulness ------------------------------------------------------------------------------------------------------


def make_image(n_wide: int) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """A noisy image of ``n_wide`` times ``n_wide`` square pieces, 4 px wide."""
    pieces = np.kron(np.arange(n_wide**2).reshape(n_wide, n_wide), np.ones((4, 4), int))
    return np.random.default_rng(2).random(pieces.shape).astype(np.float32), pieces


def additive(grey: NDArray[np.float32], pieces: NDArray[np.intp], effects: NDArray[np.float64], base: float) -> Network:
    """A network whose answer is ``base`` and the effects of the pieces that are shown, read from a pixel of each."""
    at = np.unique(pieces, return_index=True)[1]
    means = np.bincount(pieces.ravel(), weights=grey.ravel()) / np.bincount(pieces.ravel())
    gains = effects / (grey.ravel()[at] - means)

    def answer(copies: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.asarray(base + (copies.reshape(len(copies), -1)[:, at] - means) @ gains)

    return answer


def test_areas_and_curves_are_those_worked_out_by_hand() -> None:
    grey, pieces = make_image(2)
    effects = np.array([0.1, 0.4, 0.0, 0.2])
    found = measure_faithfulness(CutImage(grey, pieces), effects, additive(grey, pieces, effects, 0.2), 1, seed=0)
    assert found["hidden"] == [0, 0.25, 0.5, 0.75, 1]
    assert found["deletion_curve"] == pytest.approx([0.9, 0.5, 0.3, 0.2, 0.2], abs=1e-4)
    assert found["insertion_curve"] == pytest.approx([0.2, 0.6, 0.8, 0.9, 0.9], abs=1e-4)
    assert found["deletion"] == pytest.approx(0.3875, abs=1e-4)
    assert found["insertion"] == pytest.approx(0.7125, abs=1e-4)
    assert 0.3875 < found["random"] < 0.7125


def draw_case(decision: int) -> tuple[CutImage, NDArray[np.float64], Network]:
    """An image of 49 pieces, what each adds, and a network that adds them up; it calls the image ``decision``."""
    grey, pieces = make_image(7)
    effects = np.random.default_rng(8).normal(0.008 if decision else -0.008, 0.02, 49)
    return CutImage(grey, pieces), effects, additive(grey, pieces, effects, 0.5)


@pytest.mark.parametrize("decision", [0, 1])
def test_a_map_that_the_network_follows_beats_a_random_order_for_either_decision(decision: int) -> None:
    cut, effects, network = draw_case(decision)
    found = measure_faithfulness(cut, effects, network, decision, seed=3)
    assert found["deletion"] < found["random"] - 0.1
    assert found["insertion"] > found["random"] + 0.1


@pytest.mark.parametrize("decision", [0, 1])
def test_a_map_turned_upside_down_is_worse_than_a_random_order(decision: int) -> None:
    cut, effects, network = draw_case(decision)
    found = measure_faithfulness(cut, -effects, network, decision, seed=3)
    assert found["deletion"] > found["random"] + 0.1
    assert found["insertion"] < found["random"] - 0.1


@pytest.mark.parametrize("decision", [0, 1])
def test_curves_lead_from_the_answer_for_the_whole_image_to_that_for_none_of_it_and_back(decision: int) -> None:
    cut, effects, network = draw_case(decision)
    found = measure_faithfulness(cut, effects, network, decision, seed=3)
    whole, nothing = network(cut.show(np.array([[1] * 49, [0] * 49])))
    whole, nothing = (whole, nothing) if decision else (1 - whole, 1 - nothing)
    assert whole > 0.5 and abs(whole - nothing) > 0.2
    ends = [(found[f"{name}_curve"][0], found[f"{name}_curve"][-1]) for name in ("deletion", "random", "insertion")]
    expected = [(whole, nothing), (whole, nothing), (nothing, whole)]
    np.testing.assert_allclose(ends, expected, atol=1e-4)
    lengths = {len(found[name]) for name in ("hidden", "deletion_curve", "insertion_curve", "random_curve")}
    assert lengths == {18}  # 17, and both sides of the middle of an odd number of pieces
    assert found["hidden"][0] == 0 and found["hidden"][-1] == 1 and min(np.diff(found["hidden"])) > 0


def test_random_orders_follow_from_the_seed_alone() -> None:
    cut, effects, network = draw_case(1)
    first, again, other = (measure_faithfulness(cut, effects, network, 1, seed) for seed in (3, 3, 4))
    assert first == again
    assert first["random"] != other["random"] and first["deletion"] == other["deletion"]
