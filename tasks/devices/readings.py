"""Readings: a table that comes with a data set; for each image, whether a person saw a device in it."""

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path

import pandas as pd
from pydantic.dataclasses import dataclass

from tasks.errors import TableError
from tasks.files import REPOSITORY
from tasks.matching import accept_match, match_paths
from tasks.runs.run import Run
from tasks.runs.stages import STAGES_FOLDER, read_stage
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
    """The readings that apply to a source.

    Attributes:
        name: Of their origin.
        readings: Path of an image -> 1 device or 0 none.
        address: Of the table; ``None`` without one.
        images: Path in the table -> path of the image.
        warning: A sentence about paths that name no image, or ``""``.
    """

    name: str
    readings: dict[str, int]
    address: Path | None = None
    images: dict[str, str] = dataclasses.field(default_factory=dict)
    warning: str = ""


def find_review_of(run: Run, folder: Path) -> Review:
    """The review table that applies to the source of a run, which lies in a folder; see ``find_review``."""
    listed = run.folder / STAGES_FOLDER / "ingest.json"
    layout = read_stage(run.folder, "ingest").parts.given.get("layout", {}) if listed.exists() else {}
    settings = run.settings
    return find_review(
        settings.screening.review,
        folder,
        run.manifest()["path"],
        layout.get("left_out", ()),
        settings.quality.max_unmatched,
    )


def find_review(
    setting: str | None,
    folder: Path,
    paths: "pd.Series[str]",
    left_out: Collection[str] = (),
    max_unmatched: float = 0.0,
) -> Review:
    """The review table that applies: the one named, the source's own, or the shipped one for the public data set.

    Args:
        setting: The table that ``screening.review`` names.
        folder: The data set's root.
        paths: Paths of the images.
        left_out: Names of the source's other files.
        max_unmatched: Largest accepted share of the paths of a table, named or the source's own, that name no file.

    Raises:
        TableError: If the table does not fit, or names too few files of the source (``accept_match``).
    """
    own = folder / "device_review.csv"
    named = Path(setting) if setting is not None else own if own.exists() else None
    if named is not None:
        origin = "screening.review" if setting is not None else "device_review.csv of the source"
        name = named.name if setting is not None else "the source's own device_review.csv"
        table = read_review(named, origin)
        match = match_paths(table, list(paths), left_out)
        warning = accept_match(match, f"{origin}: {named}", list(paths), max_unmatched)
        return Review(name, _join(table, match.images, f"{origin}: {named}"), named, match.images, warning)
    if SHIPPED_REVIEW.exists():
        shipped = read_review(SHIPPED_REVIEW, "data/device_review.csv")
        images = match_paths(shipped, list(paths)).images
        if shipped and len(images) >= SHIPPED_APPLIES_FROM * len(shipped):
            readings = _join(shipped, images, "data/device_review.csv")
            return Review("the shipped data/device_review.csv", readings, SHIPPED_REVIEW, images)
    return Review("no review table", {})


def _join(table: dict[str, int], images: dict[str, str], place: str) -> dict[str, int]:
    return _unite(((image, table[path]) for path, image in images.items()), place)


def read_review(path: Path, setting: str) -> dict[str, int]:
    """Readings of a CSV with ``path,device`` (1 seen, 0 not): path -> 0 or 1.

    Raises:
        TableError: On missing columns, other values, or two different readings of one path.
    """
    return _unite(((row.path, row.device) for row in read_rows(path, setting, Reading)), f"{setting}: {path}")


def _unite(rows: Iterable[tuple[str, int]], place: str) -> dict[str, int]:
    """Readings by path; refuses two different ones of one path."""
    readings: dict[str, int] = {}
    for path, device in rows:
        if readings.setdefault(path, device) != device:
            raise TableError(f"{place} reads {path!r} as 0 and as 1; keep one line")
    return readings
