"""The part of the report that says what the network looks at: verdict, devices put on and taken off, blanked lungs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.explaining.baselines import SAYS, SHAPE_SAYS
from tasks.explaining.pictures import FAINTEST
from tasks.files import read_json
from tasks.findings import NOT_MEASURED, Audit, NetworkVerdict, read_audit
from tasks.measures import describe_value
from tasks.pixels.window import WINDOW
from tasks.records import FOREIGN, MODEL, TWIN, Facts
from tasks.reporting.inputs import SPLIT_NAMES
from tasks.reporting.lungs import PLACES, describe_lungs

HEADS = {(MODEL,): ["This model"], (MODEL, TWIN): ["This model", "Without screening"]}
HEADS[(FOREIGN, MODEL)] = ["This network", "The run’s model"]
"""Titles of the columns, by the networks of the audit."""
OTHERS = {
    TWIN: "It is compared with a twin. The twin was trained with the same seeds and epochs, and on as many images of "
    "each class, but without screening for devices.",
    MODEL: "It is compared with the model of the run, which was asked about the same changed images.",
}
SUBJECTS = {MODEL: "The model", FOREIGN: "The network"}
COMPARISONS = {
    TWIN: (
        "Its twin, trained without screening,",
        "with screening",
        "Screening made no difference that the intervals can show",
    ),
    MODEL: ("The run’s model", "than the run’s model", "The intervals show no difference to it"),
}
"""Of the other network: what it is, how the first is better or worse, and what is said where it is neither."""
INSERTIONS = {
    "electrode": "Electrodes, drawn",
    "line": "Lines, drawn",
    "tube": "Tubes, drawn",
    "clip": "Clips, drawn",
    "drawn": "Devices as they occur together, drawn",
    "conspicuous": "The same, conspicuous",
    "real": "Real devices of other images",
}
REMOVALS = {"filled": "Device taken off"}
"""Titles of the probes; one that has none here is shown after these, under its own name."""
AUDIT_GROUPS = {
    "with_device": ("Images with a device", ("auc", "sensitivity", "specificity")),
    "device_free": ("Images without", ("auc", "sensitivity", "specificity")),
    "along": ("Normal without, pneumonia with a device", ("auc",)),
    "against": ("Normal with, pneumonia without a device", ("auc",)),
}
LIFTS = {
    "device_lift": ("Devices", "n_device"),
    "control_lift": ("The same places on images without one", "n_control"),
    "window_lift": ("The lung window", "n_window"),
}
OUTCOMES = {"holds": "ok", "unclear": "warned", "fails": "bad", "not judged": "quiet"}


def describe_audit(run: Path) -> Facts:
    """All that the section shows.

    Raises:
        RunError: If the run folder has no ``audit.json``.
    """
    audit = read_audit(run)
    names = list(audit.verdict.names)
    verdicts = [audit.verdict.of(name) for name in names]
    return {
        "n": audit.n_images,
        "split": SPLIT_NAMES[audit.split],
        "other": OTHERS[names[1]] if len(names) > 1 else None,
        "heads": HEADS[audit.verdict.names],
        "sentence": say_verdict(verdicts[0], SUBJECTS[names[0]]),
        "passed": verdicts[0].passed,
        "comparison": say_comparison(verdicts[0], verdicts[1], COMPARISONS[names[1]]) if len(names) > 1 else None,
        "rules": describe_rules(verdicts),
        "changes": describe_changes(audit, names),
        "places": describe_places(audit, names),
        "figure": draw_changes(audit, names),
        "sights": describe_sights(audit, names),
        "lungs": describe_lungs(audit, names, HEADS[audit.verdict.names]),
        "window": [f"{100 * share:.0f} %" for share in WINDOW],
        "window_share": f"{100 * audit.blanked[MODEL]['window_share']:.0f} %",
        "lifts": describe_lifts(audit.attribution, names),
        "groups": describe_groups(audit.groups, names),
        "pair": find_pair(run) if TWIN in names else None,
    }


def say_verdict(verdict: NetworkVerdict, subject: str = SUBJECTS[MODEL]) -> str:
    """The verdict about a network in one or two sentences."""
    rules = verdict.rules
    if verdict.passed is None:
        return f"The audit came to no verdict: {verdict.reason}."
    counts = {outcome: sum(rule["outcome"] == outcome for rule in rules) for outcome in OUTCOMES}
    if verdict.passed:
        text = f"{subject} passed the audit: none of {len(rules)} rules is broken"
    else:
        broken = "; ".join(
            f"{rule['says']}: {rule['value']:.3g}, where at {'most' if rule['at_most'] else 'least'} {rule['bound']:g} "
            "is accepted"
            for rule in rules
            if rule["outcome"] == "fails"
        )
        text = f"{subject} failed the audit ({broken})"
    also = [
        f"{counts[outcome]} {word}"
        for outcome, word in (("unclear", "unclear"), ("not judged", "could not be judged"))
        if counts[outcome]
    ]
    return text + (f"; {' and '.join(also)}." if also else ".")


def say_comparison(own: NetworkVerdict, other: NetworkVerdict, words: tuple[str, str, str] = COMPARISONS[TWIN]) -> str:
    """What two networks differ in, of what the rules look at: only what both intervals tell apart counts."""
    who, how, no_difference = words
    outcome = {True: "passed", False: f"failed ({', '.join(other.failed)})", None: "came to no verdict"}
    first = f"{who} {outcome[other.passed]}. "
    better, worse, same = [], [], 0
    for one, two in zip(own.rules, other.rules, strict=True):
        if one["value"] is None or two["value"] is None:
            continue
        sign = 1 if one["at_most"] else -1
        if sign * one["high" if sign > 0 else "low"] < sign * two["low" if sign > 0 else "high"]:
            better.append(one["says"])
        elif sign * one["low" if sign > 0 else "high"] > sign * two["high" if sign > 0 else "low"]:
            worse.append(one["says"])
        else:
            same += 1
    if not better and not worse:
        return first + f"{no_difference}, in any of {same} figures."
    sentences = []
    if better:
        sentences.append(f"Better {how}: {', '.join(better)}.")
    if worse:
        sentences.append(f"Worse {how}: {', '.join(worse)}.")
    if same:
        sentences.append(f"The intervals of {same} other figures overlap, so they show no difference.")
    return first + " ".join(sentences)


def describe_rules(verdicts: Sequence[NetworkVerdict]) -> list[Facts]:
    """A row per rule: bound, and for each network figure and outcome."""
    rows = []
    for same in zip(*(verdict.rules for verdict in verdicts), strict=True):
        rule, cells = same[0], []
        for one in same:
            shown = describe_value(one)
            cells.append({**shown, "outcome": one["outcome"], "style": OUTCOMES[one["outcome"]], "n": one["n"]})
            if one["outcome"] == "not judged":
                cells[-1]["reason"] = one["reason"]
        bound = f"{'at most' if rule['at_most'] else 'at least'} {rule['bound']:g}"
        rows.append({"part": rule["part"], "says": rule["says"], "bound": bound, "cells": cells})
    return rows


@dataclass(frozen=True)
class Probe:
    """A kind of change, with what each network says of the images that it is asked for.

    Attributes:
        title: What was changed.
        label: The class of these images.
        groups: By network: ``n`` with ``shift``, ``flips`` and, where there is a control, ``net_shift``; or a reason.
        places: By place of the device, the same; empty in older runs.
    """

    title: str
    label: str
    groups: list[Facts]
    places: dict[str, list[Facts]]


def list_probes(audit: Audit, names: list[str]) -> list[Probe]:
    """All probes of an audit: devices put on normal images, then devices taken off pneumonia images."""
    probes = []
    for part, titles, label in ((audit.insertion, INSERTIONS, "normal"), (audit.removal, REMOVALS, "pneumonia")):
        found = [key for key, value in part[MODEL].items() if isinstance(value, dict)]
        for key in [*(key for key in titles if key in found), *(key for key in found if key not in titles)]:
            title = titles.get(key, key.replace("_", " ").capitalize())
            found_by = [part[name][key] for name in names]
            places = {place: [one[place][label] for one in found_by] for place in PLACES if place in found_by[0]}
            probes.append(Probe(title, label, [one[label] for one in found_by], places))
    return probes


def describe_changes(audit: Audit, names: list[str]) -> Facts:
    """A row per probe, with what it does to each network; or why nothing could be changed."""
    rows = []
    for probe in list_probes(audit, names):
        cells = []
        for group in probe.groups:
            if not group["n"]:
                cells.append({"reason": group["reason"]})
                continue
            cells.append(
                {
                    "reason": None,
                    "shift": describe_value(group["shift"]),
                    "net": describe_value(group["net_shift"]) if "net_shift" in group else None,
                    "flips": describe_value(group["flips"], percent=True),
                }
            )
        rows.append({"title": probe.title, "label": probe.label, "n": probe.groups[0]["n"], "cells": cells})
    reasons = [part[MODEL]["reason"] for part in (audit.insertion, audit.removal) if "reason" in part[MODEL]]
    return {"rows": rows, "reasons": list(dict.fromkeys(reasons))}


def describe_places(audit: Audit, names: list[str]) -> list[Facts]:
    """A row per probe and place of the device, with the shift of each network; empty in older runs."""
    rows = []
    for probe in list_probes(audit, names):
        for place, groups in probe.places.items():
            cells = [describe_value(group.get("shift") or NOT_MEASURED | group) for group in groups]
            n, first = groups[0]["n"], place == next(iter(probe.places))
            row = {"title": probe.title, "label": probe.label, "place": PLACES[place], "n": n}
            rows.append({**row, "first": first, "cells": cells})
    return rows


def draw_changes(audit: Audit, names: list[str]) -> str | None:
    """The shifts as a figure; ``None`` where there are none."""
    from tasks.reporting.figures import as_svg, draw_shifts

    rows: list[Facts] = []
    for probe in list_probes(audit, names):
        found = [group.get("shift") for group in probe.groups]
        if any(figure and figure["value"] is not None for figure in found):
            rows.append({"name": probe.title.removesuffix(", drawn"), "values": found})
    if not rows:
        return None
    bound = next(rule["bound"] for rule in audit.verdict.of(names[0]).rules if rule["setting"] == "auditing.max_shift")
    heads = HEADS[audit.verdict.names]
    says = "; ".join(
        f"{row['name']}: "
        + ", ".join(
            f"{head} {v['value']:.3f}"
            for head, v in zip(heads, row["values"], strict=True)
            if v and v["value"] is not None
        )
        for row in rows
    )
    return as_svg(draw_shifts(rows, heads, bound), "shifts", "Shift of the answer when a device comes or goes", says)


def describe_sights(audit: Audit, names: list[str]) -> list[Facts]:
    """AUC of each network on whole and blanked images, and of the baselines that see no lung."""
    rows: list[Facts] = []
    for key, title in (
        ("whole", "The whole image"),
        ("inside", "Only the lung window"),
        ("outside", "Only what is outside of it"),
        ("lungs_only", "Only the lungs"),
        ("lungs_removed", "All but the lungs"),
        ("other_lungs_removed", "All but where another child’s lungs are"),
    ):
        if key not in audit.blanked[MODEL]:
            continue  # an older run
        cells = [describe_value(audit.blanked[name][key]) for name in names]
        rows.append({"title": title, "who": "network", "cells": cells})
    for key, says in SAYS.items():
        one = audit.baselines[MODEL]["each"][key]
        rows.append({"title": says[0].upper() + says[1:], "who": "baseline", "cells": [describe_value(one["auc"])]})
    if shape := audit.blanked[MODEL].get("lungs_shape"):
        says = SHAPE_SAYS[0].upper() + SHAPE_SAYS[1:]
        rows.append({"title": says, "who": "shape", "cells": [describe_value(shape)]})
    return rows


def describe_lifts(attribution: Facts, names: list[str]) -> Facts:
    """Rows of LIME's lift, or why there are none."""
    if "reason" in attribution[names[0]]:
        return {"reason": attribution[names[0]]["reason"], "rows": []}
    rows = []
    for key, (title, count) in LIFTS.items():
        cells = [
            describe_value(attribution[name].get(key, {"value": None, "reason": attribution[name].get("reason")}))
            for name in names
        ]
        rows.append({"title": title, "n": attribution[names[0]][count], "cells": cells})
    return {"reason": None, "rows": rows}


