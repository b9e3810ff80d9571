"""The rules of publishing, on plain values: which run takes over, and what ``published.json`` is then.

Its form stands in ``tasks.publishing``.
"""

from tasks.measures import format_value
from tasks.records import Facts, RunError
from tasks.settings import PublishingSettings

GROUPS = {"val": "validation", "val_device_free": "validation without devices"}
TEXTS = ("run", "run_dir", "model_sha256")
MOST_KEPT = 20
"""Earlier and withdrawn models that are remembered, of each."""


def decide(
    candidate: Facts,
    published: Facts | None,
    settings: PublishingSettings,
    *,
    lost: str | None = None,
    by_hand: bool = False,
) -> Facts:
    """Whether a run takes over.

    Args:
        candidate: From ``describe_candidate``.
        published: What is published; ``None`` for nothing.
        settings: The largest accepted drop.
        lost: Why the run of the published model cannot be used any more (``find_problem``); its figures count still.
        by_hand: A person asks for it, so it may have been published or rolled back before.

    Returns:
        ``decision``: ``publish``, ``keep`` (what is published stays) or ``same`` (this very model is published);
        ``reasons`` against it; ``notes``, which decide nothing.
    """
    audit = candidate["audit"]
    reasons: list[str] = []
    notes: list[str] = []
    if audit["passed"] is None:
        reasons.append(f"the audit came to no verdict ({audit['reason']})")
    elif not audit["passed"]:
        reasons.append(f"the audit failed ({', '.join(audit['failed'])})")
    if published is None:
        return {"decision": "keep" if reasons else "publish", "reasons": reasons, "notes": notes}
    if lost:
        notes.append(f"the published run {published['run']} cannot be used any more: {lost}")
    same = candidate["model_sha256"] == published["model_sha256"]
    if not by_hand and _is_among(candidate, published["withdrawn"]):
        reasons.append("a person rolled this very model back")
    elif not by_hand and not same and _is_among(candidate, published["earlier"]):
        reasons.append("this very model was published before, and another one took its place")
    for name, says in GROUPS.items():
        against, beside = _compare(candidate[name], published[name], says, settings.max_drop)
        reasons, notes = reasons + against, notes + beside
    if same and not lost:
        return {"decision": "same", "reasons": reasons, "notes": notes}
    return {"decision": "keep" if reasons else "publish", "reasons": reasons, "notes": notes}


def _compare(new: Facts, old: Facts, says: str, max_drop: float) -> tuple[list[str], list[str]]:
    """What a group says against the candidate, and what is to be known beside that."""
    notes = []
    if new["n"] and old["n"] and new["images"] != old["images"]:
        counts = f"{new['n']:,} images here, {old['n']:,} there"
        notes.append(f"{says} is not the same for both ({counts}), so part of a difference may lie in the images")
    was, now = old["auc"]["value"], new["auc"]["value"]
    if was is None:
        why = old["auc"]["reason"]
        return [], [*notes, f"AUC on {says} decides nothing: for the published model it is not known ({why})"]
    if now is None:
        why = new["auc"]["reason"]
        return [f"AUC on {says} is not known ({why}), where the published model has {was:.4g}"], notes
    if round(was - now - max_drop, 9) > 0:
        said = f"AUC on {says} {now:.4g} is below the published {was:.4g} by more than publishing.max_drop {max_drop:g}"
        return [said], notes
    return [], notes


def succeed(candidate: Facts, published: Facts | None, now: str) -> Facts:
    """``published.json`` after a run took over."""
    before, withdrawn = [], []
    if published is not None:
        before, withdrawn = [alone(published), *published["earlier"]], published["withdrawn"]
    # What cannot be told apart from it, or lay in its folder, is nothing to go back to.
    earlier = [one for one in before if not _is_among(candidate, [one]) and one["run"] != candidate["run"]]
    withdrawn = [one for one in withdrawn if not _is_among(candidate, [one])]
    return {**candidate, "published": now, "earlier": earlier[:MOST_KEPT], "withdrawn": withdrawn}


def step_back(published: Facts, now: str) -> Facts:
    """``published.json`` after a rollback to the newest of ``earlier``."""
    back, *earlier = published["earlier"]
    withdrawn = [{**alone(published), "withdrawn": now}, *published["withdrawn"]]
    return {**back, "earlier": earlier, "withdrawn": withdrawn[:MOST_KEPT]}


def check_published(published: Facts, address: str) -> Facts:
    """What was read from ``address``, if it has the form that publishing writes.

    Raises:
        RunError: If not.
    """
    lists = [published.get(name) for name in ("earlier", "withdrawn")]
    entries = [published, *(one for part in lists if isinstance(part, list) for one in part)]
    dated = all(isinstance(part, list) for part in lists) and all(
        isinstance(one, dict) and isinstance(one.get(when), str)
        for when, some in (("published", entries), ("withdrawn", published["withdrawn"]))
        for one in some
    )
    if not (dated and all(map(is_entry, entries))):
        raise RunError(f"{address} is not as publishing writes it; put back a whole copy, or remove it")
    return published


def is_entry(one: Facts) -> bool:
    """Whether it says of a model what ``published.json`` does, but for when."""
    texts = all(isinstance(one.get(key), str) for key in TEXTS) and "/" not in one["run"]
    return texts and _is_verdict(one.get("audit")) and all(_is_group(one.get(name)) for name in GROUPS)


def _is_verdict(audit: object) -> bool:
    if not isinstance(audit, dict):
        return False
    passed, failed = audit.get("passed", ""), audit.get("failed")
    named = isinstance(failed, list) and all(isinstance(rule, str) for rule in failed)
    return isinstance(audit.get("reason"), str) if passed is None else isinstance(passed, bool) and named


def _is_group(group: object) -> bool:
    if not isinstance(group, dict) or not isinstance(group.get("auc"), dict):
        return False
    auc = group["auc"]
    known = all(isinstance(auc.get(key), int | float) for key in ("value", "low", "high"))
    known = known and 0 <= auc["value"] <= 1  # a NaN, which Python reads, would be below nothing
    unknown = auc.get("value", 0) is None and isinstance(auc.get("reason"), str)
    return isinstance(group.get("n"), int) and isinstance(group.get("images"), str) and (known or unknown)


def say_decision(facts: Facts) -> str:
    """Reasons and notes of a decision, or that there is nothing against the run, in a line."""
    said = [*facts["reasons"], *facts["notes"]]
    return "; ".join(said) if said else "it passed the audit and is no worse than what is published"


def describe_model(entry: Facts) -> str:
    """``20261123T030000Z-sample (AUC on validation 0.962 (0.941 to 0.983), on …)``."""
    figures = ", ".join(f"on {says} {format_value(entry[name]['auc'])}" for name, says in GROUPS.items())
    return f"{entry['run']} (AUC {figures})"


def alone(published: Facts) -> Facts:
    """An entry without what was before it."""
    return {key: value for key, value in published.items() if key not in ("earlier", "withdrawn")}


def _is_among(candidate: Facts, entries: list[Facts]) -> bool:
    return any(one["model_sha256"] == candidate["model_sha256"] for one in entries)
