"""The rules of publishing: who takes over, and what a rollback leads to."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import RunError
from tasks.files import write_json
from tasks.publishing.published import read_published
from tasks.publishing.rules import MOST_KEPT, Candidate, Entry, Published, succeed, weigh_candidate
from tasks.records import Facts
from tasks.settings import PublishingSettings, Settings

GROUPS = ("val", "val_device_free")
NO_AUC: Facts = {"value": None, "low": None, "high": None, "reason": "a class is missing in this group"}


def entry(run: str = "new", val: float | None = 0.95, free: float | None = 0.94, **more: Any) -> Entry:
    """What is said of a run, with a model of its own."""
    aucs = [NO_AUC if auc is None else {"value": auc, "low": auc - 0.02, "high": auc + 0.02} for auc in (val, free)]
    groups = {name: {"n": 60, "auc": auc, "images": "the same"} for name, auc in zip(GROUPS, aucs, strict=True)}
    said = {"run": run, "run_dir": f"/runs/{run}", "model_sha256": f"model of {run}", "published": "2026-01-01"}
    return Entry.model_validate({**said, "audit": {"passed": True, "failed": []}, **groups, **more})


def published_by(*entries: Entry) -> Published:
    """What is published after these runs took over one after the other."""
    published: Published | None = None
    for turn, one in enumerate(entries):
        published = succeed(one, published, f"2026-01-{turn + 1:02}")
    assert published is not None
    return published


def decide_on(candidate: Candidate, published: Published | None, **more: Any) -> Facts:
    return weigh_candidate(candidate, published, PublishingSettings(max_drop=0.01), **more)


@pytest.mark.parametrize("auc", [float("nan"), float("inf"), -0.1, "0.9", None])
def test_what_is_published_with_an_auc_that_is_none_is_refused_and_not_taken_for_a_low_one(
    tmp_path: Path, auc: Any
) -> None:
    published = published_by(entry("a"), entry("b")).model_dump()
    write_json(tmp_path / "published.json", published)
    found = read_published(str(tmp_path), Settings())
    assert found is not None and found.model_dump() == published
    published["val"]["auc"]["value"] = auc
    (tmp_path / "published.json").write_text(json.dumps(published))
    with pytest.raises(RunError, match=r"published\.json is not as publishing writes it"):
        read_published(str(tmp_path), Settings())


def test_what_an_earlier_version_published_is_written_as_it_was_but_for_what_nobody_knows(tmp_path: Path) -> None:
    old = published_by(entry("a"), entry("b", free=None)).step_back("2026-02-01").model_dump()
    write_json(tmp_path / "published.json", old | {"other": 1, "val": old["val"] | {"other": 2}})
    found = read_published(str(tmp_path), Settings())
    assert found is not None and found.model_dump() == old
    assert old["withdrawn"][0]["val_device_free"]["auc"] == NO_AUC
    assert set(old) == {*Entry.model_fields, "earlier", "withdrawn"}
    assert set(old["val"]["auc"]) == {"value", "low", "high"} and set(old["audit"]) == {"passed", "failed"}


def test_the_first_model_is_published_if_its_audit_passed() -> None:
    assert decide_on(entry(val=0.6), None) == {"decision": "publish", "reasons": [], "notes": []}
    failed = decide_on(entry(audit={"passed": False, "failed": ["insertion", "removal"]}), None)
    assert (failed["decision"], failed["reasons"]) == ("keep", ["the audit failed (insertion, removal)"])
    none = decide_on(entry(audit={"passed": None, "failed": [], "reason": "too few images"}), None)
    assert (none["decision"], none["reasons"]) == ("keep", ["the audit came to no verdict (too few images)"])


@pytest.mark.parametrize(
    ("val", "free", "decision"),
    [
        (0.99, 0.99, "publish"),
        (0.95, 0.94, "publish"),
        (0.94, 0.93, "publish"),  # as much lower as is accepted
        (0.9399, 0.94, "keep"),
        (0.99, 0.9299, "keep"),
    ],
)
def test_a_model_that_is_worse_in_either_group_is_not_published(val: float, free: float, decision: str) -> None:
    assert decide_on(entry(val=val, free=free), published_by(entry("old")))["decision"] == decision


def test_what_speaks_against_a_model_is_said_with_its_figures_and_the_setting() -> None:
    said = decide_on(entry(val=0.912, free=0.5), published_by(entry("old", val=0.951)))["reasons"]
    assert said == [
        "AUC on validation 0.912 is below the published 0.951 by more than publishing.max_drop 0.01",
        "AUC on validation without devices 0.5 is below the published 0.94 by more than publishing.max_drop 0.01",
    ]


def test_a_better_model_whose_audit_failed_or_came_to_no_verdict_is_not_published() -> None:
    for passed in (False, None):
        audit = {"passed": passed, "failed": ["removal"], "reason": "too few images"}
        assert decide_on(entry(val=1.0, free=1.0, audit=audit), published_by(entry("old")))["decision"] == "keep"


def test_a_group_unknown_for_the_published_model_decides_nothing_and_is_named() -> None:
    said = decide_on(entry(free=0.1), published_by(entry("old", free=None)))
    assert said["decision"] == "publish"
    assert said["notes"] == [
        "AUC on validation without devices decides nothing: for the published model it is not known "
        "(a class is missing in this group)"
    ]


def test_a_model_not_measured_where_the_published_one_is_cannot_take_over() -> None:
    said = decide_on(entry(free=None), published_by(entry("old")))
    assert said["decision"] == "keep"
    assert "is not known (a class is missing in this group), where the published model has 0.94" in said["reasons"][0]
    assert decide_on(entry(free=None), published_by(entry("old", free=None)))["decision"] == "publish"


def test_that_validation_differs_is_said_and_decides_nothing() -> None:
    others = entry().val.model_copy(update={"n": 70, "images": "others"})
    candidate = entry().model_copy(update={"val": others})
    said = decide_on(candidate, published_by(entry("old")))
    assert said["decision"] == "publish"
    (note,) = said["notes"]
    assert note.startswith("validation is not the same for both (70 images here, 60 there)")


def test_what_a_person_rolled_back_or_another_model_replaced_comes_back_only_by_hand() -> None:
    old, new = entry("old"), entry("new")
    back = published_by(old, new).step_back("2026-02-01")
    assert decide_on(new, back)["reasons"] == ["a person rolled this very model back"]
    assert decide_on(new, back, by_hand=True)["decision"] == "publish"
    assert succeed(new, back, "2026-02-02").withdrawn == []
    replaced = published_by(old, new)
    assert decide_on(old, replaced)["decision"] == "keep"
    assert decide_on(old, replaced, by_hand=True)["decision"] == "publish"


def test_a_rollback_leads_to_what_was_published_before_step_by_step() -> None:
    published = published_by(entry("a"), entry("b"), entry("c"))
    once = published.step_back("now")
    twice = once.step_back("later")
    assert [once.run, twice.run] == ["b", "a"]
    assert [one.run for one in twice.withdrawn] == ["b", "c"]
    assert twice.earlier == []
    assert once.published == "2026-01-02", "since when a model is in use is not made up"


def test_nothing_is_remembered_that_cannot_be_gone_back_to_and_the_list_has_an_end() -> None:
    assert succeed(entry("b", model_sha256="model of a"), published_by(entry("a")), "now").earlier == []
    assert succeed(entry("a", model_sha256="another"), published_by(entry("a")), "now").earlier == []
    many = published_by(*(entry(str(i)) for i in range(MOST_KEPT + 5)))
    assert [one.run for one in many.earlier] == [str(i) for i in range(MOST_KEPT + 3, 3, -1)]
