"""Calibration: probabilities come to mean what they say, and the order of answers stays."""

import numpy as np
import pandas as pd
import pytest

from tasks.measures import to_logit
from tasks.networks.classifier import answer, build_member, join_members
from tasks.pixels.borrowed_looks import LOOKS
from tasks.pixels.shifts import SHIFTS
from tasks.settings import TrainingSettings
from tasks.training.calibration import calibrate_model, fit_platt


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_logits_that_are_too_bold_are_brought_back() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 20_000)
    labels = (rng.uniform(0, 1, 20_000) < sigmoid(logits)).astype(float)
    slope, offset = fit_platt(3 * logits + 1, labels)
    assert slope == pytest.approx(1 / 3, abs=0.02)
    assert offset == pytest.approx(-1 / 3, abs=0.05)


def test_separate_classes_have_a_finite_slope() -> None:
    slope, offset = fit_platt(np.array([-3.0, -2.0, 2.0, 3.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert 0 < slope < 10
    assert np.isfinite(offset)


def test_a_slope_that_would_turn_the_order_round_is_not_taken_nor_one_of_a_single_class() -> None:
    logits = np.array([-3.0, -2.0, 2.0, 3.0])
    assert fit_platt(logits, np.array([1.0, 1.0, 0.0, 0.0])) == (1.0, 0.0)
    assert fit_platt(logits, np.ones(4)) == (1.0, 0.0)


def test_the_model_itself_answers_with_what_the_table_of_shifts_says() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 2
    packed = rng.integers(0, 80, (24, 224, 224), dtype=np.uint8)
    packed[labels == 1, 60:160, 60:160] += 90
    subtypes = [("normal", ("bacteria", "virus")[i // 2 % 2])[label] for i, label in enumerate(labels)]
    val = pd.DataFrame({"image_id": [f"{i:016x}" for i in range(24)], "label": labels, "subtype": subtypes})
    model = join_members(
        [build_member(TrainingSettings(side_px=32, width=4), seed, f"member_{seed}") for seed in (1, 2)]
    )
    before = answer(model, packed).probability
    masks = np.zeros_like(packed)
    masks[:, 60:160, 60:160] = 255
    shifts, facts = calibrate_model(model, val, packed, masks, 1)
    after = answer(model, packed)
    first = shifts[shifts["shift"] == "as it is"]
    np.testing.assert_allclose(after.probability, first["probability"], atol=1e-5)
    np.testing.assert_allclose(after.bacteria, first["bacteria"], atol=1e-5)
    np.testing.assert_allclose(
        to_logit(after.probability), facts["slope"] * to_logit(before) + facts["offset"], atol=1e-2
    )
    assert facts["slope"] > 0
    assert list(shifts.groupby("shift", sort=False).size().index) == [*SHIFTS, *LOOKS]
    assert len(shifts) == 24 * (len(SHIFTS) + len(LOOKS))
