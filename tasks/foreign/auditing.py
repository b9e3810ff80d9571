"""Audit of a network of other people over the prepared images of a run, beside the model of that run.

Reads a ``.keras`` or ``.onnx`` file and, of the run, what the audit reads; writes into a folder ``audit.json``, with
the parts of a run's own for ``foreign`` and ``model``, how the network was read (``network``) and how good both are
(``performance``); and ``explanations/`` of the images that the run explained. Nothing in the run changes.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from prefect import task
from pydantic import ValidationError

from tasks.errors import RunError, SettingsError
from tasks.explaining.auditing import audit_subjects, gather_scene, say_verdict
from tasks.explaining.explanations import explain_rows, plan_images
from tasks.explaining.probes import measure_auc
from tasks.explaining.subjects import Subject, load_for_lime, load_subject, read_threshold_of
from tasks.files import write_json
from tasks.findings import Audit, read_metrics
from tasks.foreign.network import ForeignNetwork, look_at, refuse_file
from tasks.foreign.reading import ReadAs, Reading
from tasks.measures import choose_threshold, draw_patients, format_value, measure_group, summarise
from tasks.networks.files import check_network
from tasks.networks.twin import used_rows
from tasks.pixels.borrowed_looks import vary_conditions
from tasks.pixels.covering import Packed
from tasks.records import FOREIGN, MODEL, TITLES, Facts
from tasks.runs.bucket import read_seal
from tasks.runs.run import Run
from tasks.settings import Settings

KEPT = ("evaluation", "explanation", "auditing")


@task(name="read the network")
def read_network(run: Run, model: str, asked: ReadAs) -> Reading:
    """How the network of a file is read; refuses one that cannot be audited, and a run that is not trained."""
    check_network(run.folder)
    read_metrics(run.folder)
    reading = look_at(refuse_file(model), asked)
    print(f"{model} (sha256 {reading.facts.sha256}) is read as follows:")
    for what, said, source in reading.describe():
        print(f"  {what}: {said} (from {source})")
    return reading


@task(name="audit the network")
def audit_network(run: Run, model: str, reading: Reading, threshold: float | None, out: Path) -> Facts:
    """Explains and audits the network into an empty folder; returns its verdict."""
    network = ForeignNetwork(Path(model), reading)
    chosen = "--threshold" if threshold is not None else "the run's rule, on its validation images and their shifts"
    threshold = check_on_validation(run, network, threshold)
    print(f"  Threshold: {threshold:.6g} (from {chosen})")
    scene = gather_scene(run, run.manifest(), run.images())
    subjects = [
        Subject(FOREIGN, network.ask, threshold, network.ask(scene.packed)),
        load_subject(run.folder, MODEL, scene.packed),
    ]
    explain_network(
        run, network, dict(zip(scene.rows["image_id"], subjects[0].probability, strict=True)), threshold, out
    )
    found = audit_subjects(run, scene, subjects, out / "explanations")
    n_bootstrap, seed = run.settings.evaluation.n_bootstrap, run.settings.seed
    found["performance"] = {
        one.name: measure_group(scene.rows.assign(probability=one.probability), one.threshold, n_bootstrap, seed)
        for one in subjects
    }
    lines = [*map(list, reading.describe()), ["Threshold", f"{threshold:.6g}", chosen]]
    found["network"] = reading.model_dump(mode="json") | {
        "file": Path(model).name,
        "threshold": threshold,
        "says": lines,
    }
    write_json(out / "audit.json", Audit(**found).as_json())
    for one in subjects:
        print(f"AUC of {TITLES[one.name]}: {format_value(found['performance'][one.name]['auc'])}")
        print(say_verdict(one.name, found["verdict"][one.name]))
    verdict: Facts = found["verdict"][FOREIGN]
    return verdict


def with_settings_of_run(settings: Settings) -> Settings:
    """The settings with those of the finished run, of what shapes an audit, where the flags leave the default.

    Only so are the same images explained and changed as in the run's own audit.
    """
    had = (read_seal(Run(settings)) or {}).get("settings", {})
    given, plain = settings.model_dump(), Settings().model_dump()

    def keep(now: Any, default: Any, before: Any) -> Any:
        if isinstance(now, dict):
            return {name: keep(now[name], default[name], before.get(name, now[name])) for name in now}
        return before if now == default else now

    kept = {name: keep(given[name], plain[name], had.get(name, given[name])) for name in (*KEPT, "seed")}
    kept["auditing"]["fail_on"] = given["auditing"]["fail_on"]  # of the run's own model
    try:
        return Settings.model_validate(given | kept)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise RunError(f"{settings.run_dir}: {place} of its run.json is not what a run wrote; run it again") from None


def check_on_validation(run: Run, network: ForeignNetwork, threshold: float | None) -> float:
    """The threshold, by the run's own rule where none is given, on validation under all conditions.

    Raises:
        SettingsError: If the network calls normal images pneumonia, and nobody said which number that is.
    """
    manifest = run.manifest()
    val = manifest[manifest["image_id"].isin(used_rows(manifest).query("split == 'val'")["image_id"])]
    packed, labels = run.images().read(list(val["image_id"])), val["label"].to_numpy(float)
    varied: Iterable[tuple[str, Packed]] = [("as it is", packed)]
    if threshold is None:
        varied = vary_conditions(packed, labels, run.lungs().read(list(val["image_id"])), run.settings.seed)
    answers = {name: network.ask(changed) for name, changed in varied}
    weights = draw_patients(val["group_id"], run.settings.evaluation.n_bootstrap, run.settings.seed)
    auc = summarise(measure_auc(val, answers["as it is"], weights), "a class is missing")
    if auc["value"] is not None and auc["high"] < 0.5 and "pneumonia" in network.reading.guessed:
        raise SettingsError(
            f"read.pneumonia: AUC on validation is {format_value(auc)}, so the number seems to stand for normal; give "
            "--read.pneumonia rest, or 0 if it does not"
        )
    print(f"  AUC on the {len(val):,} validation images of the run: {format_value(auc)}")
    if threshold is not None:
        return threshold
    conditions = np.repeat(list(answers), len(labels)).tolist()
    return choose_threshold(np.tile(labels, len(answers)), np.concatenate(list(answers.values())), conditions)


def explain_network(
    run: Run, network: ForeignNetwork, probability: dict[str, float], threshold: float, out: Path
) -> None:
    """LIME maps of the network and of the run's model, of the images that the run explained."""
    rows = []
    for row in plan_images(run):
        p = round(float(probability[row["image_id"]]), 6)
        rows.append(
            {**row, "probability": p, "decision": int(p >= threshold), "right": bool((p >= threshold) == row["label"])}
        )
    size = run.settings.explanation.batch_size
    networks = {
        FOREIGN: (network.answer, threshold),
        MODEL: (load_for_lime(run.folder, MODEL, size), read_threshold_of(run.folder, MODEL)),
    }
    (out / "explanations").mkdir()
    explain_rows(run, rows, networks, out / "explanations")
