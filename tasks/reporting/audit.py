"""The part of the report that says what the network looks at: verdict, devices put on and taken off, blanked lungs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.explaining.baselines import SAYS
from tasks.explaining.pictures import FAINTEST
from tasks.files import read_json
from tasks.findings import Audit, NetworkVerdict, read_audit
from tasks.measures import describe_value
from tasks.pixels.window import WINDOW
from tasks.records import MODEL, TWIN, Facts
from tasks.reporting.inputs import SPLIT_NAMES

HEADS = {MODEL: "This model", TWIN: "Without screening"}
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
    model, twin = audit.verdict.model, audit.verdict.unfiltered
    names = [MODEL, TWIN] if twin else [MODEL]
    return {
        "n": audit.n_images,
        "split": SPLIT_NAMES[audit.split],
        "compared": twin is not None,
        "heads": [HEADS[name] for name in names],
        "sentence": say_verdict(model),
        "passed": model.passed,
        "comparison": say_comparison(model, twin) if twin else None,
        "rules": describe_rules([model, twin] if twin else [model]),
        "changes": describe_changes(audit, names),
        "figure": draw_changes(audit, names),
        "sights": describe_sights(audit, names),
        "window": [f"{100 * share:.0f} %" for share in WINDOW],
        "window_share": f"{100 * audit.blanked[MODEL]['window_share']:.0f} %",
        "lifts": describe_lifts(audit.attribution, names),
        "groups": describe_groups(audit.groups, names),
        "pair": find_pair(run) if twin else None,
    }


def say_verdict(verdict: NetworkVerdict) -> str:
    """The verdict about the model in one or two sentences."""
    rules = verdict.rules
    if verdict.passed is None:
        return f"The audit came to no verdict: {verdict.reason}."
    counts = {outcome: sum(rule["outcome"] == outcome for rule in rules) for outcome in OUTCOMES}
    if verdict.passed:
        text = f"The model passed the audit: none of {len(rules)} rules is broken"
    else:
        broken = "; ".join(
            f"{rule['says']}: {rule['value']:.3g}, where at {'most' if rule['at_most'] else 'least'} {rule['bound']:g} "
            "is accepted"
            for rule in rules
            if rule["outcome"] == "fails"
        )
        text = f"The model failed the audit ({broken})"
    also = [
        f"{counts[outcome]} {word}"
        for outcome, word in (("unclear", "unclear"), ("not judged", "could not be judged"))
        if counts[outcome]
    ]
    return text + (f"; {' and '.join(also)}." if also else ".")


def say_comparison(model: NetworkVerdict, twin: NetworkVerdict) -> str:
    """What screening changed, of what the rules look at: only what both intervals tell apart counts."""
    outcome = {True: "passed", False: f"failed ({', '.join(twin.failed)})", None: "came to no verdict"}
    twin_sentence = f"Its twin, trained without screening, {outcome[twin.passed]}. "
    better, worse, same = [], [], 0
    for own, other in zip(model.rules, twin.rules, strict=True):
        if own["value"] is None or other["value"] is None:
            continue
        sign = 1 if own["at_most"] else -1
        if sign * own["high" if sign > 0 else "low"] < sign * other["low" if sign > 0 else "high"]:
            better.append(own["says"])
        elif sign * own["low" if sign > 0 else "high"] > sign * other["high" if sign > 0 else "low"]:
            worse.append(own["says"])
        else:
            same += 1
    if not better and not worse:
        return twin_sentence + f"Screening made no difference that the intervals can show, in any of {same} figures."
    sentences = []
    if better:
        sentences.append(f"Better with screening: {', '.join(better)}.")
    if worse:
        sentences.append(f"Worse with screening: {', '.join(worse)}.")
    if same:
        sentences.append(f"The intervals of {same} other figures overlap, so they show no difference.")
    return twin_sentence + " ".join(sentences)


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
    """

    title: str
    label: str
    groups: list[Facts]


def list_probes(audit: Audit, names: list[str]) -> list[Probe]:
    """All probes of an audit: devices put on normal images, then devices taken off pneumonia images."""
    probes = []
    for part, titles, label in ((audit.insertion, INSERTIONS, "normal"), (audit.removal, REMOVALS, "pneumonia")):
        found = [key for key, value in part[MODEL].items() if isinstance(value, dict)]
        for key in [*(key for key in titles if key in found), *(key for key in found if key not in titles)]:
            title = titles.get(key, key.replace("_", " ").capitalize())
            probes.append(Probe(title, label, [part[name][key][label] for name in names]))
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
    bound = next(rule["bound"] for rule in audit.verdict.model.rules if rule["setting"] == "auditing.max_shift")
    heads = [HEADS[name] for name in names]
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
    ):
        cells = [describe_value(audit.blanked[name][key]) for name in names]
        rows.append({"title": title, "who": "network", "cells": cells})
    for key, says in SAYS.items():
        one = audit.baselines[MODEL]["each"][key]
        rows.append({"title": says[0].upper() + says[1:], "who": "baseline", "cells": [describe_value(one["auc"])]})
    return rows


def describe_lifts(attribution: Facts, names: list[str]) -> Facts:
    """Rows of LIME's lift, or why there are none."""
    if "reason" in attribution[MODEL]:
        return {"reason": attribution[MODEL]["reason"], "rows": []}
    rows = []
    for key, (title, count) in LIFTS.items():
        cells = [
            describe_value(attribution[name].get(key, {"value": None, "reason": attribution[name].get("reason")}))
            for name in names
        ]
        rows.append({"title": title, "n": attribution[MODEL][count], "cells": cells})
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
