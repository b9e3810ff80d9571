"""Readings: a table that comes with a data set; for each image, whether a person saw a device in it."""

import dataclasses
from pathlib import Path

import pandas as pd
from pydantic.dataclasses import dataclass

from tasks.errors import TableError
from tasks.files import (
    REPOSITORY,
)
from tasks.tables import Device, read_rows

SHIPPED_REVIEW = REPOSITORY / "data" / "device_review.csv"

SHIPPED_APPLIES_FROM = 0.95


@dataclass(frozen=True, slots=True)
class Reading:
    """A row of a review table; other columns are ignored."""

    path: str
    device: Device


@dataclasses.dataclass(frozen=True)
class Review:
    """Readings by path, 1 device or 0 none; ``name`` of their origin, ``address`` of the table."""

    name: str
    readings: dict[str, int]
    address: Path | None = None


def find_review(setting: str | None, folder: Path, paths: "pd.Series[str]") -> Review:
    """The review table that applies: the one named, the source's own, or the shipped one for the public data set.

    Raises:
        TableError: If the table does not fit, or a table that applies holds no path of the source.
    """
    own = folder / "device_review.csv"
    named = Path(setting) if setting is not None else own if own.exists() else None
    if named is not None:
        origin = "screening.review" if setting is not None else "device_review.csv of the source"
        readings = read_review(named, origin)
        if not set(readings) & set(paths):
            raise TableError(
                f"{origin}: no path of {named} is in the source; paths are relative to the data set's root, like "
                f"{paths.iloc[0]}"
            )
        name = named.name if setting is not None else "the source's own device_review.csv"
        return Review(name, readings, named)
    if SHIPPED_REVIEW.exists():
        shipped = read_review(SHIPPED_REVIEW, "data/device_review.csv")
        present = len(set(shipped) & set(paths))
        if shipped and present >= SHIPPED_APPLIES_FROM * len(shipped):
            return Review("the shipped data/device_review.csv", shipped, SHIPPED_REVIEW)
    return Review("no review table", {})


def read_review(path: Path, setting: str) -> dict[str, int]:
    """Readings of a CSV with ``path,device`` (1 seen, 0 not): path -> 0 or 1.

    Raises:
        TableError: On missing columns, other values, or two different readings of one path.
    """
    readings: dict[str, int] = {}
    for row in read_rows(path, setting, Reading):
        if readings.setdefault(row.path, row.device) != row.device:
            raise TableError(f"{setting}: {path} reads {row.path!r} as 0 and as 1; keep one line")
    return readings
