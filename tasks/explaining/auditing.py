"""Audit: does the network read the lung, or the device?

Reads ``model.keras`` and, when compared, its unscreened twin ``unfiltered.keras``, ``predictions.csv``,
``metrics.json``, the packed arrays, the masks of devices and lungs and ``explanations/``; writes ``audit.json``. Every
network is asked about the same changed images.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from prefect import task

from tasks.errors import AuditError
from tasks.explaining.baselines import Baseline, ask_baselines, ask_shape
from tasks.explaining.lungs import ask_lungs, measure_by_place, measure_shape, weigh_lungs
from tasks.explaining.probes import (
    Answers,
    Change,
    blank,
    draw_on,
    mean_lift,
    measure_auc,
    measure_change,
    measure_gap,
    pick_rows,
    put_real,
    take_off,
)
from tasks.explaining.subjects import Scene, Subject, load_subject
from tasks.explaining.verdict import judge
from tasks.files import read_json, sha256_of_file, write_json
from tasks.findings import Audit, NetworkVerdict, read_audit, read_metrics
from tasks.measures import Array, draw_patients, measure_group, summarise
from tasks.networks.twin import used_rows
from tasks.pixels.masks import SURE
from tasks.pixels.packed import PackedImages
from tasks.pixels.window import window_place
from tasks.records import FOREIGN, MODEL, TITLES, Facts
from tasks.runs.artifacts import show_table
from tasks.runs.run import Run
from tasks.runs.stages import stage_task
from tasks.settings import AuditingSettings, Settings

PARTS = ("baselines", "insertion", "removal", "blanked", "attribution", "groups")
NO_DEVICE = "no image of the audited split is known to show a device that the screener sees too"
NO_CLEAN = "no image of the audited split is known to show no device"


@stage_task("audit")
def audit(run: Run) -> Facts:
    """Puts devices on and takes them off, blanks the lungs, and says whether the network minds."""
    names = run.settings.networks

    def make(out: Path) -> Facts:
        scene = gather_scene(run, run.manifest(), run.images())
        subjects = [load_subject(run.folder, name, scene.packed) for name in names]
        found = audit_subjects(run, scene, subjects, run.folder / "explanations")
        write_json(out / "audit.json", Audit(**found).as_json())
        return {"verdict": found["verdict"], "n_images": found["n_images"]}

    explanations = sorted((run.folder / "explanations").glob("*.json"))
    reads = [*(f"{name}.keras" for name in names), "predictions.csv", "manifest.parquet"]
    reads += ["masks/index.json", "lungs/index.json"]
    given = {
        "explanations": {path.name: sha256_of_file(path) for path in explanations},
        "threshold": read_metrics(run.folder).threshold,
        "auditing": run.settings.auditing.model_dump(exclude={"fail_on"}),
        "n_bootstrap": run.settings.evaluation.n_bootstrap,
        "seed": run.settings.seed,
    }
    facts = run.stage("audit", reads=reads, given=given, make=make, packages=("scikit-image", "scikit-learn"))
    for name, verdict in facts["verdict"].items():
        print(say_verdict(name, verdict))
    show_table("audit", verdict_rows(facts["verdict"]), "Audit: rules and their outcome")
    return facts


@task(name="require a passed audit")
def require_passed(run: Run) -> None:
    """Ends the run where the model failed a part that ``auditing.fail_on`` names.

    Raises:
        AuditError: If it did.
    """
    report = run.address("report/index.html")
    refuse_failed(read_audit(run.folder).verdict.model, run.settings.auditing, report, MODEL)


def refuse_failed(verdict: NetworkVerdict, auditing: AuditingSettings, report: str, name: str = FOREIGN) -> None:
    """Raises AuditError where a network failed a part that ``fail_on`` names; ``report`` is where it is written up."""
    failed = [part for part in verdict.failed if part in auditing.fail_on]
    if failed:
        raise AuditError(
            f"auditing.fail_on: {TITLES[name]} failed {' and '.join(failed)}; the report in {report} says by how much"
            + (", and the run is not sealed" if name == MODEL else "")
        )


def gather_scene(run: Run, manifest: pd.DataFrame, images: PackedImages) -> Scene:
    """The evaluated test images, or those of validation where test is left unread."""
    evaluated = pd.read_csv(run.folder / "predictions.csv", usecols=["path", "split"])
    main = "test" if (evaluated["split"] == "test").any() else "val"
    rows = manifest[manifest["path"].isin(evaluated.loc[evaluated["split"] == main, "path"])].reset_index(drop=True)
    ids = list(rows["image_id"])
    return Scene(rows, images.read(ids), run.masks().read(ids), run.lungs().read(ids))


def audit_subjects(run: Run, scene: Scene, subjects: list[Subject], explanations: Path) -> Facts:
    """``audit.json`` for networks that were asked about images of a run, and explained in a folder."""
    manifest = run.manifest()
    used = used_rows(manifest)
    train = manifest[manifest["image_id"].isin(used.loc[used["split"] == "train", "image_id"])]
    ids = list(train["image_id"])
    baselines = ask_baselines(train, run.images().read(ids), scene.rows, scene.packed)
    shape = ask_shape(train, run.lungs().read(ids), scene.lungs)
    patients = manifest.set_index("image_id")["group_id"]
    explained = [read_json(path) for path in sorted(explanations.glob("*.json"))]
    explained = [{**item, "group_id": patients[item["image_id"]]} for item in explained]
    return audit_networks(scene, subjects, (baselines, shape), explained, run.settings)


def audit_networks(
    scene: Scene,
    subjects: list[Subject],
    baselines: tuple[dict[str, Baseline], Baseline],
    explained: list[Facts],
    settings: Settings,
) -> Facts:
    """``audit.json``: every part for every network, and the verdicts.

    Args:
        scene: The audited images.
        subjects: The networks, the one that this is about first.
        baselines: As from ``ask_baselines`` and from ``ask_shape``.
        explained: The JSON of each explanation.
        settings: ``auditing``, the draws of ``evaluation.n_bootstrap``, and the seed.
    """
    auditing, n_bootstrap, seed = settings.auditing, settings.evaluation.n_bootstrap, settings.seed
    put_on, taken_off = change_devices(scene, auditing, seed)
    found: Facts = {"split": str(scene.rows["split"].iloc[0]), "n_images": len(scene.rows)}
    found |= {part: {} for part in PARTS}
    shape = measure_shape(scene.rows, baselines[1], n_bootstrap, seed)
    for subject in subjects:
        every = draw_patients(scene.rows["group_id"], n_bootstrap, seed)
        found["baselines"][subject.name] = compare_baselines(scene, subject, baselines[0], n_bootstrap, seed)
        for part, changes in (("insertion", put_on), ("removal", taken_off)):
            found[part][subject.name] = ask_changes(scene, subject, changes, n_bootstrap, seed)
        found["blanked"][subject.name] = ask_blanked(scene, subject, every)
        found["blanked"][subject.name] |= ask_lungs(scene, subject, n_bootstrap, seed) | {"lungs_shape": shape}
        found["attribution"][subject.name] = weigh_attribution(explained, subject.name, n_bootstrap, seed)
        found["groups"][subject.name] = measure_groups(scene, subject, n_bootstrap, seed)
    found["verdict"] = {subject.name: judge(found, subject.name, auditing) for subject in subjects}
    return found


# -- the parts ---------------------------------------------------------------------------------------------------------


def compare_baselines(
    scene: Scene, subject: Subject, baselines: dict[str, Baseline], n_bootstrap: int, seed: int
) -> Facts:
    """AUC of the network, and of each baseline with what the network gains over it on the same images."""
    rows = scene.rows
    each = {}
    for name, baseline in baselines.items():
        nothing = {"value": None, "low": None, "high": None, "reason": baseline.reason}
        figures: Facts = {"says": baseline.says, "n": int(baseline.at.sum()), "auc": nothing, "gain": nothing}
        if baseline.answer is not None:
            weights = draw_patients(rows.loc[baseline.at, "group_id"], n_bootstrap, seed)
            auc = measure_auc(rows[baseline.at], baseline.answer, weights)
            own = measure_auc(rows[baseline.at], subject.probability[baseline.at], weights)
            figures |= {key: summarise(v, "a class is missing") for key, v in (("auc", auc), ("gain", own - auc))}
        each[name] = figures
    weights = draw_patients(rows["group_id"], n_bootstrap, seed)
    whole = summarise(measure_auc(rows, subject.probability, weights), "a class is missing")
    return {"n": len(rows), "auc": whole, "each": each}


def change_devices(
    scene: Scene, auditing: AuditingSettings, seed: int
) -> tuple[dict[str, Change] | str, dict[str, Change] | str]:
    """Images with devices put on, by kind, and images with theirs taken off; or why there are none."""
    marked = np.asarray((scene.masks >= SURE).any((1, 2)))  # else a person saw what the mask does not show
    clean = pick_rows(scene.rows, False, auditing.n_images, seed)
    shown = pick_rows(scene.rows[marked], True, auditing.n_images, seed)
    shown = np.flatnonzero(marked)[shown]
    put_on: dict[str, Change] | str = NO_CLEAN
    if len(clean):
        put_on = draw_on(scene.packed, clean, seed)
        if len(shown):
            put_on["real"] = put_real(scene.packed, clean, shown, scene.masks, seed)
    return put_on, {"filled": take_off(scene.packed, shown, scene.masks, seed)} if len(shown) else NO_DEVICE


def ask_changes(scene: Scene, subject: Subject, changes: dict[str, Change] | str, n_bootstrap: int, seed: int) -> Facts:
    """What a network says of changed images: ``gap``, and what ``measure_change`` gives per variant; or a reason.

    A variant also has ``over_lungs`` and ``elsewhere``, the same by place.
    """
    if isinstance(changes, str):
        return {"reason": changes}
    gap = measure_gap(scene.rows, subject.probability)
    facts: Facts = {"gap": None if gap is None else round(gap, 4)}
    if "real" not in changes and "filled" not in changes:
        facts["reason"] = NO_DEVICE
    for name, change in changes.items():
        control = None if change.control is None else subject.ask(change.control)
        before, after = subject.probability[change.at], subject.ask(change.changed)
        answers = Answers(before, after, control, subject.threshold, gap)
        facts[name] = measure_change(scene.rows.iloc[change.at], answers, n_bootstrap, seed)
        facts[name] |= measure_by_place(scene, change, answers, n_bootstrap, seed)
    return facts


def ask_blanked(scene: Scene, subject: Subject, weights: Array) -> Facts:
    """AUC on the images as they are, and where only the inside or only the outside of the lung window is left."""
    answers = {
        "whole": subject.probability,
        "inside": subject.ask(blank(scene.packed, inside=False)),
        "outside": subject.ask(blank(scene.packed, inside=True)),
    }
    aucs = {
        name: summarise(measure_auc(scene.rows, answer, weights), "a class is missing")
        for name, answer in answers.items()
    }
    share = float(window_place(scene.packed.shape[1]).mean())
    return {"n": len(scene.rows), "window_share": round(share, 4), **aucs}


def weigh_attribution(explained: list[Facts], name: str, n_bootstrap: int, seed: int) -> Facts:
    """Lift of LIME's positive weight: on devices, on the same places of images without one, and in the lung window.

    And ``lungs``, as from ``weigh_lungs``.

    A lift is the share of the weight that lies on a place over the place's share of the area; 1 is as by chance.
    """
    maps = [{**item, **item.get(name, {})} for item in explained]  # of the first network they lie on top
    table = pd.DataFrame([{**item["places"], **item} for item in maps if item["places"] is not None])
    nothing: Facts = {"value": None, "low": None, "high": None}
    if not len(table):
        return {"n": 0, "reason": "no explained image has a map with positive weight"}
    facts: Facts = {"n_explained": len(table), "lungs": weigh_lungs(maps, n_bootstrap, seed)}
    lifts = {}
    for key, at, place, why in (
        ("device", table["mask"] == "own", "device", "no explained image shows a device"),
        ("control", table["mask"] == "other", "device", "no explained image shows no device"),
        ("window", table["mask"].notna() | table["mask"].isna(), "window", ""),
    ):
        part = table[at]
        if len(part):
            lifts[key] = mean_lift(part[f"{place}_weight"], part[f"{place}_area"], part["group_id"], n_bootstrap, seed)
        facts[f"{key}_lift"] = lifts[key] if key in lifts else nothing | {"reason": why}
        facts[f"n_{key}"] = len(part)
    facts["n"] = int(min(facts["n_device"], facts["n_control"]))
    facts["excess_lift"] = _difference(facts["device_lift"], facts["control_lift"])
    return facts


def _difference(one: Facts, other: Facts) -> Facts:
    """Of two figures of different images: the ends of the interval by adding the variances."""
    for figure in (one, other):
        if figure["value"] is None:
            return figure
    value = one["value"] - other["value"]
    below = np.hypot(one["value"] - one["low"], other["high"] - other["value"])
    above = np.hypot(one["high"] - one["value"], other["value"] - other["low"])
    return {"value": round(value, 4), "low": round(float(value - below), 4), "high": round(float(value + above), 4)}


def measure_groups(scene: Scene, subject: Subject, n_bootstrap: int, seed: int) -> Facts:
    """Device x class: measures with and without a device, and the pairs in which the device misleads, or helps.

    Returns:
        ``with_device`` and ``device_free`` as groups of ``metrics.json``; ``against``, normal images with a device and
        pneumonia images without; ``along``, the other way round, both with AUC alone; ``loss``, AUC of all known images
        less that of ``against``; ``n``, the images of the smaller class in ``against``.
    """
    rows = scene.rows.assign(probability=subject.probability)
    known = rows["has_device"].notna().to_numpy(bool)
    if not known.any():
        return {"n": 0, "reason": "no image was screened"}
    device, label = rows["has_device"].fillna(False).to_numpy(bool), rows["label"].to_numpy(int)
    facts: Facts = {
        "with_device": measure_group(rows[known & device], subject.threshold, n_bootstrap, seed),
        "device_free": measure_group(rows[known & ~device], subject.threshold, n_bootstrap, seed),
    }
    weights = draw_patients(rows.loc[known, "group_id"], n_bootstrap, seed)
    every = measure_auc(rows[known], subject.probability[known], weights)
    for name, at in (("against", device == (label == 0)), ("along", device == (label == 1))):
        aucs = measure_auc(rows[known], subject.probability[known], weights * at[known])
        counts = {f"n_{c}": int((known & at & (label == i)).sum()) for i, c in enumerate(("normal", "pneumonia"))}
        facts[name] = counts | {"auc": summarise(aucs, "a class is missing in this group")}
        if name == "against":
            facts["n"] = min(counts.values())
            facts["loss"] = summarise(every - aucs, "a class is missing in this group")
    return facts


# -- for people --------------------------------------------------------------------------------------------------------


def say_verdict(name: str, verdict: Facts) -> str:
    """One line for the log."""
    who = f"audit of {TITLES[name]}"
    if verdict["passed"] is None:
        return f"{who}: no verdict, {verdict['reason']}"
    worst = [
        f"{rule['part']} ({rule['says']} {rule['value']:g}, bound {rule['bound']:g})"
        for rule in verdict["rules"]
        if rule["outcome"] == "fails"
    ]
    unclear = sum(rule["outcome"] == "unclear" for rule in verdict["rules"])
    unjudged = sum(rule["outcome"] == "not judged" for rule in verdict["rules"])
    text = f"{who}: " + ("passed" if verdict["passed"] else "failed " + "; ".join(worst))
    return text + f"; {unclear} of {len(verdict['rules'])} rules unclear, {unjudged} not judged"


def verdict_rows(verdicts: Facts) -> list[Facts]:
    """A row per rule, for people."""
    return [
        {
            "network": name,
            "part": rule["part"],
            "rule": rule["says"],
            "figure": rule["value"],
            "bound": rule["bound"],
            "outcome": rule["outcome"],
        }
        for name, verdict in verdicts.items()
        for rule in verdict["rules"]
    ]
