"""What is found about the networks of a run, as its files hold it: ``metrics.json`` and ``audit.json``.

Older runs may lack later entries. Entries that are not named here are kept as they are.
"""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.errors import RunError
from tasks.files import read_json
from tasks.records import FOREIGN, MODEL, TWIN, Facts

Estimate = Facts
"""``{"value", "low", "high"}``; all three ``None``, and a ``reason``, where it cannot be computed."""
NOT_MEASURED: Estimate = {"value": None, "low": None, "high": None, "reason": "it was not measured"}


class Finding(BaseModel):
    """A file, or a part of one."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="allow")

    def as_json(self) -> Facts:
        """What the file holds, without entries that nobody gave."""
        return self.model_dump(exclude_unset=True)


class MeasuredGroup(Finding):
    """What was measured on a group of images, or the reason why nothing was."""

    n: int = Field(ge=0)
    reason: str = NOT_MEASURED["reason"]
    n_patients: int | None = None
    confusion: dict[str, int] | None = None
    auc: Estimate | None = None
    accuracy: Estimate | None = None
    sensitivity: Estimate | None = None
    specificity: Estimate | None = None
    ece: Estimate | None = None
    bins: list[Facts] = []

    def estimate(self, measure: str) -> Estimate | None:
        """One of the measures by its name; ``None`` where it was not asked for."""
        found: Estimate | None = getattr(self, measure)
        return found


class GroupsAtThreshold(Finding):
    """A threshold, and the groups that were measured at it."""

    threshold: float = Field(ge=0, le=1)
    val: MeasuredGroup | None = None
    test: MeasuredGroup | None = None
    test_device_free: MeasuredGroup | None = None
    test_with_device: MeasuredGroup | None = None
    val_device_free: MeasuredGroup | None = None
    val_with_device: MeasuredGroup | None = None

    @property
    def groups(self) -> dict[str, MeasuredGroup]:
        """The groups that there are, by name."""
        return {name: found for name, found in self if isinstance(found, MeasuredGroup)}


class Metrics(GroupsAtThreshold):
    """``metrics.json``; ``subtypes``, ``calibration``, ``bacteria`` and ``members`` are by split.

    ``by_group`` is by split, name of the group and value.
    """

    subtypes: dict[str, dict[str, MeasuredGroup]] = {}
    calibration: dict[str, MeasuredGroup] = {}
    bacteria: dict[str, MeasuredGroup] = {}
    members: dict[str, Facts] = {}
    operating_points: dict[str, GroupsAtThreshold] = {}
    shifts: dict[str, MeasuredGroup] = {}
    by_group: dict[str, dict[str, dict[str, MeasuredGroup]]] = {}
    border_only: Estimate = NOT_MEASURED
    border_removed: Estimate = NOT_MEASURED
    border_loss: Estimate = NOT_MEASURED
    lungs_only: Estimate = NOT_MEASURED
    lungs_removed: Estimate = NOT_MEASURED


class NetworkVerdict(Finding):
    """The verdict on a network; ``passed`` is ``None``, with a ``reason``, where there is none."""

    passed: bool | None
    failed: list[str] = []
    reason: str = "it gives no reason"
    rules: list[Facts] = []


class Verdicts(Finding):
    """The verdicts on the model and, where they were compared, on its twin or on a network of other people."""

    model: NetworkVerdict
    unfiltered: NetworkVerdict | None = None
    foreign: NetworkVerdict | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The networks that there are, the one that the audit is about first."""
        return (FOREIGN, MODEL) if self.foreign else (MODEL, TWIN) if self.unfiltered else (MODEL,)

    def of(self, name: str) -> NetworkVerdict:
        """The verdict on one of them."""
        found: NetworkVerdict = getattr(self, name)
        return found


class Audit(Finding):
    """``audit.json``; each part is by network. ``performance`` and ``network`` are of ``flows.audit`` alone."""

    verdict: Verdicts
    split: str
    n_images: int
    baselines: dict[str, Facts] = {}
    insertion: dict[str, Facts] = {}
    removal: dict[str, Facts] = {}
    blanked: dict[str, Facts] = {}
    attribution: dict[str, Facts] = {}
    groups: dict[str, Facts] = {}
    performance: dict[str, MeasuredGroup] = {}
    network: Facts = {}


FindingT = TypeVar("FindingT", bound=Finding)


def read_metrics(run: Path) -> Metrics:
    """``metrics.json`` of a run.

    Raises:
        RunError: If it is missing or damaged.
    """
    return _read(run / "metrics.json", Metrics, "train")


def read_audit(run: Path) -> Audit:
    """``audit.json`` of a run.

    Raises:
        RunError: If it is missing or damaged.
    """
    return _read(run / "audit.json", Audit, "explain")


def _read(path: Path, kind: type[FindingT], flow: str) -> FindingT:
    if not path.is_file():
        raise RunError(f"{path} is missing: run the {flow} flow on this run folder first")
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or next(iter(kind.model_fields))
        raise RunError(f"{path} names no {where}: run the {flow} flow on this run folder again") from None
