"""Evaluate: how good the network is, on whom, and with what uncertainty.

Reads ``model.keras``, the packed arrays and ``manifest.parquet``; writes ``predictions.csv`` and ``metrics.json``. The
threshold is chosen on validation alone; splits that ``evaluation.splits`` leaves out are not read at all.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import show_table
from tasks.images import PackedImages
from tasks.measures import MEASURES, format_value, measure_group
from tasks.records import Facts
from tasks.settings import Settings
from tasks.storage import read_manifest, run_folder, run_stage, sha256_of_file, write_json, write_whole

GROUPS = ("val", "test", "test_device_free", "test_with_device", "val_device_free", "val_with_device")


@task(name="evaluate", cache_policy=NO_CACHE)
def evaluate(settings: Settings) -> Facts:
    """Scores the evaluated splits and measures AUC, accuracy, sensitivity and specificity with intervals."""
    run = run_folder(settings)

    def make(out: Path) -> Facts:
        from tasks.networks import load_network, predict

        table = evaluated_rows(read_manifest(run), settings.evaluation.splits)
        table["probability"] = predict(load_network(run), PackedImages(run).read(list(table["image_id"])))
        columns = ["path", "split", "label", "subtype", "has_device", "probability"]
        shown = table.loc[table["split"].isin(settings.evaluation.splits), columns]
        write_whole(out / "predictions.csv", shown.to_csv(index=False, float_format="%.6f"))
        metrics = measure(table, settings.evaluation.splits, settings.evaluation.n_bootstrap, settings.seed)
        write_json(out / "metrics.json", metrics)
        return {"metrics": metrics}

    inputs = {
        "model": sha256_of_file(run / "model.keras"),
        "manifest": sha256_of_file(run / "manifest.parquet"),
        "evaluation": settings.evaluation.model_dump(),
        "seed": settings.seed,
    }
    facts = run_stage(settings, "evaluate", module=__name__, inputs=inputs, make=make)
    metrics = facts["metrics"]
    for name in settings.evaluation.splits:
        print(describe_group(name, metrics[name]) + (" (taken from the cache)" if facts["reused"] else ""))
    show_table("metrics", metrics_rows(metrics), f"Metrics at the threshold {metrics['threshold']:.3f}")
    return facts


def evaluated_rows(manifest: pd.DataFrame, splits: tuple[str, ...]) -> pd.DataFrame:
    """Rows of the evaluated splits that have pixels; validation always, for the threshold, without its copies."""
    reasons = manifest["excluded"].fillna("")
    wanted = (manifest["split"] == "val") & (reasons == "")
    if "test" in splits:
        wanted |= (manifest["split"] == "test") & ~reasons.str.startswith("undecodable")
    return manifest[wanted].reset_index(drop=True)


def measure(table: pd.DataFrame, splits: tuple[str, ...], n_bootstrap: int, seed: int) -> Facts:
    """``metrics.json``: the threshold, a group for each name in ``GROUPS``, and sensitivity by subtype.

    Args:
        table: ``split, label, subtype, patient_id, has_device`` (missing where unknown) and ``probability``.
        splits: The evaluated splits.
        n_bootstrap: Draws of patients behind each interval.
        seed: Seed of the draws.
    """
    val = table[table["split"] == "val"]
    threshold = round(choose_threshold(val["label"].to_numpy(float), val["probability"].to_numpy(float)), 6)
    metrics: Facts = {"threshold": threshold, "subtypes": {}}
    for name in GROUPS:
        split = name.split("_")[0]
        rows = table[table["split"] == split]
        if split not in splits:
            metrics[name] = {"n": 0, "reason": f"evaluation.splits leaves {split} out"}
            continue
        if not len(rows):
            metrics[name] = {"n": 0, "reason": f"no image is in the {split} split"}
            continue
        if name != split:
            known = rows["has_device"].notna()
            if not known.any():
                metrics[name] = {"n": 0, "reason": "no image was screened"}
                continue
            rows = rows[known & (rows["has_device"].fillna(False).astype(bool) == name.endswith("with_device"))]
        metrics[name] = measure_group(rows, threshold, n_bootstrap, seed)
    for split in splits:
        rows = table[table["split"] == split]
        metrics["subtypes"][split] = {
            subtype: measure_group(rows[rows["subtype"] == subtype], threshold, n_bootstrap, seed, ("sensitivity",))
            for subtype in ("bacteria", "virus")
        }
    return metrics


def choose_threshold(labels: NDArray[np.float64], probabilities: NDArray[np.float64]) -> float:
    """The probability from which on an image counts as pneumonia: highest sensitivity + specificity (Youden 1950).

    A cut lies in the middle of two neighbouring probabilities, in logits; of equally good cuts, the one in the widest
    gap.
    """
    values = np.unique(probabilities)
    clipped = np.clip(values, 1e-6, 1 - 1e-6)
    logits = np.log(clipped / (1 - clipped))
    cuts = (logits[1:] + logits[:-1]) / 2 if len(logits) > 1 else logits
    gaps = np.diff(logits) if len(logits) > 1 else np.zeros(len(logits))
    thresholds = 1 / (1 + np.exp(-cuts))
    positive, negative = np.sort(probabilities[labels == 1]), np.sort(probabilities[labels == 0])
    sensitivity = 1 - np.searchsorted(positive, thresholds, side="left") / max(len(positive), 1)
    specificity = np.searchsorted(negative, thresholds, side="left") / max(len(negative), 1)
    youden = sensitivity + specificity
    best = np.flatnonzero(youden >= youden.max() - 1e-12)
    return float(thresholds[best[np.argmax(gaps[best])]])


def describe_group(name: str, group: Facts) -> str:
    """One line for the log."""
    if not group["n"]:
        return f"{name}: not measured, {group['reason']}"
    parts = [f"{m} {format_value(group[m])}" for m in MEASURES if m in group]
    return f"{name} ({group['n']:,} images): " + ", ".join(parts)


def metrics_rows(metrics: Facts) -> list[Facts]:
    """A row per group, for people."""
    return [
        {"group": name, "images": metrics[name]["n"]}
        | (
            {m: format_value(metrics[name][m]) for m in MEASURES}
            if metrics[name]["n"]
            else {"auc": f"not measured: {metrics[name]['reason']}"}
        )
        for name in GROUPS
    ]
