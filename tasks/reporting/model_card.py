"""Model card: one page about the network of a run, for whoever is handed it (Mitchell et al. 2019).

Reads ``manifest.parquet``, ``metrics.json``, ``audit.json`` and ``stages/``; writes ``model_card.md``. It says only
what these files know. Names of images and patients stay out of it; a file that a setting names is shown without its
folder. Whatever comes from outside is escaped, so that it is read as text.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

import pandas as pd
from markupsafe import Markup, escape
from prefect import task

from tasks.files import write_whole
from tasks.findings import NOT_MEASURED, Estimate, MeasuredGroup, Metrics, read_audit, read_metrics
from tasks.measures import describe_value
from tasks.records import PNEUMONIA, Facts
from tasks.reporting.audit import say_comparison, say_verdict
from tasks.reporting.inputs import NOTICE, SPLIT_NAMES, describe_left_out, describe_source
from tasks.reporting.results import (
    FEW_PATIENTS,
    GROUP_NAMES,
    MEASURE_NAMES,
    POINTS,
    choose_splits,
    describe_border,
    describe_calibration,
    describe_members,
    describe_training,
    find_worst_shifts,
    groups_of,
    list_own_groups,
    say_result,
    say_share,
    say_threshold,
)
from tasks.reporting.words import say_provenance, say_settings
from tasks.runs.artifacts import show_markdown
from tasks.runs.bucket import send
from tasks.runs.provenance import describe_run
from tasks.runs.retries import AGAIN
from tasks.runs.run import Run
from tasks.settings import Settings

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.j2"
CARD = "model_card.md"
SHAPING = ("sample", "quality", "splitting", "packing", "screening", "training", "evaluation", "auditing")
"""Groups of settings that the network and its figures depend on."""
DECISIONS = ("sensitivity", "specificity")


@task(name="model card", **AGAIN)
def write_card(run: Run) -> str:
    """Writes ``model_card.md`` of a run that is trained and evaluated; returns its address.

    Raises:
        RunError: If the run folder lacks a file of an earlier stage.
    """
    card = render_card(gather_card(run))
    write_whole(run.folder / CARD, card)
    send(run, [CARD])
    address = run.address(CARD)
    show_markdown("model card", card, "What the network of this run is for, how good it is and where it fails")
    print(f"the model card is {address}")
    return address


def render_card(card: Facts) -> str:
    """The card as Markdown; every value is escaped unless it is markup made here."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, finalize=escape_markdown, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = lambda n: f"{n:,}"
    environment.filters["code"] = lambda text: Markup("`" + " ".join(str(text).replace("`", "").split()) + "`")
    environment.filters["cells"] = lambda texts: Markup(" | ".join(escape_markdown(text) for text in texts))
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(card)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def escape_markdown(value: Any) -> str:
    """A value as plain text of one line, whatever Markdown or HTML it holds; markup made here stays as it is."""
    if isinstance(value, Markup):
        return value
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", str(escape(line)))


def gather_card(run: Run) -> Facts:
    """All that the template says, read from the run folder: plain values and sentences."""
    manifest, metrics = run.manifest(), read_metrics(run.folder)
    verdicts = read_audit(run.folder).verdict
    provenance = describe_run(run)
    splits, main = choose_splits(metrics, run.settings.evaluation)
    left_out = describe_left_out(run.folder, manifest)
    screen, ingest = run.facts("screen"), run.facts("ingest")
    training = describe_training(run.folder, run.settings.training)
    return {
        "run_name": run.folder.resolve().name,
        "notice": NOTICE,
        "finished": f"{datetime.fromisoformat(provenance['finished']):%-d %B %Y}",
        "sentence": say_result(metrics, main),
        "audit": say_verdict(verdicts.model),
        "comparison": say_comparison(verdicts.model, verdicts.unfiltered) if verdicts.unfiltered else "",
        "source": describe_source(run.folder, manifest),
        "is_sample": ingest["kind"] == "sample",
        "left_out": {"n": left_out["n"], "reasons": [row for row in left_out["reasons"] if row["all"]]},
        "devices": {
            "n_people": int(manifest["device_reviewed"].fillna(False).sum()),
            "screener_sha256": screen["screener"]["sha256"],
        },
        "training": training,
        "recipe": run.settings.training,
        "seed": run.settings.seed,
        "changed": list_changed(run.settings),
        "splits": splits,
        **describe_measures(metrics, splits, main),
        "members": say_members(metrics, splits, training["n_models"]),
        "min_sensitivity": say_share(run.settings.evaluation.min_sensitivity),
        "failures": [*find_failures(metrics, splits, main), *find_limits(metrics, splits, manifest, ingest, screen)],
        "provenance": say_provenance(provenance),
    }


