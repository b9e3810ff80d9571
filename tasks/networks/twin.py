"""The networks that a run may make: the model, and its twin, which learns from images that were not screened.

Both are trained, calibrated, explained and audited by the same code; only what they learn from differs.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from tasks.records import DEVICE_REASONS, MODEL

USED_COLUMNS = ["image_id", "sha256", "label", "subtype", "split"]


def used_rows(manifest: pd.DataFrame, name: str = MODEL, seed: int = 0) -> pd.DataFrame:
    """Rows that a network learns from and is calibrated on: usable ones of train and val, with what that takes.

    The twin's training images are drawn from all that were usable before anybody looked for devices, as many of each
    class as screening left to the model: neither their number nor the balance of the classes tells the two apart.
    Validation is the same for both.

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
    """Where members, history and shifts of a network lie: in the run folder itself, or in one of its twin's name."""
    return run if name == MODEL else run / name


def stage_name(stage: str, name: str) -> str:
    """``fit`` for the model, ``fit_unfiltered`` for its twin."""
    return stage if name == MODEL else f"{stage}_{name}"
