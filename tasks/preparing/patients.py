"""Patients: whose image a file is, by its name; unknown where no name says so.

A pattern is chosen once for a source, over all its names, and only if nearly all fit it: what a single name seems to
say may be chance. Later stages never ask for the patient alone but for the group of an image (``copies.name_groups``).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from tasks.errors import SettingsError
from tasks.records import Facts
from tasks.tables import blank_unknown

NEARLY_ALL = 0.95


@dataclass(frozen=True)
class Pattern:
    """A way to name files.

    Attributes:
        says: Whose it is, for people.
        expression: Finds the patient in a path; its group ``patient`` is the patient.
        needs: What one path at least must show for the pattern to count without a setting; ``None``: it never does.
            Viewers export anybody's images as IM-0001-0001.
    """

    says: str
    expression: str
    needs: str | None = ""
    reused: bool = False


_NAME = r"(?=[^/]*$)"
PATTERNS = {
    "public": Pattern(
        "the public archive, such as person12_virus_3, IM-0115-0001, NORMAL2-IM-0115-0001",
        rf"(?i)(?<![a-z0-9])(?P<patient>person[-_ ]?\d+|(?:normal2[-_ ])?im[-_ ]\d+)(?!\d){_NAME}",
        needs=r"(?i)person[-_ ]?\d",
        reused=True,
    ),
    "mendeley": Pattern(
        "version 3 of it on Mendeley Data, such as BACTERIA-1003233-0002, NORMAL-1003233-0001",
        rf"(?i)(?<![a-z0-9])(?:bacteria|virus|normal)[-_ ](?P<patient>\d{{5,}})[-_ ]\d+(?!\d){_NAME}",
        reused=True,
    ),
    "nih": Pattern("ChestX-ray14, such as 00000013_005", r"(?<![^/])(?P<patient>\d{8})_\d{3}(?!\d)", needs=None),
}
"""The patterns that ``ingestion.patients`` may name, in the order in which they are tried; docs/data.md lists them."""
NOTHING = Pattern(
    f"nothing (no known pattern of names fits {100 * NEARLY_ALL:g} % of the images, or it is not wanted)", ""
)


def add_patients(table: pd.DataFrame, wanted: str | None, has_index: bool) -> tuple[pd.DataFrame, Facts]:
    """The table with ``patient_id``, missing where unknown; and what told it.

    An ``index.csv`` is taken at its word: names tell the patients that it leaves out only where a setting says how.
    Of DICOM files the tag counts, and the name where that is empty.

    Args:
        table: ``path`` of each image, relative to the root; ``patient_id`` if an ``index.csv`` or DICOM files name
            patients.
        wanted: ``ingestion.patients``: a name in ``PATTERNS``, ``none``, or a regular expression.
        has_index: Whether the source has an ``index.csv``.

    Returns:
        The table; and ``by`` (what told the patients, in words), ``n_fit`` (of how many images) and ``own`` (whether
        one in both train and test is the same child).

    Raises:
        SettingsError: If what the setting names fits no path.
    """
    listed = table.get("patient_id")
    tables = "index.csv or PatientID in DICOM files"
    if listed is not None and (listed.notna().all() or (has_index and wanted in (None, "none"))):
        return table, {"by": tables, "n_fit": int(listed.notna().sum()), "own": True}
    listed = pd.Series(pd.NA, index=table.index, dtype="string") if listed is None else listed
    left = listed[listed.isna()].index
    found, pattern = find_patients(list(table["path"][left]), wanted)
    patients = listed.fillna(found.set_axis(left))
    by = f"{tables}, else {pattern.says}" if len(left) < len(table) else pattern.says
    facts = {"by": by, "n_fit": int(patients.notna().sum()), "own": not pattern.reused}
    return table.assign(patient_id=patients), facts


def find_patients(paths: Sequence[str], wanted: str | None) -> tuple["pd.Series[str]", Pattern]:
    """The patient of each path, and the pattern that told it (``add_patients``)."""
    if wanted and wanted != "none":
        pattern = PATTERNS.get(wanted) or Pattern("the regular expression of ingestion.patients", wanted)
        found = _fit(pattern, paths)
        if not found.notna().any():
            raise SettingsError(
                f"ingestion.patients: not one of the {len(found):,} images fits {pattern.says}; correct it, or leave "
                "it out"
            )
        return found, pattern
    for pattern in PATTERNS.values() if wanted is None else ():
        found = _fit(pattern, paths)
        shown = pattern.needs is not None and any(re.search(pattern.needs, path) for path in paths)
        if shown and found.notna().mean() >= NEARLY_ALL:
            return found, pattern
    return pd.Series([pd.NA] * len(paths), dtype="string"), NOTHING


def describe_patients(found: Facts, n_unknown: int, n_images: int) -> list[str]:
    """Lines for the log: what told the patients; how many are unknown, and what follows from that."""
    lines = [f"patients: by {found['by']}, of {found['n_fit']:,} of {n_images:,} images"]
    if n_unknown:
        lines.append(
            f"warning: the patient of {n_unknown:,} of {n_images:,} images is not known (ingestion.patients may say "
            "how names tell it); each stands for itself, so one child may be in training and in validation or test"
        )
    return lines


def _fit(pattern: Pattern, paths: Sequence[str]) -> "pd.Series[str]":
    expression = re.compile(pattern.expression)
    group = "patient" if "patient" in expression.groupindex else 1
    texts = [(match[group] or "") if (match := expression.search(path)) else "" for path in paths]
    spell = spell_patient if pattern in PATTERNS.values() else blank_unknown
    return pd.Series([spell(text) or pd.NA for text in texts], dtype="string")


def spell_patient(text: str) -> str:
    """One spelling: ``Person12`` and ``person_12`` are ``person12``, ``im_0115`` is ``IM-0115``."""
    text = re.sub("[-_ ]", "-", text.upper())
    return re.sub("^PERSON-?", "person", text)