def list_changed(settings: Settings) -> list[Facts]:
    """Settings that shape the network and are not at their default; of a path only the name."""
    return [
        {"name": f"{group['name']}.{row['name']}", "value": PurePath(row["value"]).name}
        for group in say_settings(settings)
        if group["name"] in SHAPING
        for row in group["rows"]
        if row["changed"]
    ]


def describe_measures(metrics: Metrics, splits: Sequence[str], main: str) -> Facts:
    """What the template says of how good the network is."""
    return {
        "thresholds": {name: say_threshold(metrics.operating_points[name].threshold) for name in POINTS},
        "rows": describe_rows(metrics, splits),
        "subtypes": [
            {
                "name": f"{SPLIT_NAMES[split].capitalize()}, {subtype}",
                "n": group.n,
                "figures": say_of(group, "sensitivity"),
            }
            for split in splits
            for subtype, group in metrics.subtypes.get(split, {}).items()
        ],
        "bacteria": "; ".join(f"{SPLIT_NAMES[split]} {say_bacteria(metrics.bacteria[split])}" for split in splits),
        "calibration": say_calibration(metrics, splits, main),
        "shifts": say_shifts(metrics),
        "border": describe_border(metrics, main),
        "lungs": [say_figure(found) for found in (metrics.lungs_only, metrics.lungs_removed)],
    }


def describe_rows(metrics: Metrics, splits: Sequence[str]) -> list[Facts]:
    """A row per group: its size, its AUC, and sensitivity and specificity at both thresholds."""
    rows = []
    for key, group in groups_of(metrics, splits).items():
        if not group.n:
            cells = [f"not measured: {group.reason}", *[""] * 4]
            rows.append({"name": GROUP_NAMES[key], "size": "0", "cells": cells})
            continue
        sensitive = metrics.operating_points["high_sensitivity"].groups.get(key)
        cells = [say_of(group, measure) for measure in ("auc", *DECISIONS)]
        cells += [say_of(sensitive, measure) if sensitive else "" for measure in DECISIONS]
        few = "" if group.n_patients is None or group.n_patients >= FEW_PATIENTS else " †"
        size = f"{group.n:,}" + ("" if group.n_patients is None else f" ({group.n_patients:,}){few}")
        rows.append({"name": GROUP_NAMES[key], "size": size, "cells": cells})
    return rows


# -- failures and limits -----------------------------------------------------------------------------------------------


def find_failures(metrics: Metrics, splits: Sequence[str], main: str) -> list[str]:
    """Where the network is worst by the run's own numbers, a sentence each."""
    sentences = [*find_weakest(metrics, main), *find_drops(metrics, splits)]
    sentences += [
        f"Under the change “{worst['name']}”, {worst['measure']} on validation is {worst['text']} "
        f"({worst['interval']}) instead of {worst['unchanged']}."
        for worst in find_worst_shifts(metrics)
        if worst["lower"]
    ]
    only = metrics.border_only
    if only["value"] is not None and only["low"] > 0.5:
        sentences.append(f"The network reads something off the border: AUC {say_figure(only)} on the border alone.")
    for split in splits:
        group = metrics.bacteria[split]
        if (auc := value_of(group, "auc")) and auc["low"] <= 0.5:
            sentences.append(
                f"On {SPLIT_NAMES[split]} images bacteria are not told from virus better than by chance: "
                f"AUC {say_figure(auc)}."
            )
    return sentences


def find_weakest(metrics: Metrics, main: str) -> list[str]:
    """For AUC, sensitivity and specificity the group of the main split where it is lowest, below that of the whole."""
    name, sentences = SPLIT_NAMES[main], []
    groups = {GROUP_NAMES[key]: group for key, group in groups_of(metrics, [main]).items() if key != main}
    kinds = metrics.subtypes.get(main, {}).items()
    groups |= {f"{name.capitalize()}, {kind}": group for kind, group in kinds}
    groups |= dict(list_own_groups(metrics, [main]))
    for measure in ("auc", *DECISIONS):
        known = {where: value for where, group in groups.items() if (value := value_of(group, measure))}
        whole = value_of(metrics.groups[main], measure)
        if not known or not whole:
            continue
        where, lowest = min(known.items(), key=lambda item: item[1]["value"])
        if lowest["value"] < whole["value"]:
            sentences.append(
                f"The group with the lowest {MEASURE_NAMES[measure]} is “{where}” ({groups[where].n:,} images): "
                f"{say_figure(lowest)}; on all {name} images it is {say_figure(whole)}."
            )
    return sentences


def find_drops(metrics: Metrics, splits: Sequence[str]) -> list[str]:
    """What is worse on test than on validation beyond both intervals."""
    if len(splits) < 2:
        return []
    sentences = []
    for measure in ("auc", *DECISIONS):
        before, after = (value_of(metrics.groups[name], measure) for name in ("val", "test"))
        if before and after and after["high"] < before["low"]:
            sentences.append(
                f"What was found on validation does not carry over to test: {MEASURE_NAMES[measure]} "
                f"{say_figure(before)} on validation, {say_figure(after)} on test."
            )
    return sentences


