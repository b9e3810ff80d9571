"""Groups and patients of images by their files' tags: what an ``index.csv`` and DICOM files say beside the picture.

A site, scanner, view, age or sex that goes with the class is a shortcut as a device is. So results are given by group,
and a check says how strongly each goes with the class.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import create_model

from tasks.errors import TableError
from tasks.matching import match_paths
from tasks.records import GROUP_PREFIX, UNKNOWN, Facts
from tasks.runs.manifest import hide_patients
from tasks.tables import read_rows

MOST_VALUES = 50


def add_tags(manifest: pd.DataFrame, table: Path | None, groups: tuple[str, ...]) -> pd.DataFrame:
    """Replaces what was read of DICOM files by what may be kept.

    Args:
        manifest: With ``sha256``, with ``patient_id`` if an ``index.csv`` lists patients, and from DICOM files
            ``patient``, ``groups`` and ``notes`` (columns or values may be missing).
        table: The ``index.csv``, where the source has one; what it says of patients and groups overrides tags.
        groups: Names of groups, columns of ``table`` or tags.

    Returns:
        The manifest with a pseudonym for each DICOM patient in ``patient_id``, ``by_<name>`` for each group (missing
        where unknown), and, where there is a DICOM file, ``notes``: what to know of it, joined by ``"; "``.

    Raises:
        TableError: If a group is neither a column of the table nor given by a file, or has too many values.
    """
    nothing = pd.Series(pd.NA, index=manifest.index, dtype="object")
    patients, tags = manifest.get("patient", nothing), manifest.get("groups", nothing)
    manifest = manifest.drop(columns=["patient", "groups"], errors="ignore")
    tagged = hide_patients(patients.replace("", pd.NA), manifest["sha256"], n_digits=16).astype("string")
    if tagged.notna().any():
        listed = manifest.get("patient_id")
        manifest = manifest.assign(patient_id=tagged if listed is None else listed.fillna(tagged))
    listed = read_group_table(table, groups, list(manifest["path"])) if table and groups else {}
    for name in groups:
        of_files = tags.map(lambda found, name=name: found.get(name), na_action="ignore")
        of_table = manifest["path"].map(lambda path, name=name: listed.get(path, {}).get(name))
        values = of_table.replace("", pd.NA).fillna(of_files.replace("", pd.NA)).astype("string")
        if values.isna().all():
            raise TableError(f"ingestion.groups: no image has a {name!r}; name a column of index.csv, or leave it out")
        if (n_values := values.nunique()) > MOST_VALUES:
            problem = f"ingestion.groups: {name!r} has {n_values:,} values, more than {MOST_VALUES}"
            raise TableError(f"{problem}; put them into bands in index.csv, or leave it out")
        manifest[f"{GROUP_PREFIX}{name}"] = values
    if "notes" in manifest:
        manifest["notes"] = manifest["notes"].map("; ".join, na_action="ignore").astype("string")
    return manifest


def read_group_table(table: Path, groups: tuple[str, ...], images: list[str]) -> dict[str, Facts]:
    """The columns of an ``index.csv`` that are groups, by the path of the image; ``""`` where one is missing."""
    columns = dict.fromkeys(groups, (str, ""))
    row = create_model("GroupRow", path=(str, ...), **columns)  # type: ignore[call-overload]
    rows = [dict(found) for found in read_rows(table, "index.csv", row)]
    match = match_paths((found["path"] for found in rows), images)
    return {match.images[found["path"]]: found for found in rows if found["path"] in match.images}


def split_notes(manifest: pd.DataFrame) -> list[list[str]]:
    """The notes about each DICOM file."""
    return [joined.split("; ") if joined else [] for joined in manifest.get("notes", pd.Series()).dropna()]


def name_groups(table: pd.DataFrame) -> list[str]:
    """The columns of a table that hold groups."""
    return [str(column) for column in table.columns if str(column).startswith(GROUP_PREFIX)]


def measure_association(groups: "pd.Series[str]", labels: "pd.Series[int]") -> float:
    """Cramér's V of groups and labels, corrected for chance: 0 nothing in common, 1 the group gives the class away.

    A missing group counts as one of its own: what is left out in one class alone is a shortcut too. Corrected after
    Bergsma, A bias-correction for Cramér's V and Tschuprow's T (2013), or many small sites would look like one.
    """
    from scipy.stats import chi2_contingency

    known = labels.notna()
    counts = pd.crosstab(groups[known].fillna(UNKNOWN).astype(str), labels[known].astype(int)).to_numpy()
    n_rows, n_columns = counts.shape
    n = counts.sum()
    if min(n_rows, n_columns) < 2:
        return 0.0
    phi = chi2_contingency(counts, correction=False).statistic / n
    phi = max(0.0, phi - (n_rows - 1) * (n_columns - 1) / (n - 1))
    most = min(k - (k - 1) ** 2 / (n - 1) for k in (n_rows, n_columns)) - 1
    return float(min(1.0, np.sqrt(phi / most))) if most > 0 else 0.0
