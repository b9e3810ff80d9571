"""Quality of a segmenter on masks that it was not fitted to: overlap, and where the lower border lies, by class."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.measures import draw_patients, summarise
from tasks.pixels.masks import SURE
from tasks.records import SUBTYPES, Facts

BORDER_PX = 3
"""Pixels of lung in the lowest row that counts."""
N_BOOTSTRAP = 500


def judge_lungs(
    rows: pd.DataFrame, found: NDArray[np.uint8], lungs: NDArray[np.uint8], other_style: float, seed: int
) -> Facts:
    """Compares lungs that were found with those that people drew.

    Args:
        rows: ``subtype, group_id`` and ``shift``, by how much a mask's lower border differs from the usual one.
        found: uint8 ``(n, 224, 224)``, 255 surely lung.
        lungs: The same, of people.
        other_style: Masks with a shift beyond this were drawn in another style.
        seed: Of the draws of patients for the intervals.

    Returns:
        For ``all`` and each class of the masks in the usual style ``n, dice``, and ``lower_border``: by how much of
        the height the found lungs reach lower than the drawn ones; for those of another style ``other_style`` the
        same; and ``class_gap``, the largest difference in lower border between two classes.
    """
    table = rows[["subtype", "group_id"]].assign(
        dice=measure_dice(found, lungs), lower_border=lower_border(found) - lower_border(lungs)
    )
    usual = (rows["shift"].abs() <= other_style).to_numpy()
    facts: Facts = {"all": _average(table[usual], seed)}
    for kind in SUBTYPES:
        if (chosen := usual & (table["subtype"] == kind).to_numpy()).any():
            facts[kind] = _average(table[chosen], seed)
    borders = [facts[kind]["lower_border"]["value"] for kind in SUBTYPES if kind in facts]
    return facts | {
        "class_gap": round(max(borders, default=0.0) - min(borders, default=0.0), 4),
        "other_style": _average(table[~usual], seed),
    }


def _average(table: pd.DataFrame, seed: int) -> Facts:
    """Means over images with intervals over patients."""
    if not len(table):
        return {"n": 0, "reason": "no image is in this group"}
    weights = draw_patients(table["group_id"], N_BOOTSTRAP, seed)
    means = {name: weights @ table[name].to_numpy(float) / weights.sum(axis=1) for name in ("dice", "lower_border")}
    return {"n": len(table)} | {name: summarise(mean, "it cannot be computed") for name, mean in means.items()}


def measure_dice(found: NDArray[np.uint8], lungs: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Overlap of masks, uint8 ``(n, s, s)``, float64 ``(n,)``: 1.0 where both are the same (Dice 1945)."""
    one, other = found >= SURE, lungs >= SURE
    both, mine, theirs = (np.count_nonzero(part, axis=(1, 2)) for part in (one & other, one, other))
    return np.asarray(2 * both / np.maximum(mine + theirs, 1), np.float64)


def lower_border(lungs: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The lowest row of masks, uint8 ``(n, s, s)``, as a share of the height, 0.0 the top; float64 ``(n,)``."""
    rows = np.count_nonzero(lungs >= SURE, axis=2) >= BORDER_PX
    side = lungs.shape[1]
    return np.where(rows.any(axis=1), side - np.argmax(rows[:, ::-1], axis=1), 0) / side