def find_limits(
    metrics: Metrics, splits: Sequence[str], manifest: pd.DataFrame, ingest: Facts, screen: Facts
) -> list[str]:
    """What these numbers cannot say, a sentence each."""
    sentences = []
    if any(0 < (group.n_patients or 0) < FEW_PATIENTS for group in groups_of(metrics, splits).values()):
        sentences.append(
            f"Groups marked † hold fewer than {FEW_PATIENTS} patients: intervals of so few are too narrow."
        )
    if "test" not in splits:
        sentences.append("Test images were left unread by the settings: all figures are of validation and optimistic.")
    elif not metrics.groups["test"].n:
        sentences.append("There is no test image to measure on: all figures are of validation and optimistic.")
    unknown = int(((manifest["label"] == PNEUMONIA) & ~manifest["subtype"].isin(["bacteria", "virus"])).sum())
    if unknown:
        sentences.append(f"Of {unknown:,} pneumonia images it is not known whether bacteria or a virus are the cause.")
    if n_unknown := int(manifest["patient_id"].isna().sum()):
        sentences.append(
            f"Of {n_unknown:,} images the patient is not known; each stands for itself, so intervals may be too narrow,"
            " and one child may be in training and in validation or test."
        )
    if screen["n_unscreened_train"]:
        sentences.append(
            f"Of {screen['n_unscreened_train']:,} training images it is not known whether they show a device."
        )
    sentences.append(
        "Labels are those of the source; whether a clinician agrees with them, or with the answers, is not known."
    )
    sentences.append(
        "All images come from one source; age, sex, hospital and machine are not recorded, so there are no "
        "figures by them. The changes of exposure, sharpness and framing only imitate another machine."
    )
    return sentences


# -- words -------------------------------------------------------------------------------------------------------------


def value_of(group: MeasuredGroup, measure: str) -> Estimate | None:
    """A measure of a group with its interval; ``None`` if it could not be computed."""
    value = group.estimate(measure)
    return value if value and value["value"] is not None else None


def say_of(group: MeasuredGroup, measure: str) -> str:
    """A measure of a group with its interval, or why there is none."""
    if not group.n:
        return f"not measured: {group.reason}"
    return say_figure(group.estimate(measure) or NOT_MEASURED)


def say_figure(value: Estimate) -> str:
    """``0.973 (0.961 to 0.984)``, or why there is none."""
    shown = describe_value(value)
    if shown["text"] is None:
        return f"not measured: {shown['reason']}"
    interval = "" if shown["interval"] is None else f" ({shown['interval']})"
    return f"{shown['text']}{interval}".replace("-", "−")


def say_bacteria(group: MeasuredGroup) -> str:
    """How well bacteria are told from virus."""
    if not group.n:
        return f"not measured: {group.reason}"
    return (
        f"AUC {say_of(group, 'auc')}, bacteria recognised {say_of(group, 'sensitivity')}, virus recognised "
        f"{say_of(group, 'specificity')} ({group.n:,} images)"
    )


def say_calibration(metrics: Metrics, splits: Sequence[str], main: str) -> str:
    """Expected calibration error by split, and what the network says on average."""
    found = describe_calibration(metrics, splits, main)
    parts = [f"{SPLIT_NAMES[split]} {say_of(metrics.calibration[split], 'ece')}" for split in splits]
    if found["mean"] is not None:
        mean, share = found["mean"]["mean_probability"], found["mean"]["share"]
        parts.append(
            f"on the {SPLIT_NAMES[main]} images the network says {mean} on average, and {share} show pneumonia"
        )
    return "; ".join(parts)


def say_shifts(metrics: Metrics) -> str:
    """What the changes of validation images do, at worst."""
    parts = [
        f"{worst['measure']} {worst['unchanged']} as they are, at worst {worst['text']} ({worst['name']})"
        if worst["lower"]
        else f"{worst['measure']} {worst['unchanged']} as they are, no change lowers it"
        for worst in find_worst_shifts(metrics)
    ]
    return "; ".join(parts) or "not measured"


def say_members(metrics: Metrics, splits: Sequence[str], n_models: int) -> str:
    """How far the result hangs on the seed."""
    if n_models == 1:
        return "one network was trained, so what another seed would have given is not known"
    parts = []
    for row in describe_members(metrics, splits):
        sentences = ", ".join(
            f"{MEASURE_NAMES[name]} not measured: {value['reason']}"
            if value["text"] is None
            else f"{MEASURE_NAMES[name]} {value['text']} (SD {value['spread']})"
            for name, value in row["alone"].items()
        )
        parts.append(f"{row['name'].lower()} {sentences}")
    return f"means of the {n_models} networks alone, " + ("; ".join(parts) or "not measured")
