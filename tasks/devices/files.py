"""The files of a screener: ``model.keras``, ``model.sha256``, ``card.json``, ``readings.csv``; loads no network."""

import csv
from pathlib import Path

from tasks.errors import RunError
from tasks.networks.shipped import SHIPPED, NetworkFiles, find_network

SHIPPED_SCREENER = SHIPPED["screener"]
LEARNT_FROM = ("fit", "tune")


def find_screener(setting: str | None) -> NetworkFiles:
    """The screener that ``screening.screener`` names, else the shipped one; RunError if it has no ``model.keras``."""
    return find_network("screener", setting)


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
