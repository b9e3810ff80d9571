"""Baselines find what can be found without a lung, and nothing else."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from tasks.explaining.baselines import (
    SAYS,
    Baseline,
    answer_by,
    ask_baselines,
    describe_grey,
    describe_ring,
    describe_size,
)

SIDE = 56
LABELS = [0, 1] * 20


def table(labels: list[int], **columns: Any) -> pd.DataFrame:
    n = len(labels)
    rows = pd.DataFrame({"label": pd.array(labels, dtype="Int8")})
    rows["has_device"] = pd.array(columns.get("has_device", [None] * n), dtype="boolean")
    rows["width_px"] = pd.array(columns.get("width_px", [100] * n), dtype="Int32")
    rows["height_px"] = pd.array(columns.get("height_px", [80] * n), dtype="Int32")
    return rows


def noise(n: int, seed: int) -> np.ndarray:
    """Grey noise of one mean and one spread, whatever the class."""
    images = np.random.default_rng(seed).normal(0, 1, (n, SIDE, SIDE))
    images = (images - images.mean((1, 2), keepdims=True)) / images.std((1, 2), keepdims=True)
    return np.clip(128 + 15 * images, 0, 255).astype(np.uint8)


def ask(train: pd.DataFrame, train_packed: np.ndarray, rows: pd.DataFrame, packed: np.ndarray) -> dict[str, Baseline]:
    found = ask_baselines(train, train_packed, rows, packed)
    assert list(found) == list(SAYS)
    for name, baseline in found.items():
        assert baseline.says == SAYS[name] and baseline.at.shape == (len(rows),)
        assert (baseline.answer is None) == bool(baseline.reason)
        if baseline.answer is not None:
            assert len(baseline.answer) == baseline.at.sum()
            assert np.isfinite(baseline.answer).all()
    return found


def auc(baseline: Baseline, rows: pd.DataFrame) -> float:
    assert baseline.answer is not None
    return float(roc_auc_score(rows["label"].to_numpy(int)[baseline.at], baseline.answer))


def plant_ring(packed: np.ndarray, labels: list[int]) -> np.ndarray:
    """The left edge brighter and the right edge darker for class 1, the other way round for class 0."""
    planted = packed.astype(int)
    for image, label in zip(planted, labels, strict=True):
        image[:, :4] += 20 if label else -20
        image[:, -4:] -= 20 if label else -20
    return planted.astype(np.uint8)


def test_a_class_in_the_ring_alone_is_found_by_the_ring_and_not_by_grey_or_size() -> None:
    rows = table(LABELS, width_px=[100, 100, 110, 110] * 10)
    found = ask(rows, plant_ring(noise(40, 1), LABELS), rows, plant_ring(noise(40, 2), LABELS))
    assert auc(found["ring"], rows) > 0.95
    assert auc(found["grey"], rows) < 0.75
    assert auc(found["size"], rows) == 0.5


def test_a_class_in_the_middle_alone_is_not_seen_in_the_ring() -> None:
    rows = table(LABELS)
    train, test = noise(40, 1), noise(40, 2)
    for packed in (train, test):
        packed[1::2, 12:-12, 12:-12] += 40
    found = ask(rows, train, rows, test)
    assert auc(found["ring"], rows) < 0.75
    assert auc(found["grey"], rows) > 0.95


def test_a_class_in_the_size_of_the_file_is_found_by_size() -> None:
    rng = np.random.default_rng(0)
    widths = [int(rng.normal(130 if label else 100, 5)) for label in LABELS]
    rows = table(LABELS, width_px=widths)
    found = ask(rows, noise(40, 1), rows, noise(40, 2))
    assert auc(found["size"], rows) > 0.95
    assert auc(found["ring"], rows) < 0.75


def test_the_device_baseline_answers_for_known_images_whether_one_is_seen() -> None:
    rows = table([0, 0, 0, 1, 1, 1], has_device=[False, True, None, True, True, False])
    found = ask(table(LABELS), noise(40, 1), rows, noise(6, 2))["device"]
    assert found.at.tolist() == [True, True, False, True, True, True]
    assert found.answer is not None and found.answer.tolist() == [0, 1, 1, 1, 0]
    # Pairs of (normal, pneumonia): 0 against 1, 1, 0 and 1 against 1, 1, 0; ties count half.
    assert auc(found, rows) == pytest.approx((1 + 1 + 0.5 + 0.5 + 0.5 + 0) / 6)


@pytest.mark.parametrize("device", [True, False])
def test_where_all_or_none_show_a_device_its_baseline_says_so(device: bool) -> None:
    rows = table([0, 1, 1], has_device=[device, device, None])
    assert "alike" in ask(table(LABELS), noise(40, 1), rows, noise(3, 2))["device"].reason


def test_unscreened_images_have_no_device_baseline() -> None:
    rows = table([0, 1])
    assert ask(table(LABELS), noise(40, 1), rows, noise(2, 2))["device"].reason == "no image was screened"


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0]])
def test_one_class_in_training_teaches_no_baseline(labels: list[int]) -> None:
    rows = table([0, 1], has_device=[False, True])
    found = ask(table(labels), noise(3, 1)[: len(labels)], rows, noise(2, 2))
    assert {found[name].reason for name in ("ring", "grey", "size")} == {"training has one class only"}
    assert found["device"].answer is not None


def test_training_images_that_are_all_alike_teach_no_baseline() -> None:
    rows = table([0, 1], has_device=[False, True])
    found = ask(table(LABELS), np.full((40, SIDE, SIDE), 90, np.uint8), rows, noise(2, 2))
    assert {found[name].reason for name in ("ring", "grey", "size")} == {"all training images are alike in it"}


def test_features_have_their_shapes_and_ranges() -> None:
    packed = np.zeros((2, 224, 224), np.uint8)
    packed[0] = 255
    packed[1, 24:-24, 24:-24] = 255
    ring = describe_ring(packed)
    assert ring.shape == (2, 300)
    assert (ring[0] == 1).all() and not ring[1].any()
    share = (176 / 224) ** 2
    assert describe_grey(packed) == pytest.approx(np.array([[1, 0], [share, np.sqrt(share * (1 - share))]]))
    rows = table([0], width_px=[300], height_px=[200])
    assert describe_size(rows).tolist() == [[300, 200, 1.5]]


def test_a_rare_class_is_weighed_up() -> None:
    features = np.arange(20, dtype=float)[:, None]
    labels = np.array([0] * 17 + [1] * 3)
    assert answer_by(features, labels, np.array([[18.0]]))[0] > 0.5
