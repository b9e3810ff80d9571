"""The rules of publishing, without files: what ``published.json`` holds, and which run takes over.

What ``published.json`` holds beyond these parts is left out when it is read, so the next model to take over drops it.
"""

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field

from tasks.measures import format_value
from tasks.records import Facts
from tasks.settings import PublishingSettings

COMPARED_GROUPS = {"val": "validation", "val_device_free": "validation without devices"}
MOST_KEPT = 20
"""Earlier and withdrawn models that are remembered, of each."""


class Part(BaseModel):
    """A part of ``published.json``."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class Interval(Part):
    """An AUC with its interval."""

    value: float = Field(ge=0, le=1)
    low: float
    high: float


class NoInterval(Part):
    """Why there is no AUC."""

    value: None
    low: None = None
    high: None = None
    reason: str = "it cannot be computed"


class Group(Part):
    """A group of images: how many, and a digest of which they are, with their labels."""

    n: int
    auc: Interval | NoInterval
    images: str


class Verdict(Part):
    """The verdict of the audit, with the rules that it failed."""

    passed: bool
    failed: list[str]


class NoVerdict(Part):
    """Why the audit came to no verdict."""

    passed: None
    failed: list[str] = []
    reason: str


class Candidate(Part):
    """A run, its model and the figures that decide; and the data checks that could not be judged."""

    run: str = Field(pattern="^[^/]*$")
    run_dir: str
    model_sha256: str
    audit: Verdict | NoVerdict
    val: Group
    val_device_free: Group
    not_judged: list[str] = []

    def __str__(self) -> str:
        """``20261123T030000Z-sample (AUC on validation 0.962 (0.941 to 0.983), on …)``."""
        figures = ", ".join(
            f"on {says} {format_value(dict(getattr(self, name).auc))}" for name, says in COMPARED_GROUPS.items()
        )
        return f"{self.run} (AUC {figures})"

    def is_among(self, models: "Iterable[Entry]") -> bool:
        """Whether one of these is the very same network."""
        return any(one.model_sha256 == self.model_sha256 for one in models)


class Entry(Candidate):
    """A model that is or was published, since when."""

    published: str


class Withdrawn(Entry):
    """A model that a person rolled back, when."""

    withdrawn: str


class Published(Entry):
    """``published.json``: what is published; ``earlier`` and ``withdrawn`` are what was, newest first."""

    earlier: list[Entry]
    withdrawn: list[Withdrawn]

    def alone(self) -> Entry:
        """What is published, without what was before it."""
        return Entry(**dict(self))

    def step_back(self, now: str) -> "Published":
        """What is published after a rollback to the newest of ``earlier``."""
        back, *earlier = self.earlier
        withdrawn = [Withdrawn(**dict(self.alone()), withdrawn=now), *self.withdrawn]
        return Published(**dict(back), earlier=earlier, withdrawn=withdrawn[:MOST_KEPT])


def succeed(candidate: Candidate, published: Published | None, now: str) -> Published:
    """What is published after a run took over."""
    before, withdrawn = ([published.alone(), *published.earlier], published.withdrawn) if published else ([], [])
    # What cannot be told apart from it, or lay in its folder, is nothing to go back to.
    earlier = [one for one in before if not candidate.is_among([one]) and one.run != candidate.run]
    withdrawn = [one for one in withdrawn if not candidate.is_among([one])]
    return Published(**dict(candidate) | {"published": now}, earlier=earlier[:MOST_KEPT], withdrawn=withdrawn)


def weigh_candidate(
    candidate: Candidate,
    published: Published | None,
    settings: PublishingSettings,
    *,
    lost: str | None = None,
    by_hand: bool = False,
) -> Facts:
    """Whether a run takes over.

    Args:
        candidate: The run.
        published: What is published; ``None`` for nothing.
        settings: The largest accepted drop, and whether patients may be unknown.
        lost: Why the run of the published model cannot be used any more; its figures count still.
        by_hand: A person asks for it, so it may have been published or rolled back before.

    Returns:
        ``decision``: ``publish``, ``keep`` (what is published stays) or ``same`` (this very model is published);
        ``reasons`` against it; ``notes``, which weigh_candidate nothing.
    """
    reasons: list[str] = []
    notes: list[str] = []
    if isinstance(candidate.audit, NoVerdict):
        reasons.append(f"the audit came to no verdict ({candidate.audit.reason})")
    elif not candidate.audit.passed:
        reasons.append(f"the audit failed ({', '.join(candidate.audit.failed)})")
    if candidate.not_judged:
        sentence = f"not judged: {'; '.join(candidate.not_judged)}"
        if settings.unknown_patients:
            notes.append(sentence)
        else:
            reasons.append(f"{sentence}; publishing.unknown_patients true publishes it all the same")
    if published is None:
        return {"decision": "keep" if reasons else "publish", "reasons": reasons, "notes": notes}
    if lost:
        notes.append(f"the published run {published.run} cannot be used any more: {lost}")
    same = candidate.is_among([published])
    if not by_hand and candidate.is_among(published.withdrawn):
        reasons.append("a person rolled this very model back")
    elif not by_hand and not same and candidate.is_among(published.earlier):
        reasons.append("this very model was published before, and another one took its place")
    for name, says in COMPARED_GROUPS.items():
        against, beside = _compare(getattr(candidate, name), getattr(published, name), says, settings.max_drop)
        reasons, notes = reasons + against, notes + beside
    decision = "same" if same and not lost else "keep" if reasons else "publish"
    return {"decision": decision, "reasons": reasons, "notes": notes}


def _compare(new: Group, old: Group, says: str, max_drop: float) -> tuple[list[str], list[str]]:
    """What a group says against the candidate, and what is to be known beside that."""
    reasons: list[str] = []
    notes: list[str] = []
    if new.n and old.n and new.images != old.images:
        counts = f"{new.n:,} images here, {old.n:,} there"
        notes.append(f"{says} is not the same for both ({counts}), so part of a difference may lie in the images")
    now, was = new.auc, old.auc
    if isinstance(was, NoInterval):
        notes.append(f"AUC on {says} decides nothing: for the published model it is not known ({was.reason})")
    elif isinstance(now, NoInterval):
        reasons.append(f"AUC on {says} is not known ({now.reason}), where the published model has {was.value:.4g}")
    elif round(was.value - now.value - max_drop, 9) > 0:
        figures = f"{now.value:.4g} is below the published {was.value:.4g}"
        reasons.append(f"AUC on {says} {figures} by more than publishing.max_drop {max_drop:g}")
    return reasons, notes


def say_decision(facts: Facts) -> str:
    """Reasons and notes of a decision, or that there is nothing against the run, in a line."""
    parts = [*facts["reasons"], *facts["notes"]]
    return "; ".join(parts) if parts else "it passed the audit and is no worse than what is published"
