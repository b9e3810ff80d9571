"""Split: redraws validation from train + val, whole patients only, by a salted hash; test is never touched.

Reads and writes ``manifest.parquet`` (column ``split``).
"""

import hashlib
from pathlib import Path

import pandas as pd

from tasks.records import Facts
from tasks.runs.artifacts import show_table
from tasks.runs.manifest import write_manifest
from tasks.runs.run import Run
from tasks.runs.stages import stage_task
from tasks.settings import SplittingSettings


@stage_task("split")
def split(run: Run) -> Facts:
    """Draws validation from the patients of train + val."""

    def make(out: Path) -> Facts:
        manifest = draw_splits(run.manifest(), run.settings.splitting)
        write_manifest(out, manifest)
        return {"counts": count_splits(manifest)}

    given = run.settings.splitting.model_dump()
    facts = run.stage("split", reads=["manifest.parquet"], given=given, make=make)
    sizes = ", ".join(f"{row['split']} {row['class']} {row['images']:,}" for row in facts["counts"])
    print(f"split by patient: {sizes}")
    show_table("splits", facts["counts"], "Usable images and patients by split")
    return facts


def draw_splits(manifest: pd.DataFrame, settings: SplittingSettings) -> pd.DataFrame:
    """Fills ``split``.

    A patient (``group_id``: where it is unknown, the image stands for itself) is in validation if its hash is below
    ``val_fraction``. The hash does not depend on other patients, so nobody moves when new ones are added. If a class
    would have no patient in validation, which happens in tiny sets only, its patient with the lowest hash goes there.

    Args:
        manifest: Columns ``source_split, group_id, label, excluded``.
    """
    manifest = manifest.copy()
    test = manifest["source_split"] == "test"
    ranks = {patient: patient_rank(patient, settings.salt) for patient in manifest.loc[~test, "group_id"].unique()}
    chosen = {patient for patient, rank in ranks.items() if rank < settings.val_fraction}
    usable = manifest[~test & (manifest["excluded"].fillna("") == "")]
    for _, rows in usable.groupby("label"):
        patients = set(rows["group_id"])
        if not patients & chosen:
            chosen.add(min(patients, key=lambda patient: ranks[patient]))
    in_val = manifest["group_id"].isin(sorted(chosen))
    manifest["split"] = pd.array(
        ["test" if t else "val" if v else "train" for t, v in zip(test, in_val, strict=True)], dtype="string"
    )
    return manifest


def patient_rank(group_id: str, salt: str) -> float:
    """A number in [0, 1) that depends on the patient and the salt alone, uniform over patients."""
    return int(hashlib.sha256(f"{salt}:{group_id}".encode()).hexdigest()[:13], 16) / 16**13


def count_splits(manifest: pd.DataFrame) -> list[Facts]:
    """Usable images and known patients by split and class."""
    usable = manifest[manifest["excluded"].fillna("") == ""]
    groups = usable.groupby(["split", "label"])
    return [
        {
            "split": split,
            "class": "pneumonia" if label else "normal",
            "images": len(rows),
            "patients": int(rows["patient_id"].nunique()),
        }
        for (split, label), rows in groups
    ]
