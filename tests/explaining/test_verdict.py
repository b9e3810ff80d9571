"""The verdict: what holds, what fails, what is unclear, and what cannot be judged."""

from typing import Any

import pytest

from tasks.explaining.verdict import RULES, judge, turn_sign
from tasks.settings import AuditingSettings

HOW = AuditingSettings(
    min_images=20,
    max_shift=0.1,
    max_flips=0.05,
    max_outside_auc=0.75,
    min_lungs_gain=0.0,
    max_lungs_removed_auc=0.66,
    max_hole_gain=0.02,
    max_excess_lift=0.5,
    max_group_loss=0.1,
    min_gain=0.02,
)
NOTHING = {"value": None, "low": None, "high": None, "reason": "a class is missing"}


def figure(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": value if low is None else low, "high": value if high is None else high}


def change(n: int = 30, **figures: Any) -> dict[str, Any]:
    keys = ("logit", "shift", "flips", "net_shift", "net_flips")
    group = {"n": n} | {key: figures.get(key, figure(0.0)) for key in keys}
    return {"normal": group, "pneumonia": group}


def insertion(**kinds: Any) -> dict[str, Any]:
    return {"gap": 3.0} | {kind: kinds.get(kind, change()) for kind in ("drawn", "conspicuous", "real")}


def blanked(**others: Any) -> dict[str, Any]:
    lungs = {"lungs_gain": 0.3, "lungs_removed": 0.55, "hole_gain": -0.05}
    return {"n": 30, "outside": figure(0.6)} | {key: figure(v) | {"n": 30} for key, v in lungs.items()} | others


def parts(**others: Any) -> Any:
    """Figures of a network that holds every rule, with some of them replaced."""
    found = {
        "baselines": {
            "auc": figure(0.9),
            "each": {"ring": {"n": 30, "gain": figure(0.2)}, "grey": {"n": 30, "gain": figure(0.1)}},
        },
        "insertion": insertion(),
        "removal": {"gap": 3.0, "filled": change()},
        "blanked": blanked(),
        "attribution": {"n": 30, "excess_lift": figure(0.1)},
        "groups": {"n": 30, "loss": figure(0.02)},
        **others,
    }
    return {part: {"model": figures} for part, figures in found.items()}


def rule(found: Any, says: str) -> Any:
    return next(item for item in found["rules"] if says in item["says"])


def judged(**others: Any) -> Any:
    return judge(parts(**others), "model", HOW)


def test_a_network_that_holds_every_rule_passes() -> None:
    found = judged()
    assert found["passed"] is True and found["failed"] == []
    assert [item["outcome"] for item in found["rules"]] == ["holds"] * len(RULES)
    assert all(item["worse_by"] is None for item in found["rules"])
    for item in found["rules"]:
        name = item["setting"].removeprefix("auditing.")
        assert item["bound"] == getattr(HOW, name)
        assert item["at_most"] == (name not in ("min_gain", "min_lungs_gain"))


@pytest.mark.parametrize(
    ("low", "value", "outcome"),
    [(0.11, 0.2, "fails"), (0.09, 0.2, "unclear"), (0.1, 0.2, "unclear"), (0.0, 0.1, "holds"), (-0.5, -0.3, "holds")],
)
def test_a_rule_fails_only_where_its_whole_interval_lies_beyond_the_bound(
    low: float, value: float, outcome: str
) -> None:
    found = judged(groups={"n": 30, "loss": figure(value, low, 0.5)})
    item = rule(found, "AUC lost")
    assert item["outcome"] == outcome
    assert (item["value"], item["low"], item["high"], item["n"]) == (value, low, 0.5, 30)
    assert item["worse_by"] == (None if outcome == "holds" else pytest.approx(0.1))
    assert found["failed"] == (["groups"] if outcome == "fails" else [])
    assert found["passed"] is (outcome != "fails")


@pytest.mark.parametrize(
    ("high", "value", "outcome"), [(0.01, -0.1, "fails"), (0.05, 0.01, "unclear"), (0.3, 0.02, "holds")]
)
def test_the_least_gain_over_a_baseline_has_to_reach_its_bound(high: float, value: float, outcome: str) -> None:
    each = {"ring": {"n": 25, "gain": figure(0.4)}, "grey": {"n": 30, "gain": figure(value, -0.2, high)}}
    found = judged(baselines={"auc": figure(0.9), "each": {**each, "device": {"n": 0, "gain": NOTHING}}})
    item = rule(found, "gain in AUC")
    assert (item["outcome"], item["value"], item["n"]) == (outcome, value, 30)
    assert item["worse_by"] == (None if outcome == "holds" else pytest.approx(0.02 - value))
    assert found["failed"] == (["baselines"] if outcome == "fails" else [])


def test_on_few_images_nothing_is_judged_however_bad() -> None:
    found = judged(groups={"n": 19, "loss": figure(0.5)})
    item = rule(found, "AUC lost")
    assert item["outcome"] == "not judged" and "only 19 images" in item["reason"] and "min_images" in item["reason"]
    assert item["value"] == 0.5, "it is shown nevertheless"
    assert found["passed"] is True
    assert judged(groups={"n": 20, "loss": figure(0.5)})["failed"] == ["groups"]


@pytest.mark.parametrize(
    ("others", "says", "reason"),
    [
        ({"groups": {"n": 0, "reason": "no image was screened"}}, "AUC lost", "no image was screened"),
        ({"groups": {"n": 30, "loss": NOTHING}}, "AUC lost", "a class is missing"),
        ({"blanked": {"n": 30, "outside": figure(0.6)}}, "the lungs alone", "it was not measured"),
        ({"attribution": {"n": 0, "reason": "no map"}}, "LIME", "no map"),
        ({"blanked": blanked(outside=NOTHING)}, "outside", "a class is missing"),
        ({"removal": {"reason": "no device"}}, "missed without", "no device"),
        ({"removal": {"filled": change(shift=NOTHING, net_shift=NOTHING)}}, "without its device", "a class is missing"),
        ({"insertion": {"drawn": {"normal": {"n": 0, "reason": "none"}}}}, "by drawn devices", "none"),
        (
            {"baselines": {"auc": figure(0.9), "each": {"ring": {"n": 30, "gain": NOTHING}}}},
            "gain",
            "no baseline can be had",
        ),
    ],
)
def test_what_was_not_measured_is_not_judged_and_says_why(others: dict[str, Any], says: str, reason: str) -> None:
    item = rule(judged(**others), says)
    assert (item["outcome"], item["reason"]) == ("not judged", reason)
    assert item["value"] is None and item["worse_by"] is None


def test_a_part_that_fails_by_several_rules_is_named_once_and_parts_come_in_order() -> None:
    bad = change(shift=figure(0.5), flips=figure(0.5), net_shift=figure(0.5), net_flips=figure(0.5))
    found = judged(insertion=insertion(drawn=bad, conspicuous=bad, real=bad), blanked=blanked(outside=figure(0.9)))
    assert found["failed"] == ["insertion", "blanked"]
    assert [item["outcome"] for item in found["rules"]].count("fails") == 6
    assert found["passed"] is False


@pytest.mark.parametrize(
    ("key", "low", "says"),
    [
        ("lungs_removed", 0.67, "with the lungs covered"),
        ("hole_gain", 0.021, "another child's"),
    ],
)
def test_what_is_known_from_elsewhere_than_the_lungs_has_bounds(key: str, low: float, says: str) -> None:
    found = judged(blanked=blanked(**{key: figure(low + 0.05, low, 0.9) | {"n": 30}}))
    assert found["failed"] == ["blanked"] and rule(found, says)["outcome"] == "fails"
    few = judged(blanked=blanked(**{key: figure(low + 0.05, low, 0.9) | {"n": 19}}))
    assert few["failed"] == [] and rule(few, says)["outcome"] == "not judged", "its own images count"


@pytest.mark.parametrize(("high", "outcome"), [(-0.01, "fails"), (0.01, "unclear")])
def test_a_network_may_not_know_less_from_the_lungs_than_without_them(high: float, outcome: str) -> None:
    found = judged(blanked=blanked(lungs_gain=figure(-0.05, -0.09, high) | {"n": 30}))
    assert rule(found, "the lungs alone")["outcome"] == outcome
    assert found["failed"] == (["blanked"] if outcome == "fails" else [])


@pytest.mark.parametrize(("shift", "outcome"), [(-0.4, "fails"), (0.4, "holds")])
def test_pneumonia_may_not_move_towards_normal_when_its_device_goes(shift: float, outcome: str) -> None:
    found = judged(removal={"filled": change(net_shift=figure(shift, shift - 0.1, shift + 0.1))})
    item = rule(found, "shift of pneumonia")
    assert item["outcome"] == outcome
    assert item["value"] == -shift and item["low"] == pytest.approx(-shift - 0.1)


def test_a_real_device_is_judged_by_what_is_left_of_it_without_its_control() -> None:
    found = judged(insertion=insertion(real=change(shift=figure(0.9), net_shift=figure(0.05))))
    assert rule(found, "by real devices")["value"] == 0.05
    assert found["failed"] == []


def test_without_insertion_and_removal_there_is_no_verdict_but_a_reason() -> None:
    nothing = {"reason": "no image of the audited split is known to show no device"}
    found = judged(insertion=nothing, removal=nothing)
    assert found["passed"] is None and found["failed"] == [] and "devices" in found["reason"]
    one = judged(insertion=nothing)
    assert one["passed"] is True and "reason" not in one


def test_without_insertion_and_removal_another_part_may_fail_all_the_same() -> None:
    nothing = {"reason": "none"}
    found = judged(insertion=nothing, removal=nothing, blanked=blanked(outside=figure(0.9)))
    assert found["passed"] is False and found["failed"] == ["blanked"]


@pytest.mark.parametrize("auc", [figure(0.6, 0.5, 0.7), NOTHING])
def test_a_network_that_may_tell_nothing_apart_has_no_verdict(auc: dict[str, Any]) -> None:
    each = {"ring": {"n": 30, "gain": figure(0.2)}}
    found = judged(baselines={"auc": auc, "each": each})
    assert found["passed"] is None and "tell the classes apart" in found["reason"]


def test_turning_the_sign_turns_the_interval_and_leaves_nothing_as_it_is() -> None:
    assert turn_sign({"value": 0.2, "low": -0.1, "high": 0.5}) == {"value": -0.2, "low": -0.5, "high": 0.1}
    assert turn_sign(NOTHING) == NOTHING


def test_each_network_is_judged_by_its_own_figures() -> None:
    found = parts()
    for part, figures in parts(blanked=blanked(outside=figure(0.95))).items():
        found[part]["unfiltered"] = figures["model"]
    assert judge(found, "model", HOW)["passed"] is True
    assert judge(found, "unfiltered", HOW)["failed"] == ["blanked"]
