"""The part of the report that says what a network knows from the lungs, and what without them.

Older runs have no such figures; of them nothing is shown.
"""

from collections.abc import Sequence

from tasks.findings import NOT_MEASURED, Audit, Estimate, NetworkVerdict
from tasks.measures import describe_value
from tasks.records import Facts

VIEWS = {
    "whole": ("Whole image", "whole"),
    "lungs_only": ("Only the lungs", "only"),
    "lungs_removed": ("Lungs covered", "removed"),
    "other_lungs_removed": ("Another child’s\nlungs covered", "other"),
}
"""Entries of ``blanked`` in the picture, and the sign that stands beside each."""
GROUPS = {
    "all": "All explained images",
    "pneumonia": "Truly pneumonia",
    "normal": "Truly normal",
    "right": "Right answers",
    "wrong": "Wrong answers",
}
SIGNS = {"positive": "for pneumonia", "negative": "against it"}
PLACES = {"over_lungs": "over the lungs", "elsewhere": "elsewhere"}
SAYS = {
    ("holds", "holds"): "{} reads the lungs.",
    ("holds", "unclear"): "{} reads the lungs; whether it reads what is around them too is not clear.",
    ("holds", "fails"): "{} reads the lungs, but also what is around them.",
    ("fails", "holds"): "{} knows little from the lungs, and little without them.",
    ("fails", "fails"): "{} reads what is around the lungs better than the lungs.",
}
"""By the outcome of the rules on what the lungs alone tell more than the rest, and on the AUC without them."""


def describe_lungs(audit: Audit, names: Sequence[str], heads: Sequence[str]) -> Facts | None:
    """The picture with its sentence, and the table of LIME's weight in the lungs; ``None`` in older runs.

    Args:
        audit: The audit.
        names: Its networks, the one that it is about first.
        heads: Their titles.
    """
    own = audit.blanked[names[0]]
    if any(key not in own for key in VIEWS):
        return None
    return {
        **draw_views(audit, names, heads),
        "n_without": own["n_no_lungs"],
        "weights": describe_weights(audit.attribution, names),
    }


def draw_views(audit: Audit, names: Sequence[str], heads: Sequence[str]) -> Facts:
    """The picture as SVG (``figure``), and what it shows in plain English (``says``)."""
    from tasks.reporting.figures import as_svg, draw_lungs

    rows: list[Facts] = [
        {"name": title, "shown": shown, "values": [audit.blanked[name][key] for name in names]}
        for key, (title, shown) in VIEWS.items()
    ]
    says = say_lungs(audit.blanked[names[0]], getattr(audit.verdict, names[0]), heads[0])
    return {"figure": as_svg(draw_lungs(rows, heads), "lungs", "What is known with and without lungs", says)} | {
        "says": says
    }


def say_lungs(blanked: Facts, verdict: NetworkVerdict, who: str) -> str:
    """What the picture shows of one network, in two sentences."""
    whole, only, removed, other = (blanked[key] for key in VIEWS)
    if only["value"] is None or whole["value"] is None:
        return f"What {who.lower()} knows from the lungs could not be measured: {only.get('reason', 'no AUC')}."
    found = {rule["setting"]: rule["outcome"] for rule in verdict.rules}
    outcomes = tuple(found.get(f"auditing.{name}", "") for name in ("min_lungs_gain", "max_lungs_removed_auc"))
    first = SAYS.get((outcomes[0], outcomes[1]), "It is not clear how much of what {} knows comes from the lungs.")
    if whole["low"] <= 0.5:  # what knows nothing loses nothing
        first = "{} is not seen to tell pneumonia from normal, with or without the lungs."
    first = first.format(who.lower())
    second = (
        f"Shown nothing but the lungs, it reaches an AUC of {only['value']:.2f}; on the whole image it has "
        f"{whole['value']:.2f}. With the lungs covered {removed['value']:.2f} is left"
    )
    if other["value"] is not None:
        second += f", with another child’s lungs covered {other['value']:.2f}"
    return f"{first[0].upper()}{first[1:]} {second}. Guessing gives 0.50."


def describe_weights(attribution: Facts, names: Sequence[str]) -> list[Facts]:
    """A row per group of explained images and sign: share of LIME's weight that lies in the lungs, and its lift."""
    if "lungs" not in attribution[names[0]]:
        return []
    rows = []
    for group, title in GROUPS.items():
        for sign, says in SIGNS.items():
            found = [attribution[name].get("lungs", {}).get(group, {}).get(sign, {"n": 0}) for name in names]
            cells = [{"share": _describe(one, "share", True), "lift": _describe(one, "lift")} for one in found]
            rows.append({"title": title, "sign": says, "first": sign == "positive", "n": found[0]["n"], "cells": cells})
    return rows


def _describe(found: Facts, key: str, percent: bool = False) -> Facts:
    figure: Estimate = found.get(key) or NOT_MEASURED | {"reason": found.get("reason", "no such image")}
    return describe_value(figure, percent=percent)