def describe_groups(groups: Facts, names: list[str]) -> Facts:
    """Rows of device x class: each group has a row per measure."""
    if "reason" in groups[MODEL]:
        return {"reason": groups[MODEL]["reason"], "rows": []}
    rows = []
    for key, (title, measures) in AUDIT_GROUPS.items():
        group = groups[MODEL][key]
        n = group["n"] if "n" in group else group["n_normal"] + group["n_pneumonia"]
        size = _say_size(group)
        for measure in measures:
            cells: list[Any] = []
            for name in names:
                figure = groups[name][key].get(measure) or {"value": None, "reason": groups[name][key].get("reason")}
                cells.append(describe_value(figure))
            called = "AUC" if measure == "auc" else measure.capitalize()
            rows.append(
                {
                    "title": title,
                    "size": size,
                    "n": n,
                    "measure": called,
                    "span": len(measures),
                    "first": measure == measures[0],
                    "cells": cells,
                }
            )
    return {"reason": None, "rows": rows}


def _say_size(group: Facts) -> str:
    if "confusion" in group:
        counts = group["confusion"]
        return f"{counts['tn'] + counts['fp']:,} normal, {counts['tp'] + counts['fn']:,} pneumonia"
    if "n_normal" in group:
        return f"{group['n_normal']:,} normal, {group['n_pneumonia']:,} pneumonia"
    return "no image"


