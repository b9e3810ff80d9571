"""The part of the report that puts the run beside the published one and says whether it takes over."""

from datetime import datetime

from tasks.files import read_json
from tasks.measures import describe_value
from tasks.records import Facts
from tasks.runs.run import Run

COMPARED_NAMES = {"val": "AUC, validation", "val_device_free": "AUC, validation without a device"}


def describe_published(run: Run) -> Facts | None:
    """All that the section shows; ``None`` where publishing is off, or nothing was weighed."""
    path = run.folder / "publishing.json"
    if not run.settings.publishing.enabled or not path.exists():
        return None
    facts = read_json(path)
    published = facts["published"]
    shown = [facts["this"]] if published is None else [facts["this"], published]
    since = [f"{datetime.fromisoformat(one['published']):%-d %B %Y, %H:%M} UTC" for one in shown[1:]]
    return {
        "sentence": say_weighed(facts),
        "publishes": facts["decision"] == "publish",
        "refused": facts["decision"] == "keep",
        "heads": ["This model", "Published model"][: len(shown)],
        "max_drop": f"{facts['max_drop']:g}",
        "compared": published is not None,
        "runs": [entry["run"] for entry in shown],
        "since": since * 2 if facts["decision"] == "same" else ["not yet", *since],
        "verdicts": [say_verdict(entry["audit"]) for entry in shown],
        "rows": [
            {
                "title": title,
                "cells": [{"n": entry[name]["n"], **describe_value(entry[name]["auc"])} for entry in shown],
            }
            for name, title in COMPARED_NAMES.items()
        ],
        "notes": [note[:1].upper() + note[1:] for note in facts["notes"]],
    }


def say_weighed(facts: Facts) -> str:
    """What was decided, in a sentence."""
    if facts["decision"] == "same":
        against = f" It would not be published now: {'; '.join(facts['reasons'])}." if facts["reasons"] else ""
        return f"This very model is already published.{against}"
    if facts["decision"] == "keep":
        stays = "" if facts["published"] is None else f" {facts['published']['run']} stays published."
        return f"This model is not published: {'; '.join(facts['reasons'])}.{stays}"
    if facts["published"] is None:
        return "Nothing is published yet. This model passed the audit and will be published once its run is sealed."
    return (
        "This model will be published once its run is sealed: it passed the audit, and none of these AUCs is below "
        f"that of the published model by more than {facts['max_drop']:g}."
    )


def say_verdict(audit: Facts) -> str:
    """The verdict of an audit in a few words."""
    if audit["passed"] is None:
        return f"no verdict: {audit['reason']}"
    return "passed" if audit["passed"] else f"failed: {', '.join(audit['failed'])}"
