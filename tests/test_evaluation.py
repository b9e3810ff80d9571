"""Measures are right, intervals are over patients, and what cannot be measured says why."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from tasks.evaluation import GROUPS, choose_threshold, describe_group, evaluated_rows, measure, metrics_rows
from tasks.measures import MEASURES, confusion, format_value, measure_group, weighted_measures


def predictions(n: int = 60, seed: int = 0, splits: tuple[str, ...] = ("val", "test")) -> pd.DataFrame:
    """Rows as evaluated: each patient has three images, some with a device, some not screened."""
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame({"split": [split for split in splits for _ in range(n)]})
    rows["label"] = rng.integers(0, 2, len(rows))
    rows["patient_id"] = [f"p{i // 3}" for i in range(len(rows))]
    rows["subtype"] = [("normal", ("bacteria", "virus")[i % 2])[label] for i, label in enumerate(rows["label"])]
    rows["has_device"] = pd.array([(True, False, None)[k] for k in rng.integers(0, 3, len(rows))], dtype="boolean")
    rows["probability"] = np.clip(rows["label"] * 0.3 + rng.uniform(0, 0.7, len(rows)), 0, 1)
    return rows


def arrays(labels: list[int], probabilities: list[float]) -> tuple[Any, Any]:
    return np.array(labels, float), np.array(probabilities, float)


def group(labels: list[int], probabilities: list[float], patients: list[str] | None = None, **more: Any) -> Any:
    rows = pd.DataFrame({"label": labels, "probability": probabilities})
    rows["patient_id"] = patients or [str(i) for i in range(len(rows))]
    return measure_group(rows, 0.5, more.get("n_bootstrap", 200), more.get("seed", 1))


# -- measures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [8, 1])
@pytest.mark.parametrize("seed", range(3))
def test_measures_equal_scikit_learn_s_with_ties_and_weights(seed: int, decimals: int) -> None:
    rng = np.random.default_rng(seed)
    labels, probabilities = rng.integers(0, 2, 80).astype(float), rng.random(80).round(decimals)
    weights = rng.integers(0, 4, (5, 80)).astype(float)
    found = weighted_measures(labels, probabilities, 0.5, weights)
    called = probabilities >= 0.5
    for i, weight in enumerate(weights):
        assert found["auc"][i] == pytest.approx(roc_auc_score(labels, probabilities, sample_weight=weight))
        assert found["accuracy"][i] == pytest.approx(accuracy_score(labels, called, sample_weight=weight))
        assert found["sensitivity"][i] == pytest.approx(recall_score(labels, called, sample_weight=weight))
        assert found["specificity"][i] == pytest.approx(recall_score(1 - labels, ~called, sample_weight=weight))


def test_equal_probabilities_have_an_auc_of_one_half() -> None:
    labels, probabilities = arrays([0, 1, 1], [0.5, 0.5, 0.5])
    assert weighted_measures(labels, probabilities, 0.5, np.ones((1, 3)))["auc"].tolist() == [0.5]


def test_a_probability_at_the_threshold_is_called_pneumonia() -> None:
    labels, probabilities = arrays([0, 0, 1, 1, 1], [0.4, 0.5, 0.5, 0.6, 0.1])
    assert confusion(labels, probabilities, 0.5) == {"tp": 2, "fp": 1, "tn": 1, "fn": 1}
    assert weighted_measures(labels, probabilities, 0.5, np.ones((1, 5)))["sensitivity"][0] == pytest.approx(2 / 3)


# -- the threshold -----------------------------------------------------------------------------------------------------


def test_between_two_separate_classes_the_threshold_is_in_the_middle_in_logits() -> None:
    assert choose_threshold(*arrays([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])) == pytest.approx(0.5)
    low = choose_threshold(*arrays([0, 1], [0.001, 0.5]))
    assert np.log(low / (1 - low)) == pytest.approx((np.log(0.001 / 0.999) + 0) / 2)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_has_a_higher_sum_of_sensitivity_and_specificity(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.array([0, 1, *rng.integers(0, 2, 10)], float)
    probabilities = rng.random(12).round(1 if seed % 2 else 6)

    def youden(threshold: float) -> float:
        called = probabilities >= threshold
        return float(called[labels == 1].mean() + (~called)[labels == 0].mean())

    values = np.unique(probabilities)
    best = max(youden(cut) for cut in (values[1:] + values[:-1]) / 2)
    assert youden(choose_threshold(labels, probabilities)) == pytest.approx(best)


def test_of_two_equally_good_cuts_apart_from_each_other_one_is_taken_and_nothing_between() -> None:
    threshold = choose_threshold(*arrays([0, 1, 0, 1], [0.1, 0.4, 0.6, 0.7]))
    assert 0.1 < threshold < 0.4


def test_probabilities_of_exactly_0_and_1_and_a_constant_network_have_a_threshold() -> None:
    assert choose_threshold(*arrays([0, 1], [0.0, 1.0])) == pytest.approx(0.5)
    assert choose_threshold(*arrays([0, 1, 1], [0.7, 0.7, 0.7])) == pytest.approx(0.7)


def test_the_threshold_is_chosen_on_validation_alone() -> None:
    table = predictions()
    other = table.copy()
    other.loc[other["split"] == "test", "probability"] = 0.01
    first, second = (measure(t, ("val", "test"), 20, 1) for t in (table, other))
    assert first["threshold"] == second["threshold"]
    assert first["val"] == second["val"]
    assert first["test"] != second["test"]


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_an_interval_holds_its_value_and_a_seed_gives_it_again() -> None:
    rows = predictions(200)
    first, again, other = (measure_group(rows, 0.5, 300, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    for name in MEASURES:
        assert first[name]["low"] < first[name]["value"] < first[name]["high"]


def test_the_bootstrap_draws_patients_and_not_images() -> None:
    labels, probabilities = [0, 1] * 20, [0.2, 0.8, 0.7, 0.3] * 10
    alone = group(labels * 10, probabilities * 10)
    same = group(labels * 10, probabilities * 10, [str(i) for i in range(40)] * 10)
    few = group(labels, probabilities)
    assert (alone["n"], alone["n_patients"], same["n_patients"]) == (400, 400, 40)
    assert same["auc"]["value"] == alone["auc"]["value"]
    assert (same["auc"]["low"], same["auc"]["high"]) == (few["auc"]["low"], few["auc"]["high"])
    assert alone["auc"]["high"] - alone["auc"]["low"] < (same["auc"]["high"] - same["auc"]["low"]) / 2


def test_a_single_patient_has_an_interval_without_width() -> None:
    one = group([0, 1, 1], [0.2, 0.8, 0.3], ["a", "a", "a"])
    assert one["accuracy"] == {"value": 0.6667, "low": 0.6667, "high": 0.6667}


def test_a_measure_that_needs_a_missing_class_is_none_with_a_reason() -> None:
    ill = group([1, 1, 1], [0.2, 0.8, 0.9])
    nothing = {"value": None, "low": None, "high": None, "reason": "a class is missing in this group"}
    assert ill["auc"] == ill["specificity"] == nothing
    assert ill["sensitivity"]["value"] == ill["accuracy"]["value"] == 0.6667
    assert ill["confusion"] == {"tp": 2, "fp": 0, "tn": 0, "fn": 1}


# -- groups ------------------------------------------------------------------------------------------------------------


def test_every_group_has_measures_or_n_0_and_a_reason() -> None:
    metrics = measure(predictions(), ("val", "test"), 20, 1)
    assert set(metrics) == {"threshold", "subtypes", *GROUPS}
    for name in GROUPS:
        assert set(metrics[name]) == {"n", "n_patients", "confusion", *MEASURES}
    assert sum(metrics[name]["n"] for name in ("test_device_free", "test_with_device")) < metrics["test"]["n"] == 60


def test_device_groups_hold_exactly_the_images_that_are_known_to_be_so() -> None:
    table = predictions()
    metrics = measure(table, ("val", "test"), 20, 1)
    test = table[table["split"] == "test"]
    assert metrics["test_device_free"]["n"] == int((test["has_device"] == False).sum())  # noqa: E712
    assert metrics["test_with_device"]["n"] == int((test["has_device"] == True).sum())  # noqa: E712


def test_without_screening_device_groups_are_empty_and_say_so() -> None:
    table = predictions()
    table["has_device"] = pd.array([pd.NA] * len(table), dtype="boolean")
    metrics = measure(table, ("val", "test"), 20, 1)
    for name in ("test_device_free", "test_with_device", "val_device_free", "val_with_device"):
        assert metrics[name] == {"n": 0, "reason": "no image was screened"}


def test_where_no_image_shows_a_device_that_group_is_empty_and_says_so() -> None:
    table = predictions()
    table["has_device"] = pd.array([False] * len(table), dtype="boolean")
    metrics = measure(table, ("val", "test"), 20, 1)
    assert metrics["test_with_device"] == {"n": 0, "reason": "no image is in this group"}
    assert metrics["test_device_free"]["n"] == 60


def test_a_source_without_test_images_says_so() -> None:
    metrics = measure(predictions(splits=("val",)), ("val", "test"), 20, 1)
    assert metrics["test"] == metrics["test_device_free"] == {"n": 0, "reason": "no image is in the test split"}


def test_a_split_that_is_left_out_is_in_no_group_and_no_subtype() -> None:
    metrics = measure(predictions(), ("val",), 20, 1)
    for name in ("test", "test_device_free", "test_with_device"):
        assert metrics[name] == {"n": 0, "reason": "evaluation.splits leaves test out"}
    assert list(metrics["subtypes"]) == ["val"]
    assert metrics["val"]["n"] == 60


def test_sensitivity_is_told_by_subtype() -> None:
    table = predictions()
    metrics = measure(table, ("val", "test"), 20, 1)
    for split in ("val", "test"):
        for subtype in ("bacteria", "virus"):
            rows = table[(table["split"] == split) & (table["subtype"] == subtype)]
            found = metrics["subtypes"][split][subtype]
            assert set(found) == {"n", "n_patients", "confusion", "sensitivity"}
            right = (rows["probability"] >= metrics["threshold"]).mean()
            assert (found["n"], found["sensitivity"]["value"]) == (len(rows), round(right, 4))


def test_a_subtype_that_does_not_occur_says_so() -> None:
    metrics = measure(predictions().assign(subtype="unknown"), ("val",), 20, 1)
    assert metrics["subtypes"]["val"]["virus"] == {"n": 0, "reason": "no image is in this group"}


# -- rows --------------------------------------------------------------------------------------------------------------


def rows_of(splits: tuple[str, ...]) -> list[str]:
    manifest = pd.DataFrame(
        [
            ("train/a", "train", ""),
            ("val/a", "val", ""),
            ("val/copy", "val", "duplicate of val/a"),
            ("val/broken", "val", "undecodable: x"),
            ("test/a", "test", ""),
            ("test/broken", "test", "undecodable: x"),
        ],
        columns=["path", "split", "excluded"],
    ).astype("string")
    return list(evaluated_rows(manifest, splits)["path"])


def test_val_is_evaluated_without_what_is_excluded_and_test_without_what_has_no_pixels() -> None:
    assert rows_of(("val", "test")) == ["val/a", "test/a"]


def test_val_alone_leaves_test_unread_and_test_alone_reads_val_for_the_threshold() -> None:
    assert rows_of(("val",)) == ["val/a"]
    assert rows_of(("test",)) == ["val/a", "test/a"]


# -- words -------------------------------------------------------------------------------------------------------------


def test_a_group_is_told_in_one_line_measured_or_not() -> None:
    value = {"value": 0.9731, "low": 0.9612, "high": 0.98449}
    assert format_value(value) == "0.973 (0.961 to 0.984)"
    assert format_value({"value": None, "low": None, "high": None, "reason": "why"}) == "none (why)"
    assert describe_group("val", {"n": 1234, "auc": value}) == "val (1,234 images): auc 0.973 (0.961 to 0.984)"
    assert describe_group("val", {"n": 0, "reason": "why"}) == "val: not measured, why"


def test_the_table_for_people_has_a_row_per_group() -> None:
    rows = metrics_rows(measure(predictions(), ("val",), 20, 1))
    assert [row["group"] for row in rows] == list(GROUPS)
    assert rows[1] == {"group": "test", "images": 0, "auc": "not measured: evaluation.splits leaves test out"}
