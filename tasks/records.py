"""The nouns that cross a task boundary: facts, classes, splits, reasons, and the two networks of a run."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, model_validator

MODEL, TWIN, FOREIGN = "model", "unfiltered", "foreign"

TITLES = {MODEL: "the model", TWIN: "its unscreened twin", FOREIGN: "the network"}

Facts = dict[str, Any]
"""Facts of a stage for log and report: JSON, counts and short strings, never arrays."""

NORMAL, PNEUMONIA = 0, 1
CLASS_FOLDERS = {"NORMAL": NORMAL, "PNEUMONIA": PNEUMONIA}
CLASS_NAMES = {NORMAL: "normal", PNEUMONIA: "pneumonia"}
SPLITS = ("train", "val", "test")
SUBTYPES = ("normal", "bacteria", "virus", "unknown")

GROUP_PREFIX = "by_"
"""Of the columns of a manifest that hold what ``ingestion.groups`` names, in front of that name."""
UNKNOWN = "unknown"
"""The value of such a group, in results and checks, where an image has none."""


def group_columns(table: Iterable[str]) -> list[str]:
    """The columns of a table, or of its names, that hold such groups."""
    return [name for name in table if name.startswith(GROUP_PREFIX)]


READ_DEVICE = "shows a medical device (reviewed)"
SCORED_DEVICE = "shows a medical device (screener)"
DOUBTFUL_DEVICE = "may show a medical device (screener)"
DEVICE_REASONS = (READ_DEVICE, SCORED_DEVICE, DOUBTFUL_DEVICE)
"""Values of ``excluded`` for training images that screening took out."""


class StageParts(BaseModel):
    """The parts of the key of a stage's cache entry.

    Attributes:
        reads: sha256 of each file of the run that the stage reads, by name.
        given: Settings, and inputs from outside the run.
        code: A hash of the code that shapes the result.
        packages: Versions of installed distributions.
    """

    reads: dict[str, str] = {}
    given: Facts = {}
    code: str = ""
    packages: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def _rename_inputs(cls, found: Any) -> Any:
        # Runs from before December 2026 have everything in "inputs".
        return {"given": found["inputs"]} if isinstance(found, dict) and "inputs" in found else found


class StageRecord(BaseModel):
    """The record of a finished stage: ``stage.json`` in the cache, ``stages/<stage>.json`` in a run.

    Attributes:
        facts: Counts for log and report.
        seconds: How long the work took.
        parts: The parts of the key.
        reused: Whether the run took it from the cache.
        entry: The name of its cache entry.
        files: Names of the files placed in the run.
    """

    facts: Facts
    seconds: float = 0.0
    parts: StageParts = StageParts()
    reused: bool = False
    entry: str = ""
    files: list[str] = []
