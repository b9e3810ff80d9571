"""The networks of a run: the model, and its twin, which learns from images that were not screened.

Both are trained, calibrated, explained and audited by the same code; only what they learn from differs.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from tasks.records import DEVICE_REASONS, MODEL

USED_COLUMNS = ["image_id", "sha256", "label", "subtype", "split"]


def used_rows(manifest: pd.DataFrame, name: str = MODEL, seed: int = 0) -> pd.DataFrame:
    """Rows for training and calibrating a network: usable ones of train and val, with the columns that it needs.

    The twin's training images are drawn from all that were usable before screening, as many of each class as the model
    has: model and twin differ neither in the number of images nor in the balance of classes. Validation is the same for
    both.

    Args:
        manifest: After screening.
        name: ``model`` or ``unfiltered``.
        seed: Seed of the draw.
    """
    reasons = manifest["excluded"].fillna("")
    train, clean = manifest["split"] == "train", reasons == ""
    used = manifest.loc[clean & manifest["split"].isin(["train", "val"]), USED_COLUMNS]
    if name == MODEL:
        return used
    pool = manifest.loc[train & (clean | reasons.isin(DEVICE_REASONS)), USED_COLUMNS]
    rng = np.random.default_rng([seed, 21])
    parts = [used[used["split"] == "val"]]
    for label, n in used.loc[used["split"] == "train", "label"].value_counts().sort_index().items():
        rows = pool[pool["label"] == label]
        parts.append(rows.iloc[rng.permutation(len(rows))[:n]])
    return pd.concat(parts).sort_index()


def work_folder(run: Path, name: str) -> Path:
    """The folder of a network's members, history and shifts: the run folder, or a folder in it named after the twin."""
    return run if name == MODEL else run / name


def stage_name(stage: str, name: str) -> str:
    """``fit`` for the model, ``fit_unfiltered`` for its twin."""
    return stage if name == MODEL else f"{stage}_{name}"
