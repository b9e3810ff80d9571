"""Measures are right, intervals are over patients, and what cannot be measured says why."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from tasks.findings import MeasuredGroup, Metrics
from tasks.measures import (
    MEASURES,
    confusion,
    format_value,
    measure_calibration,
    measure_group,
    weighted_measures,
)
from tasks.records import Facts
from tasks.settings import EvaluationSettings
from tasks.training.evaluation import (
    GROUPS,
    evaluated_rows,
    measure,
    measure_bacteria,
    measure_border,
    measure_lungs,
    measure_members,
    metrics_rows,
    say_group,
)


def predictions(n: int = 60, seed: int = 0, splits: tuple[str, ...] = ("val", "test")) -> pd.DataFrame:
    """Rows as evaluated: each patient has three images, some with a device, some not screened."""
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame({"split": [split for split in splits for _ in range(n)]})
    rows["label"] = rng.integers(0, 2, len(rows))
    rows["group_id"] = [f"p{i // 3}" for i in range(len(rows))]
    rows["subtype"] = [("normal", ("bacteria", "virus")[i % 2])[label] for i, label in enumerate(rows["label"])]
    rows["has_device"] = pd.array([(True, False, None)[k] for k in rng.integers(0, 3, len(rows))], dtype="boolean")
    rows["probability"] = np.clip(rows["label"] * 0.3 + rng.uniform(0, 0.7, len(rows)), 0, 1)
    rows["bacteria"] = rng.uniform(0, 1, len(rows))
    return rows


def shifted(n: int = 60, seed: int = 5) -> pd.DataFrame:
    """Validation under two shifts, as ``shifts.csv`` holds it."""
    rows = predictions(n, seed, ("as it is", "darker")).rename(columns={"split": "shift"})
    return rows.assign(image_id=[f"i{i % n}" for i in range(len(rows))])[
        ["shift", "image_id", "group_id", "label", "subtype", "probability", "bacteria"]
    ]


def measured(table: pd.DataFrame, splits: tuple[str, ...], shifts: pd.DataFrame | None = None) -> Facts:
    """``measure`` with few draws."""
    settings = EvaluationSettings(splits=splits, n_bootstrap=20)  # type: ignore[arg-type]
    return measure(table, shifted() if shifts is None else shifts, settings, 1)


def arrays(labels: list[int], probabilities: list[float]) -> tuple[Any, Any]:
    return np.array(labels, float), np.array(probabilities, float)


def group(labels: list[int], probabilities: list[float], patients: list[str] | None = None, **more: Any) -> Any:
    rows = pd.DataFrame({"label": labels, "probability": probabilities})
    rows["group_id"] = patients or [str(i) for i in range(len(rows))]
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
    metrics = measured(predictions(), ("val", "test"))
    others = {"threshold", "subtypes", "calibration", "bacteria", "operating_points", "shifts"}
    assert set(metrics) == {*others, *GROUPS}
    for name in GROUPS:
        assert set(metrics[name]) == {"n", "n_patients", "confusion", *MEASURES}
    assert sum(metrics[name]["n"] for name in ("test_device_free", "test_with_device")) < metrics["test"]["n"] == 60


def test_device_groups_hold_exactly_the_images_that_are_known_to_be_so() -> None:
    table = predictions()
    metrics = measured(table, ("val", "test"))
    test = table[table["split"] == "test"]
    assert metrics["test_device_free"]["n"] == int((test["has_device"] == False).sum())  # noqa: E712
    assert metrics["test_with_device"]["n"] == int((test["has_device"] == True).sum())  # noqa: E712


def test_without_screening_device_groups_are_empty_and_say_so() -> None:
    table = predictions()
    table["has_device"] = pd.array([pd.NA] * len(table), dtype="boolean")
    metrics = measured(table, ("val", "test"))
    for name in ("test_device_free", "test_with_device", "val_device_free", "val_with_device"):
        assert metrics[name] == {"n": 0, "reason": "no image was screened"}


def test_where_no_image_shows_a_device_that_group_is_empty_and_says_so() -> None:
    table = predictions()
    table["has_device"] = pd.array([False] * len(table), dtype="boolean")
    metrics = measured(table, ("val", "test"))
    assert metrics["test_with_device"] == {"n": 0, "reason": "no image is in this group"}
    assert metrics["test_device_free"]["n"] == 60


def test_a_source_without_test_images_says_so() -> None:
    metrics = measured(predictions(splits=("val",)), ("val", "test"))
    assert metrics["test"] == metrics["test_device_free"] == {"n": 0, "reason": "no image is in the test split"}


def test_a_split_that_is_left_out_is_in_no_group_and_no_subtype() -> None:
    metrics = measured(predictions(), ("val",))
    for name in ("test", "test_device_free", "test_with_device"):
        assert metrics[name] == {"n": 0, "reason": "evaluation.splits leaves test out"}
    assert list(metrics["subtypes"]) == ["val"]
    assert metrics["val"]["n"] == 60


def test_sensitivity_is_told_by_subtype() -> None:
    table = predictions()
    metrics = measured(table, ("val", "test"))
    for split in ("val", "test"):
        for subtype in ("bacteria", "virus"):
            rows = table[(table["split"] == split) & (table["subtype"] == subtype)]
            found = metrics["subtypes"][split][subtype]
            assert set(found) == {"n", "n_patients", "confusion", "sensitivity"}
            right = (rows["probability"] >= metrics["threshold"]).mean()
            assert (found["n"], found["sensitivity"]["value"]) == (len(rows), round(right, 4))


def test_a_subtype_that_does_not_occur_says_so() -> None:
    metrics = measured(predictions().assign(subtype="unknown"), ("val",))
    assert metrics["subtypes"]["val"]["virus"] == {"n": 0, "reason": "no image is in this group"}


# -- thresholds --------------------------------------------------------------------------------------------------------


def test_the_thresholds_are_chosen_on_validation_and_its_shifts_alone() -> None:
    table, shifts = predictions(), shifted()
    other = table.assign(probability=0.01)
    first, second = (measured(t, ("val", "test"), shifts) for t in (table, other))
    assert first["threshold"] == second["threshold"]
    assert (
        first["operating_points"]["high_sensitivity"]["threshold"]
        == (second["operating_points"]["high_sensitivity"]["threshold"])
    )
    moved = shifts.assign(probability=shifts["probability"] + 0.3 * (shifts["shift"] == "darker"))
    assert measured(table, ("val", "test"), moved)["threshold"] != first["threshold"]


def test_both_operating_points_are_measured_on_each_split() -> None:
    table = predictions()
    metrics = measured(table, ("val", "test"))
    for name, point in metrics["operating_points"].items():
        for split in ("val", "test"):
            rows = table[table["split"] == split]
            called = rows["probability"] >= point["threshold"]
            assert point[split]["sensitivity"]["value"] == pytest.approx(called[rows["label"] == 1].mean(), abs=1e-4)
            assert point[split]["specificity"]["value"] == pytest.approx((~called)[rows["label"] == 0].mean(), abs=1e-4)
        assert set(point) == {"threshold", *GROUPS}, name
    assert metrics["operating_points"]["balanced"]["threshold"] == metrics["threshold"]


# -- calibration, border, members, subtypes ----------------------------------------------------------------------------


def test_a_network_that_means_what_it_says_has_no_calibration_error_and_a_bold_one_has() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(0, 1, 20_000)
    rows = pd.DataFrame({"label": (rng.uniform(0, 1, 20_000) < truth).astype(int), "group_id": range(20_000)})
    honest = measure_calibration(rows.assign(probability=truth), 20, 1)
    bold = measure_calibration(rows.assign(probability=np.where(truth > 0.5, 0.95, 0.05)), 20, 1)
    assert honest["ece"]["value"] < 0.015
    assert bold["ece"]["value"] == pytest.approx(0.2, abs=0.02)
    assert [b["n"] for b in bold["bins"]].count(0) == 8
    assert sum(b["n"] for b in honest["bins"]) == honest["n"] == 20_000
    for b in honest["bins"]:
        assert b["from"] <= b["mean_probability"] <= b["to"]


def test_the_expected_calibration_error_weighs_bins_by_their_images() -> None:
    rows = pd.DataFrame({"label": [1, 1, 1, 0], "probability": [0.95, 0.95, 0.95, 0.45], "group_id": list("abcd")})
    assert measure_calibration(rows, 20, 1)["ece"]["value"] == pytest.approx((3 * 0.05 + 0.45) / 4)


def test_the_border_test_gives_both_aucs_and_what_leaving_it_out_costs() -> None:
    rows = pd.DataFrame({"label": [0, 0, 1, 1], "probability": [0.1, 0.2, 0.8, 0.9], "group_id": list("abcd")})
    settings = EvaluationSettings(n_bootstrap=50)
    only, removed = np.array([0.4, 0.4, 0.4, 0.4]), np.array([0.1, 0.6, 0.5, 0.9])
    found = measure_border(rows, only, removed, settings, 1)
    assert [found[name]["value"] for name in ("border_only", "border_removed", "border_loss")] == [0.5, 0.75, 0.25]
    nothing = measure_border(rows[:0], only[:0], removed[:0], settings, 1)
    assert nothing["border_only"] == {"value": None, "low": None, "high": None, "reason": "no image is in this group"}


def test_with_nothing_but_the_lungs_and_without_them_there_is_an_auc_with_its_images_or_a_reason() -> None:
    rows = pd.DataFrame({"label": [0, 0, 1, 1], "group_id": list("abcd")})
    settings = EvaluationSettings(n_bootstrap=50)
    only, removed = np.array([0.1, 0.6, 0.5, 0.9]), np.array([0.4, 0.4, 0.4, 0.4])
    found = measure_lungs(rows, only, removed, settings, 1)
    assert [(one["value"], one["n"]) for one in found.values()] == [(0.75, 4), (0.5, 4)]
    assert list(found) == ["lungs_only", "lungs_removed"] and set(found) <= set(Metrics.model_fields)
    nothing = measure_lungs(rows[:0], only[:0], removed[:0], settings, 1)["lungs_only"]
    assert nothing["value"] is None and nothing["reason"] == "no lungs are found in these images"


def test_each_member_is_measured_alone_with_mean_and_spread() -> None:
    rows = pd.DataFrame({"label": [0, 0, 1, 1]})
    members = np.array([[0.1, 0.9], [0.2, 0.2], [0.8, 0.8], [0.9, 0.9]])
    found = measure_members(rows, members, 0.5)
    assert found["accuracy"] == {"values": [1.0, 0.75], "mean": 0.875, "deviation": 0.1768}
    assert found["auc"]["values"] == [1.0, 0.625]
    assert measure_members(rows, members[:, :1], 0.5)["accuracy"]["deviation"] == 0.0
    assert measure_members(rows[:2], members[:2], 0.5)["auc"]["mean"] is None


def test_bacteria_are_measured_among_pneumonia_images_of_known_subtype() -> None:
    subtypes, bacteria = ["normal", "bacteria", "virus", "unknown", "bacteria"], [0.9, 0.8, 0.3, 0.1, 0.4]
    rows = pd.DataFrame(
        {"label": [0, 1, 1, 1, 1], "subtype": subtypes, "bacteria": bacteria, "group_id": list("abcde")}
    )
    found = measure_bacteria(rows, 20, 1)
    assert found["n"] == 3
    assert found["auc"]["value"] == 1.0
    assert found["sensitivity"]["value"] == 0.5
    assert measure_bacteria(rows.assign(subtype="unknown"), 20, 1) == {"n": 0, "reason": "no image is in this group"}


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


def test_a_split_that_is_left_out_is_not_read() -> None:
    assert rows_of(("val",)) == ["val/a"]
    assert rows_of(("test",)) == ["test/a"]


# -- words -------------------------------------------------------------------------------------------------------------


def test_a_group_is_told_in_one_line_measured_or_not() -> None:
    value = {"value": 0.9731, "low": 0.9612, "high": 0.98449}
    assert format_value(value) == "0.973 (0.961 to 0.984)"
    assert format_value({"value": None, "low": None, "high": None, "reason": "why"}) == "none (why)"
    assert say_group("val", MeasuredGroup(n=1234, auc=value)) == "val (1,234 images): auc 0.973 (0.961 to 0.984)"
    assert say_group("val", MeasuredGroup(n=0, reason="why")) == "val: not measured, why"


def test_the_table_for_people_has_a_row_per_group() -> None:
    rows = metrics_rows(Metrics(**measured(predictions(), ("val",))))
    assert [row["group"] for row in rows] == list(GROUPS)
    assert rows[1] == {"group": "test", "images": 0, "auc": "not measured: evaluation.splits leaves test out"}


def test_groups_of_the_settings_are_measured_each_and_unknown_is_one() -> None:
    table = predictions()
    table["by_site"] = pd.array([("a", "b", None)[i % 3] for i in range(len(table))], dtype="string")
    found = measured(table, ("val", "test"))
    assert {split: list(groups["site"]) for split, groups in found["by_group"].items()} == {
        "val": ["a", "b", "unknown"],
        "test": ["a", "b", "unknown"],
    }
    rows = table[(table["split"] == "test") & (table["by_site"] == "a")]
    assert found["by_group"]["test"]["site"]["a"] == measure_group(rows, found["threshold"], 20, 1)
    assert "by_group" not in measured(predictions(), ("val", "test"))
