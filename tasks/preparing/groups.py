"""Groups and patients of images by their files' tags: what an ``index.csv`` and DICOM files say beside the picture.

A site, scanner, view, age or sex that goes with the class is a shortcut as a device is. So results are given by group,
and a check says how strongly each goes with the class.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import BeforeValidator, create_model

from tasks.errors import TableError
from tasks.matching import match_paths
from tasks.records import GROUP_PREFIX, UNKNOWN
from tasks.runs.manifest import hide_patients
from tasks.tables import blank_unknown, read_rows

MOST_VALUES = 50


def add_tags(manifest: pd.DataFrame, table: Path | None, groups: tuple[str, ...]) -> pd.DataFrame:
    """Replaces what was read of DICOM files by what may be kept.

    Args:
        manifest: With ``sha256``, with ``patient_id`` if an ``index.csv`` lists patients, and from DICOM files
            ``patient`` and ``groups`` (columns or values may be missing).
        table: The ``index.csv``, where the source has one; what it says of patients and groups overrides tags.
        groups: Names of groups, columns of ``table`` or tags.

    Returns:
        The manifest with a pseudonym for each DICOM patient in ``patient_id``, and ``by_<name>`` for each group
        (missing where unknown).

    Raises:
        TableError: If a group is neither a column of the table nor given by a file, or has too many values.
    """
    nothing = pd.Series(pd.NA, index=manifest.index, dtype="object")
    patients, tags = manifest.get("patient", nothing), manifest.get("groups", nothing)
    manifest = manifest.drop(columns=["patient", "groups"], errors="ignore")
    patients = patients.map(blank_unknown, na_action="ignore").replace("", pd.NA)
    if patients.notna().any():
        listed = manifest.get("patient_id", nothing).astype("string")
        hidden = hide_patients(patients, manifest["sha256"], n_digits=16)
        # A number that the table names already is one child's in both, and no secret any more.
        manifest["patient_id"] = listed.fillna(hidden.mask(patients.isin(listed.dropna()), patients).astype("string"))
    rows = read_group_table(table, groups, list(manifest["path"])) if table and groups else {}
    for name in groups:
        found = [
            getattr(rows.get(path), name, "") or (tag.get(name) if isinstance(tag, dict) else "")
            for path, tag in zip(manifest["path"], tags, strict=True)
        ]
        values = pd.Series(found, manifest.index, dtype="string").replace("", pd.NA)
        if not 0 < (n_values := values.nunique()) <= MOST_VALUES:
            problem = f"ingestion.groups: {name!r} has {n_values:,} values in all images, not 1 to {MOST_VALUES}"
            raise TableError(f"{problem}; name a column of index.csv (with bands in it), or leave it out")
        manifest[f"{GROUP_PREFIX}{name}"] = values
    return manifest


def read_group_table(table: Path, groups: tuple[str, ...], images: list[str]) -> dict[str, Any]:
    """The rows of an ``index.csv`` with its columns that are groups, by the path of the image; ``""`` for unknown."""
    text = Annotated[str, BeforeValidator(blank_unknown)]
    columns: Any = dict.fromkeys(groups, (text, "")) | {"path": (str, ...)}
    rows = list(read_rows(table, "index.csv", create_model("GroupRow", **columns)))
    matched = match_paths((row.path for row in rows), images).images
    return {matched[row.path]: row for row in rows if row.path in matched}


def measure_association(groups: "pd.Series[str]", labels: "pd.Series[int]") -> float:
    """Cramér's V of groups and labels, corrected for chance: 0 nothing in common, 1 the group gives the class away.

    A missing group counts as one of its own: what is left out in one class alone is a shortcut too. Corrected after
    Bergsma, A bias-correction for Cramér's V and Tschuprow's T (2013), or many small sites would look like one.
    """
    from scipy.stats import chi2_contingency

    known = labels.notna()
    counts = pd.crosstab(groups[known].fillna(UNKNOWN).astype(str), labels[known].astype(int)).to_numpy()
    n, size = counts.sum(), np.array(counts.shape)
    if size.min() < 2:
        return 0.0
    phi = chi2_contingency(counts, correction=False).statistic / n - (size - 1).prod() / (n - 1)
    most = (size - (size - 1) ** 2 / (n - 1)).min() - 1
    return float(np.sqrt(np.clip(phi / most, 0, 1))) if most > 0 else 0.0
