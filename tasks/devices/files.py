"""The files of a screener: ``model.keras``, ``model.sha256``, ``card.json``, ``readings.csv``; loads no network."""

import csv
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import RunError
from tasks.files import REPOSITORY, sha256_of_file

SHIPPED_SCREENER = REPOSITORY / "data" / "screener"
LEARNT_FROM = ("fit", "tune")


@dataclass(frozen=True)
class ScreenerFiles:
    """A screener on disk: its folder, the sha256 of its network, and a name for people."""

    folder: Path
    sha256: str
    name: str


def find_screener(setting: str | None) -> ScreenerFiles:
    """The screener that ``screening.screener`` names, else the shipped one; the checksum is computed from the file.

    Raises:
        RunError: If the folder has no ``model.keras``.
    """
    folder = SHIPPED_SCREENER if setting is None else Path(setting)
    model = folder / "model.keras"
    if not model.is_file():
        raise RunError(f"screening.screener: {model} is missing; name a folder that flows.train_screener wrote")
    return ScreenerFiles(folder, sha256_of_file(model), "the shipped screener" if setting is None else str(folder))


def known_readings(folder: Path) -> frozenset[str] | None:
    """First 16 hex digits of the sha256 of the images that a screener was fitted or tuned on; ``None`` without a list.

    Raises:
        RunError: If ``readings.csv`` lacks the columns ``sha256,part``.
    """
    path = folder / "readings.csv"
    if not path.exists():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = csv.DictReader(stream)
            whole = {"sha256", "part"} <= set(rows.fieldnames or ())
            learnt = frozenset(row["sha256"] for row in rows if row["part"] in LEARNT_FROM) if whole else frozenset()
            whole &= None not in learnt  # a row that was cut short has None
    except (csv.Error, ValueError):
        whole = False
    if not whole:
        raise RunError(f"screening.screener: {path} lacks the columns sha256,part; name an unchanged screener")
    return learnt
