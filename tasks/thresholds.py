"""Thresholds: from which probability on an image counts as pneumonia."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]


def to_logit(probability: Array) -> Array:
    """log(p / (1 - p)), p kept within 1e-7 of 0 and 1."""
    p = np.clip(probability, 1e-7, 1 - 1e-7)
    return np.log(p / (1 - p))


def choose_threshold(labels: Array, probabilities: Array) -> float:
    """The probability from which on an image counts as pneumonia: highest sensitivity + specificity (Youden 1950).

    A cut lies in the middle of two neighbouring probabilities, in logits; of equally good cuts, the one in the widest
    gap.
    """
    logits = np.unique(to_logit(probabilities))
    cuts = (logits[1:] + logits[:-1]) / 2 if len(logits) > 1 else logits
    gaps = np.diff(logits) if len(logits) > 1 else np.zeros(len(logits))
    thresholds = 1 / (1 + np.exp(-cuts))
    positive, negative = np.sort(probabilities[labels == 1]), np.sort(probabilities[labels == 0])
    sensitivity = 1 - np.searchsorted(positive, thresholds, side="left") / max(len(positive), 1)
    specificity = np.searchsorted(negative, thresholds, side="left") / max(len(negative), 1)
    youden = sensitivity + specificity
    best = np.flatnonzero(youden >= youden.max() - 1e-12)
    return float(thresholds[best[np.argmax(gaps[best])]])


def choose_sensitive_threshold(shifts: pd.DataFrame, min_sensitivity: float, balanced: float) -> float:
    """The highest threshold, not above the balanced one, that keeps the sensitivity under each shift of validation.

    Args:
        shifts: ``shift, label, probability``, rounded to six decimals as ``shifts.csv`` holds them.
        min_sensitivity: Share of pneumonia images that has to be found under each shift.
        balanced: The balanced threshold.
    """
    lowest = balanced
    for _, rows in shifts[shifts["label"] == 1].groupby("shift"):
        found = np.sort(rows["probability"].to_numpy(float))[::-1]
        n_needed = int(np.ceil(min_sensitivity * len(found) - 1e-9))
        # A step of the rounding lower: the image at the edge counts whichever way its probability was rounded.
        lowest = min(lowest, float(found[max(n_needed, 1) - 1]) - 1e-6)
    return max(lowest, 0.0)
