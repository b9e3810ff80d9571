"""The verdict of the audit: figures of its parts against bounds from the settings, rule by rule."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tasks.records import Facts
from tasks.settings import AuditingSettings


@dataclass(frozen=True)
class Rule:
    """One figure of a part with its bound.

    Attributes:
        part: The part of the audit.
        says: What is bounded, for people.
        find: Takes the part's figures of a network; returns the figure ``{"value", "low", "high"}`` and how many images
            it rests on, or a reason why there is none.
        bound: Name of the setting.
        at_most: Whether the bound is the largest accepted figure, or else the smallest.
    """

    part: str
    says: str
    find: Callable[[Facts], "tuple[Facts, int] | str"]
    bound: str
    at_most: bool = True


def _change(variant: str, label: str, key: str, sign: int = 1) -> Callable[[Facts], "tuple[Facts, int] | str"]:
    def find(part: Facts) -> "tuple[Facts, int] | str":
        if variant not in part:
            return str(part.get("reason", "it was not measured"))
        group = part[variant][label]
        if not group["n"]:
            return str(group["reason"])
        return (turn_sign(group[key]) if sign < 0 else group[key]), int(group["n"])

    return find


def turn_sign(figure: Facts) -> Facts:
    """A figure times -1; its interval's ends change places."""
    if figure["value"] is None:
        return figure
    return {"value": -figure["value"], "low": -figure["high"], "high": -figure["low"]}


def _plain(*path: str) -> Callable[[Facts], "tuple[Facts, int] | str"]:
    def find(part: Facts) -> "tuple[Facts, int] | str":
        found: Any = part
        for name in path:
            if name not in found:
                return str(part.get("reason", "it was not measured"))
            found = found[name]
        return found, int(part["n"])

    return find


def _counted(name: str) -> Callable[[Facts], "tuple[Facts, int] | str"]:
    def find(part: Facts) -> "tuple[Facts, int] | str":
        if name not in part:
            return "it was not measured"
        return part[name], int(part[name]["n"])

    return find


def _least_gain(part: Facts) -> "tuple[Facts, int] | str":
    gains = [one["gain"] | {"n": one["n"]} for one in part["each"].values() if one["gain"]["value"] is not None]
    if not gains:
        return "no baseline can be had"
    least = min(gains, key=lambda gain: float(gain["value"]))
    return least, int(least["n"])


RULES = (
    Rule("baselines", "gain in AUC over the best baseline", _least_gain, "min_gain", at_most=False),
    Rule("insertion", "shift of normal images by drawn devices", _change("drawn", "normal", "shift"), "max_shift"),
    Rule(
        "insertion",
        "normal images called pneumonia for a drawn device",
        _change("drawn", "normal", "flips"),
        "max_flips",
    ),
    Rule(
        "insertion",
        "shift of normal images by conspicuous devices",
        _change("conspicuous", "normal", "shift"),
        "max_shift",
    ),
    Rule("insertion", "shift of normal images by real devices", _change("real", "normal", "net_shift"), "max_shift"),
    Rule(
        "insertion",
        "normal images called pneumonia for a real device",
        _change("real", "normal", "net_flips"),
        "max_flips",
    ),
    Rule(
        "removal",
        "shift of pneumonia towards normal without its device",
        _change("filled", "pneumonia", "net_shift", -1),
        "max_shift",
    ),
    Rule("removal", "pneumonia missed without its device", _change("filled", "pneumonia", "net_flips"), "max_flips"),
    Rule("blanked", "AUC from outside of the lung window alone", _plain("outside"), "max_outside_auc"),
    Rule(
        "blanked",
        "AUC from the lungs alone above that without them",
        _counted("lungs_gain"),
        "min_lungs_gain",
        at_most=False,
    ),
    Rule("blanked", "AUC with the lungs covered", _counted("lungs_removed"), "max_lungs_removed_auc"),
    Rule(
        "blanked",
        "AUC with the lungs covered above that with another child's lungs covered",
        _counted("hole_gain"),
        "max_hole_gain",
    ),
    Rule(
        "attribution",
        "LIME weight on devices above that on the same places without one",
        _plain("excess_lift"),
        "max_excess_lift",
    ),
    Rule("groups", "AUC lost where the device points the wrong way", _plain("loss"), "max_group_loss"),
)


def judge(parts: Facts, network: str, settings: AuditingSettings) -> Facts:
    """The verdict about one network.

    A rule *fails* where its whole 95 % interval lies beyond the bound, is *unclear* where the figure does but its
    interval reaches back, and is *not judged* on fewer images than ``min_images`` or without a figure.

    Args:
        parts: Of ``audit.json``: part -> network -> figures.
        network: ``model`` or ``unfiltered``.
        settings: The bounds.

    Returns:
        ``passed``, ``None`` with a ``reason`` where neither insertion nor removal could be judged, or where the network
        is not seen to tell the classes apart, or to do so better than the baselines; ``failed`` (parts, each once), and
        ``rules``: ``part, says, value, low, high, n, bound, at_most, outcome, worse_by, reason``.
    """
    rules = [_apply(rule, parts[rule.part][network], settings) for rule in RULES]
    failed = list(dict.fromkeys(rule["part"] for rule in rules if rule["outcome"] == "fails"))
    verdict: Facts = {"passed": not failed, "failed": failed, "rules": rules}
    if failed:
        return verdict
    if not any(rule["part"] in ("insertion", "removal") and rule["outcome"] != "not judged" for rule in rules):
        return verdict | {"passed": None, "reason": "too few images to put devices on and take them off"}
    auc = parts["baselines"][network]["auc"]
    if auc["value"] is None or auc["low"] <= 0.5:
        return verdict | {"passed": None, "reason": "the network is not seen to tell the classes apart"}
    if any(rule["part"] == "baselines" and rule["outcome"] != "holds" for rule in rules):
        # What tells nothing apart minds no device either.
        return verdict | {"passed": None, "reason": "the network is not seen to beat what sees no lung"}
    return verdict


def _apply(rule: Rule, part: Facts, settings: AuditingSettings) -> Facts:
    bound = float(getattr(settings, rule.bound))
    result: Facts = {"part": rule.part, "says": rule.says, "setting": f"auditing.{rule.bound}", "bound": bound}
    result |= {"at_most": rule.at_most, "value": None, "low": None, "high": None, "n": 0, "worse_by": None}
    found = rule.find(part)
    if isinstance(found, str):
        return result | {"outcome": "not judged", "reason": found}
    figure, n = found
    if figure["value"] is None:
        return result | {"outcome": "not judged", "reason": figure["reason"], "n": n}
    result |= {"value": figure["value"], "low": figure["low"], "high": figure["high"], "n": n}
    if n < settings.min_images:
        return result | {"outcome": "not judged", "reason": f"only {n} images; auditing.min_images asks for more"}
    beyond, near = (
        (figure["value"] - bound, figure["low"] - bound)
        if rule.at_most
        else (bound - figure["value"], bound - figure["high"])
    )
    if beyond <= 0:
        return result | {"outcome": "holds"}
    return result | {"outcome": "fails" if near > 0 else "unclear", "worse_by": round(beyond, 4)}
