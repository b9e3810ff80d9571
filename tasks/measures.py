"""Measures of a decision (AUC, accuracy, sensitivity, specificity), their intervals, and the choice of thresholds.

Intervals are by a bootstrap over patients.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.records import Facts

Array = NDArray[np.float64]

MEASURES = ("auc", "accuracy", "sensitivity", "specificity")
N_BINS = 10


def measure_group(
    rows: pd.DataFrame, threshold: float, n_bootstrap: int, seed: int, measures: tuple[str, ...] = MEASURES
) -> Facts:
    """``{"n", measure: {"value", "low", "high"}, "confusion"}``, intervals by a 95 % bootstrap over patients.

    A measure that needs a class which is missing is ``None`` with a reason.
    """
    if not len(rows):
        return {"n": 0, "reason": "no image is in this group"}
    labels = rows["label"].to_numpy(float)
    probabilities = rows["probability"].to_numpy(float)
    weights = draw_patients(rows["group_id"], n_bootstrap, seed)
    drawn = weighted_measures(labels, probabilities, threshold, weights)
    n_patients = int(rows["group_id"].astype(str).nunique())
    group: Facts = {"n": len(rows), "n_patients": n_patients, "confusion": confusion(labels, probabilities, threshold)}
    return group | {name: summarise(drawn[name], "a class is missing in this group") for name in measures}


def draw_patients(group_ids: "pd.Series[str]", n_bootstrap: int, seed: int) -> NDArray[np.float64]:
    """Weights of rows, ``(1 + n_bootstrap, n)``: first all 1, then how often each row's patient was drawn.

    Args:
        group_ids: Of each row; the manifest's ``group_id`` stands for the patient where that is unknown.
        n_bootstrap: Number of draws.
        seed: Their seed.

    Raises:
        ValueError: If one is missing: as text, all missing ones would be one patient.
    """
    if group_ids.isna().any():
        raise ValueError("a row has no group_id")
    codes, names = pd.factorize(group_ids.astype(str))
    if not len(names):
        return np.ones((1 + n_bootstrap, 0))
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_bootstrap)
    return np.concatenate([np.ones((1, len(codes))), draws[:, codes]]).astype(float)


def summarise(values: NDArray[np.float64], reason: str) -> Facts:
    """``{"value", "low", "high"}`` of a value followed by its bootstrap draws; ``None`` and a reason if not finite."""
    value, drawn = float(values[0]), values[1:][np.isfinite(values[1:])]
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None, "reason": reason}
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (value, value)
    return {"value": round(value, 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def weighted_measures(
    labels: NDArray[np.float64], probabilities: NDArray[np.float64], threshold: float, weights: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """The measures under each row of weights ``(draws, n)``; not finite where a class has no weight."""
    positive, called = labels == 1, probabilities >= threshold
    with np.errstate(invalid="ignore", divide="ignore"):
        pos, neg = weights[:, positive].sum(1), weights[:, ~positive].sum(1)
        hits = weights[:, positive & called].sum(1)
        rejections = weights[:, ~positive & ~called].sum(1)
        # AUC: the chance that a positive stands above a negative, ties counted half.
        order = np.argsort(probabilities, kind="stable")
        starts = np.unique(probabilities[order], return_index=True)[1]
        pos_at = np.add.reduceat((weights * positive)[:, order], starts, axis=1)
        neg_at = np.add.reduceat((weights * ~positive)[:, order], starts, axis=1)
        below = np.cumsum(neg_at, axis=1) - neg_at
        auc = (pos_at * (below + neg_at / 2)).sum(1) / (pos * neg)
        return {
            "auc": auc,
            "accuracy": (hits + rejections) / (pos + neg),
            "sensitivity": hits / pos,
            "specificity": rejections / neg,
        }


def confusion(labels: NDArray[np.float64], probabilities: NDArray[np.float64], threshold: float) -> dict[str, int]:
    """Counts at the threshold: ``tp, fp, tn, fn``."""
    called, positive = probabilities >= threshold, labels == 1
    return {
        "tp": int((called & positive).sum()),
        "fp": int((called & ~positive).sum()),
        "tn": int((~called & ~positive).sum()),
        "fn": int((~called & positive).sum()),
    }


def measure_calibration(rows: pd.DataFrame, n_bootstrap: int, seed: int) -> Facts:
    """Expected calibration error with its interval, and the reliability curve (Guo et al. 2017).

    Args:
        rows: ``label, probability, group_id``.
        n_bootstrap: Draws of patients for the interval.
        seed: Seed of the draws.

    Returns:
        ``{"n", "ece": {"value", "low", "high"}, "bins": […]}``; a bin of width 0.1 has ``from, to, n`` and, where it
        holds images, ``mean_probability`` and ``share`` of pneumonia among them.
    """
    if not len(rows):
        return {"n": 0, "reason": "no image is in this group"}
    labels, probabilities = rows["label"].to_numpy(float), rows["probability"].to_numpy(float)
    at = np.minimum((probabilities * N_BINS).astype(int), N_BINS - 1)
    weights = draw_patients(rows["group_id"], n_bootstrap, seed)
    member = np.eye(N_BINS)[at]  # (n, bins)
    gap = np.abs((weights * (labels - probabilities)) @ member).sum(1) / weights.sum(1)
    bins: list[Facts] = []
    for i in range(N_BINS):
        inside = at == i
        facts: Facts = {"from": i / N_BINS, "to": (i + 1) / N_BINS, "n": int(inside.sum())}
        if inside.any():
            facts |= {"mean_probability": round(float(probabilities[inside].mean()), 4)}
            facts |= {"share": round(float(labels[inside].mean()), 4)}
        bins.append(facts)
    return {"n": len(rows), "ece": summarise(gap, "no image is in this group"), "bins": bins}


def format_value(value: dict[str, Any]) -> str:
    """``0.973 (0.961 to 0.984)``, or the reason why there is no value."""
    if value["value"] is None:
        return f"none ({value['reason']})"
    return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def describe_value(value: Facts, percent: bool = False) -> Facts:
    """``{"text": "0.973", "interval": "0.961 to 0.984", "reason"}``; text is ``None`` where there is no value.

    With ``percent``: ``"4.2 %"`` and ``"2.9 to 5.8 %"``.
    """
    if value["value"] is None:
        return {"text": None, "interval": None, "reason": value.get("reason") or "it cannot be computed"}
    scale, digits, unit = (100, 1, " %") if percent else (1, 3, "")
    text, low, high = (
        None if value.get(name) is None else f"{round(scale * value[name], digits) + 0.0:.{digits}f}"  # no "-0.000"
        for name in ("value", "low", "high")
    )
    interval = None if low is None or high is None else f"{low} to {high}{unit}"
    return {"text": f"{text}{unit}", "interval": interval, "reason": None}


def to_logit(probability: Array) -> Array:
    """log(p / (1 - p)), p kept within 1e-7 of 0 and 1."""
    p = np.clip(probability, 1e-7, 1 - 1e-7)
    return np.log(p / (1 - p))


def choose_threshold(labels: Array, probabilities: Array, conditions: Sequence[str]) -> float:
    """The probability from which on an image counts as pneumonia: sensitivity and specificity shall hold everywhere.

    That is where the lowest of all sensitivities and specificities, each under one condition, is highest: robust in the
    sense of the worst case (minimax, Wald 1950). Its price: one condition under which the network fails sets the
    threshold alone; the report names it, as that of the lowest sensitivity or specificity. A threshold lies in the
    middle of two neighbouring probabilities, in logits; of equally good ones, the one in the widest gap is taken.

    Args:
        labels: 0 or 1, ``(n,)``.
        probabilities: P(label = 1), ``(n,)``.
        conditions: Under which each was given, ``(n,)``: validation as it is, and each shift of it.
    """
    logits = np.unique(to_logit(probabilities))
    cuts = (logits[1:] + logits[:-1]) / 2 if len(logits) > 1 else logits
    gaps = np.diff(logits) if len(logits) > 1 else np.zeros(len(logits))
    thresholds = 1 / (1 + np.exp(-cuts))
    lowest = np.ones(len(thresholds))
    for _, rows in pd.DataFrame({"label": labels, "probability": probabilities}).groupby(np.asarray(conditions)):
        for label, found in rows.groupby("label")["probability"]:
            below = np.searchsorted(np.sort(found.to_numpy()), thresholds, side="left") / len(found)
            lowest = np.minimum(lowest, 1 - below if label == 1 else below)
    best = np.flatnonzero(lowest >= lowest.max() - 1e-12)
    return float(thresholds[best[np.argmax(gaps[best])]])


def choose_sensitive_threshold(shifts: pd.DataFrame, min_sensitivity: float, balanced: float) -> float:
    """The highest threshold, at most the balanced one, that keeps the sensitivity under each shift of validation.

    Args:
        shifts: ``shift, label, probability``, rounded to six decimals as ``shifts.csv`` holds them.
        min_sensitivity: Share of pneumonia images that has to be found under each shift.
        balanced: The balanced threshold.
    """
    lowest = balanced
    for _, rows in shifts[shifts["label"] == 1].groupby("shift"):
        found = np.sort(rows["probability"].to_numpy(float))[::-1]
        n_needed = int(np.ceil(min_sensitivity * len(found) - 1e-9))
        # One rounding step lower: the image at the edge counts whichever way its probability was rounded.
        lowest = min(lowest, float(found[max(n_needed, 1) - 1]) - 1e-6)
    return max(lowest, 0.0)
