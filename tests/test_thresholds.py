"""Thresholds: as good as any other cut, and the sensitive one keeps its promise under every shift."""

import numpy as np
import pandas as pd
import pytest

from tasks.measures import choose_sensitive_threshold, choose_threshold


def choose(labels: list[int], probabilities: list[float]) -> float:
    """The threshold where there is one condition only."""
    return choose_threshold(np.array(labels, float), np.array(probabilities, float), ["as it is"] * len(labels))


def test_between_two_separate_classes_the_threshold_is_in_the_middle_in_logits() -> None:
    assert choose([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9]) == pytest.approx(0.5)
    low = choose([0, 1], [0.001, 0.5])
    assert np.log(low / (1 - low)) == pytest.approx((np.log(0.001 / 0.999) + 0) / 2)


@pytest.mark.parametrize("seed", range(20))
def test_with_no_other_cut_do_sensitivity_and_specificity_hold_better_where_they_are_worst(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.array([0, 1, 0, 1, *rng.integers(0, 2, 10)], float)
    conditions = np.array(["as it is", "as it is", "darker", "darker", *rng.choice(["as it is", "darker"], 10)])
    probabilities = rng.random(14).round(1 if seed % 2 else 6)

    def worst(threshold: float) -> float:
        right = (probabilities >= threshold) == (labels == 1)
        return min(
            float(right[(labels == label) & (conditions == name)].mean())
            for label in (0, 1)
            for name in ("as it is", "darker")
        )

    values = np.unique(probabilities)
    best = max(worst(cut) for cut in (values[1:] + values[:-1]) / 2)
    assert worst(choose_threshold(labels, probabilities, list(conditions))) == pytest.approx(best)


def test_of_two_equally_good_cuts_apart_from_each_other_one_is_taken_and_nothing_between() -> None:
    assert 0.1 < choose([0, 1, 0, 1], [0.1, 0.4, 0.6, 0.7]) < 0.4


def test_probabilities_of_exactly_0_and_1_and_a_constant_network_have_a_threshold() -> None:
    assert choose([0, 1], [0.0, 1.0]) == pytest.approx(0.5)
    assert choose([0, 1, 1], [0.7, 0.7, 0.7]) == pytest.approx(0.7)


@pytest.mark.parametrize("seed", range(10))
def test_the_sensitive_threshold_is_the_highest_that_keeps_the_sensitivity_under_each_shift(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([[0, 1], rng.integers(0, 2, 60)])
    shifts = pd.concat(
        pd.DataFrame({"shift": name, "label": labels, "probability": np.clip(labels * lift + rng.random(62), 0, 1)})
        for name, lift in (("as it is", 0.4), ("darker", 0.1))
    )
    found = choose_sensitive_threshold(shifts, 0.9, 0.99)

    def lowest_sensitivity(threshold: float) -> float:
        ill = shifts[shifts["label"] == 1]
        return float((ill["probability"] >= threshold).groupby(ill["shift"]).mean().min())

    assert lowest_sensitivity(found) >= 0.9
    assert lowest_sensitivity(found + 2e-6) < 0.9


def test_the_sensitive_threshold_is_never_above_the_balanced_one() -> None:
    shifts = pd.DataFrame({"shift": "as it is", "label": [0, 1, 1], "probability": [0.1, 0.8, 0.9]})
    assert choose_sensitive_threshold(shifts, 0.95, 0.3) == 0.3
    assert choose_sensitive_threshold(shifts[:1], 0.95, 0.3) == 0.3, "no pneumonia image, nothing to keep"