def find_pair(run: Path) -> Facts | None:
    """The explained image with a device on which the twin's map lies most, compared with the model's; its picture."""
    from tasks.reporting.figures import read_picture

    found = [read_json(path) for path in sorted((run / "explanations").glob("*.json"))]
    found = [item for item in found if item["mask"] == "own" and item["places"] and item[TWIN]["places"]]
    # Of an answer that no piece changes, a map is pale, and shows nobody anything.
    found = [item for item in found if all(np.abs(one["weights"]).max() >= FAINTEST for one in (item, item[TWIN]))]
    if not found:
        return None
    item = max(found, key=lambda one: one[TWIN]["places"]["device_weight"] - one["places"]["device_weight"])
    picture = read_picture(run / "explanations" / f"{item['image_id']}.png")
    if picture is None:
        return None
    shares = [f"{one['places']['device_weight']:.0%}" for one in (item[TWIN], item)]
    area = f"{item['places']['device_area']:.0%}"
    says = (
        f"Image {item['image_id']}. Left: the X-ray with its device outlined. Middle: the map of the twin. Right: the "
        f"map of this model. The device covers {area} of the picture. {shares[0]} of the twin’s weight for pneumonia "
        f"lie on it, {shares[1]} of this model’s."
    )
    return {"picture": picture, "says": says, "n": len(found)}
