"""Quality of a screener on readings that it has not learnt from, and the cost of its decisions."""

from collections.abc import Collection

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.measures import draw_patients, measure_group, summarise
from tasks.records import CLASS_NAMES, Facts

SCREENER_MEASURES = ("auc", "sensitivity", "specificity")
TOO_FEW = "a class has too few readings"


def judge_screener(
    manifest: pd.DataFrame, known: Collection[str], threshold: float, exclude_from: float, n_bootstrap: int, seed: int
) -> Facts:
    """Measures the scores against the readings, as if the scores alone decided.

    Args:
        manifest: ``sha256, label, split, group_id, device_score, device_reading`` (0 or 1; missing if nobody read the
            image) and ``usable``.
        known: First 16 hex digits of the sha256 of images that the screener was fitted or tuned on; left out here.
        threshold: Score from which an image counts as showing a device.
        exclude_from: Score from which an image leaves training.
        n_bootstrap: Draws of patients for each interval.
        seed: Seed of the draws.

    Returns:
        ``{"n_known", "all", "normal", "pneumonia", "cost", "residual"}``: groups as in ``metrics.json``; ``cost`` by
        class, the share of device-free images with a score from ``exclude_from``; ``residual``, the share of training
        rows that would still show a device if the scores alone decided. Without readings: ``{"n": 0, "reason"}``.
    """
    read = manifest[manifest["device_reading"].notna() & manifest["device_score"].notna()].drop_duplicates("sha256")
    is_known = read["sha256"].str[:16].isin(list(known))
    rows = pd.DataFrame(
        {
            "label": read["device_reading"].astype(float),
            "probability": read["device_score"].astype(float),
            "group_id": read["group_id"],
            "class": read["label"].astype(int),
        }
    )[~is_known]
    facts: Facts = {"n_known": int(is_known.sum())}
    for name, part in (("all", rows), *((CLASS_NAMES[c], rows[rows["class"] == c]) for c in CLASS_NAMES)):
        facts[name] = measure_group(part, threshold, n_bootstrap, seed, SCREENER_MEASURES)
    train = manifest[(manifest["split"] == "train") & manifest["usable"]].drop_duplicates("sha256")
    n_of_class = {c: int((train["label"] == c).sum()) for c in CLASS_NAMES}
    weights = draw_patients(rows["group_id"], n_bootstrap, seed)
    cost, residual = weigh_decision(rows, exclude_from, n_of_class, weights)
    facts["cost"] = {CLASS_NAMES[c]: summarise(values, TOO_FEW) for c, values in cost.items()}
    facts["residual"] = summarise(residual, TOO_FEW)
    return facts


def weigh_decision(
    rows: pd.DataFrame, exclude_from: float, n_of_class: dict[int, int], weights: NDArray[np.float64]
) -> tuple[dict[int, NDArray[np.float64]], NDArray[np.float64]]:
    """For each row of weights: by class the share of clean images lost, and the share of kept ones with a device.

    The readings may have another mix of classes than training, so the classes are weighted by ``n_of_class``. Not
    finite if a class has no reading.
    """
    kept = (rows["probability"] < exclude_from).to_numpy(float)
    device = rows["label"].to_numpy(float)
    cost = {}
    stays, shows = np.zeros(len(weights)), np.zeros(len(weights))
    with np.errstate(invalid="ignore", divide="ignore"):
        for c, n in n_of_class.items():
            w = weights * (rows["class"] == c).to_numpy(float)
            clean = w @ (1 - device)
            cost[c] = 1 - (w @ ((1 - device) * kept)) / clean
            if n:
                stays = stays + n * (w @ kept) / w.sum(axis=1)
                shows = shows + n * (w @ (device * kept)) / w.sum(axis=1)
        return cost, shows / stays
