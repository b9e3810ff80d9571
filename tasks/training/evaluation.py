"""Evaluate: how good the network is, on whom, and with what uncertainty.

Reads ``model.keras``, ``shifts.csv``, the packed arrays, the masks of lungs and ``manifest.parquet``; writes
``predictions.csv`` and ``metrics.json``. Thresholds are chosen on validation and its shifts alone; splits that
``evaluation.splits`` leaves out are not read at all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.files import write_json, write_whole
from tasks.findings import MeasuredGroup, Metrics
from tasks.measures import (
    MEASURES,
    choose_sensitive_threshold,
    choose_threshold,
    draw_patients,
    format_value,
    measure_calibration,
    measure_group,
    summarise,
    weighted_measures,
)
from tasks.records import GROUP_PREFIX, UNKNOWN, Facts, group_columns
from tasks.runs.artifacts import show_table
from tasks.runs.run import Run
from tasks.runs.stages import stage_task
from tasks.settings import EvaluationSettings

GROUPS = ("val", "test", "test_device_free", "test_with_device", "val_device_free", "val_with_device")
DECISIONS = ("accuracy", "sensitivity", "specificity")
SUBTYPE_THRESHOLD = 0.5


@stage_task("evaluate")
def evaluate(run: Run) -> Facts:
    """Scores the evaluated splits and measures AUC, accuracy, sensitivity and specificity with intervals."""

    def make(out: Path) -> Facts:
        from tasks.networks.classifier import answer, predict
        from tasks.networks.files import load_network
        from tasks.pixels.shifts import keep_border, remove_border

        manifest = run.manifest()
        rows = evaluated_rows(manifest, run.settings.evaluation.splits)
        model, packed = load_network(run.folder), run.images().read(list(rows["image_id"]))
        answers = answer(model, packed)
        table = rows.assign(probability=answers.probability, bacteria=answers.bacteria)
        columns = ["path", "split", "label", "subtype", "has_device", "probability", "bacteria"]
        write_whole(out / "predictions.csv", table[columns].to_csv(index=False, float_format="%.6f"))
        main = (rows["split"] == ("test" if (rows["split"] == "test").any() else "val")).to_numpy()
        only, removed = (predict(model, change(packed[main])) for change in (keep_border, remove_border))
        shifts = pd.read_csv(run.folder / "shifts.csv")
        shifts["group_id"] = shifts["image_id"].map(manifest.set_index("image_id")["group_id"])
        metrics = measure(table, shifts, run.settings.evaluation, run.settings.seed)
        metrics |= measure_border(table[main], only, removed, run.settings.evaluation, run.settings.seed)
        seen, only, removed = ask_lungs(model, packed[main], run.lungs().read(list(rows.loc[main, "image_id"])))
        metrics |= measure_lungs(table[main][seen], only, removed, run.settings.evaluation, run.settings.seed)
        metrics["members"] = {
            split: measure_members(table[at], answers.members[at], metrics["threshold"])
            for split in run.settings.evaluation.splits
            if (at := (rows["split"] == split).to_numpy()).any()
        }
        write_json(out / "metrics.json", found := Metrics(**metrics).as_json())
        return {"metrics": found}

    reads = ["model.keras", "shifts.csv", "manifest.parquet", "lungs/index.json"]
    given = {"evaluation": run.settings.evaluation.model_dump(), "seed": run.settings.seed}
    facts = run.stage("evaluate", reads=reads, given=given, make=make)
    metrics = Metrics(**facts["metrics"])
    for name in run.settings.evaluation.splits:
        print(say_group(name, metrics.groups[name]))
    show_table("metrics", metrics_rows(metrics), f"Metrics at the threshold {metrics.threshold:.3f}")
    return facts


def ask_lungs(
    model: Any, packed: NDArray[np.uint8], masks: NDArray[np.uint8]
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    """Which images have lungs, ``(n,)``, and of these P(label = 1) where only the lungs are left, and without them.

    Args:
        model: The network, a ``keras.Model``.
        packed: The images, uint8 ``(n, 224, 224)``.
        masks: Their lungs, of that shape.
    """
    from tasks.networks.classifier import predict
    from tasks.pixels.covering import cover, find_lungs, widen_lungs

    lungs = widen_lungs(masks)
    seen = find_lungs(lungs)
    only, removed = (predict(model, cover(packed[seen], places[seen])) for places in (~lungs, lungs))
    return seen, only, removed


def evaluated_rows(manifest: pd.DataFrame, splits: tuple[str, ...]) -> pd.DataFrame:
    """Rows of the evaluated splits that have pixels; of validation without its copies."""
    reasons = manifest["excluded"].fillna("")
    wanted = (manifest["split"] == "val") & (reasons == "") & ("val" in splits)
    if "test" in splits:
        wanted |= (manifest["split"] == "test") & ~reasons.str.startswith("undecodable")
    return manifest[wanted].reset_index(drop=True)


def measure(table: pd.DataFrame, shifts: pd.DataFrame, settings: EvaluationSettings, seed: int) -> Facts:
    """``metrics.json`` but for what needs the network again.

    Args:
        table: ``split, label, subtype, group_id, has_device`` (missing where unknown), ``probability``, ``bacteria``,
            and columns ``by_<name>`` where ``ingestion.groups`` names groups.
        shifts: Validation as it is and under shifts: ``shift, label, group_id, probability``.
        settings: The evaluated splits, the draws behind each interval, the least sensitivity.
        seed: Seed of the draws.
    """
    labels, probabilities = shifts["label"].to_numpy(float), shifts["probability"].to_numpy(float)
    balanced = choose_threshold(labels, probabilities, list(shifts["shift"]))
    sensitive = choose_sensitive_threshold(shifts, settings.min_sensitivity, balanced)
    n_bootstrap = settings.n_bootstrap
    metrics: Facts = {"threshold": balanced, "subtypes": {}, "calibration": {}, "bacteria": {}}
    measured = {}
    for name in GROUPS:
        rows = pick_group(table, name, settings.splits)
        if isinstance(rows, str):
            metrics[name] = {"n": 0, "reason": rows}
        else:
            metrics[name], measured[name] = measure_group(rows, balanced, n_bootstrap, seed), rows
    for split in settings.splits:
        rows = table[table["split"] == split]
        metrics["subtypes"][split] = {
            subtype: measure_group(rows[rows["subtype"] == subtype], balanced, n_bootstrap, seed, ("sensitivity",))
            for subtype in ("bacteria", "virus")
        }
        metrics["calibration"][split] = measure_calibration(rows, n_bootstrap, seed)
        metrics["bacteria"][split] = measure_bacteria(rows, n_bootstrap, seed)
    if own := measure_own_groups(table, balanced, settings, seed):
        metrics["by_group"] = own
    metrics["operating_points"] = {
        name: {
            "threshold": threshold,
            **{group: measure_group(rows, threshold, n_bootstrap, seed, DECISIONS) for group, rows in measured.items()},
        }
        for name, threshold in (("balanced", balanced), ("high_sensitivity", sensitive))
    }
    metrics["shifts"] = {
        str(name): measure_group(rows, balanced, n_bootstrap, seed)
        for name, rows in shifts.groupby("shift", sort=False)
    }
    return metrics


def measure_own_groups(table: pd.DataFrame, threshold: float, settings: EvaluationSettings, seed: int) -> Facts:
    """``{split: {name: {value: group}}}`` for each group of ``ingestion.groups``; empty where there is none."""
    names = group_columns(table)
    found: Facts = {}
    for split in settings.splits if names else ():
        rows = table[table["split"] == split]
        found[split] = {
            name.removeprefix(GROUP_PREFIX): {
                str(value): measure_group(part, threshold, settings.n_bootstrap, seed)
                for value, part in rows.groupby(rows[name].fillna(UNKNOWN))
            }
            for name in names
        }
    return found


def pick_group(table: pd.DataFrame, name: str, splits: Sequence[str]) -> pd.DataFrame | str:
    """The rows of a group, or the reason why nothing can be measured on it."""
    split = name.split("_")[0]
    if split not in splits:
        return f"evaluation.splits leaves {split} out"
    rows = table[table["split"] == split]
    if not len(rows):
        return f"no image is in the {split} split"
    if name == split:
        return rows
    known = rows["has_device"].notna()
    if not known.any():
        return "no image was screened"
    return rows[known & (rows["has_device"].fillna(False).astype(bool) == name.endswith("with_device"))]


def measure_bacteria(rows: pd.DataFrame, n_bootstrap: int, seed: int) -> Facts:
    """How well bacteria are told from virus among pneumonia images of known subtype; bacteria count as positive."""
    known = rows[rows["subtype"].isin(["bacteria", "virus"])]
    asked = known.assign(label=(known["subtype"] == "bacteria").astype(int), probability=known["bacteria"])
    return measure_group(asked, SUBTYPE_THRESHOLD, n_bootstrap, seed)


def measure_border(
    rows: pd.DataFrame,
    only: NDArray[np.float64],
    removed: NDArray[np.float64],
    settings: EvaluationSettings,
    seed: int,
) -> Facts:
    """AUC on images of which the border alone is left, or all but the border, and what leaving it out costs.

    Args:
        rows: ``label, group_id, probability`` of the test images as they are, or of validation where test is unread.
        only: P(label = 1) where only the border is left.
        removed: P(label = 1) where the border is blanked.
        settings: The draws behind each interval.
        seed: Seed of the draws.

    Returns:
        ``border_only``, ``border_removed`` and ``border_loss`` (AUC as it is less AUC without the border), each
        ``{"value", "low", "high"}``.
    """
    if not len(rows):
        nothing = {"value": None, "low": None, "high": None, "reason": "no image is in this group"}
        return dict.fromkeys(("border_only", "border_removed", "border_loss"), nothing)
    whole = rows["probability"].to_numpy(float)
    only_auc, removed_auc, whole_auc = draw_aucs(rows, (only, removed, whole), settings, seed)
    values = {"border_only": only_auc, "border_removed": removed_auc, "border_loss": whole_auc - removed_auc}
    return {name: summarise(drawn, "a class is missing in this group") for name, drawn in values.items()}


def measure_lungs(
    rows: pd.DataFrame,
    only: NDArray[np.float64],
    removed: NDArray[np.float64],
    settings: EvaluationSettings,
    seed: int,
) -> Facts:
    """``lungs_only`` and ``lungs_removed``: AUC where nothing but the lungs is left, and where they are covered.

    Args:
        rows: ``label, group_id`` of the images in which lungs are found, as for ``measure_border``.
        only: P(label = 1) where only the lungs are left.
        removed: P(label = 1) where they are covered.
        settings: The draws behind each interval.
        seed: Seed of the draws.
    """
    if not len(rows):
        nothing = {"value": None, "low": None, "high": None, "reason": "no lungs are found in these images", "n": 0}
        return dict.fromkeys(("lungs_only", "lungs_removed"), nothing)
    aucs = draw_aucs(rows, (only, removed), settings, seed)
    return {
        name: summarise(drawn, "a class is missing in this group") | {"n": len(rows)}
        for name, drawn in zip(("lungs_only", "lungs_removed"), aucs, strict=True)
    }


def draw_aucs(
    rows: pd.DataFrame, answers: Sequence[NDArray[np.float64]], settings: EvaluationSettings, seed: int
) -> list[NDArray[np.float64]]:
    """The AUC of each of several answers to the same images, then of draws of patients, ``(1 + n_bootstrap,)``."""
    weights = draw_patients(rows["group_id"], settings.n_bootstrap, seed)
    labels = rows["label"].to_numpy(float)
    return [weighted_measures(labels, values, 0.5, weights)["auc"] for values in answers]


def measure_members(rows: pd.DataFrame, members: NDArray[np.float64], threshold: float) -> Facts:
    """Each member alone at the model's threshold: ``{measure: {"values", "mean", "deviation"}}``.

    Args:
        rows: ``label``.
        members: P(label = 1) by each member, ``(n, n_models)``.
        threshold: The balanced threshold.
    """
    labels, ones = rows["label"].to_numpy(float), np.ones((1, len(rows)))
    alone = [weighted_measures(labels, column, threshold, ones) for column in members.T]
    facts: Facts = {}
    for name in MEASURES:
        values = np.array([float(measures[name][0]) for measures in alone])
        if not np.isfinite(values).all():
            facts[name] = {"values": None, "mean": None, "deviation": None, "reason": "a class is missing"}
            continue
        spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        summary = {"values": [round(v, 4) for v in values.tolist()], "mean": round(float(values.mean()), 4)}
        facts[name] = {**summary, "deviation": round(spread, 4)}
    return facts


def say_group(name: str, group: MeasuredGroup) -> str:
    """One line for the log."""
    if not group.n:
        return f"{name}: not measured, {group.reason}"
    return f"{name} ({group.n:,} images): " + ", ".join(f"{m} {text}" for m, text in format_group(group).items())


def metrics_rows(metrics: Metrics) -> list[Facts]:
    """A row per group, for people."""
    return [
        {"group": name, "images": group.n}
        | (format_group(group) if group.n else {"auc": f"not measured: {group.reason}"})
        for name, group in metrics.groups.items()
    ]


def format_group(group: MeasuredGroup) -> dict[str, str]:
    """The measures of a group that were asked for, as texts."""
    return {m: format_value(value) for m in MEASURES if (value := group.estimate(m))}
