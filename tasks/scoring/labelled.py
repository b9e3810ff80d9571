"""How good a run's network is on images of another place: scores compared with labels that people gave.

Reads a table of scores and a table ``path,label`` with, where known, ``patient_id`` and ``group``; writes
``<scores>.metrics.json`` beside the scores, with figures as ``metrics.json`` of a run has them.
"""

from pathlib import Path
from typing import Annotated

import pandas as pd
from prefect import task
from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from tasks.files import write_json
from tasks.matching import match_rows
from tasks.measures import format_value, measure_calibration, measure_group
from tasks.records import UNKNOWN, Facts
from tasks.runs.places import Place
from tasks.scoring.scores import read_threshold
from tasks.settings import Settings
from tasks.tables import Label, blank_unknown, list_rows


@dataclass(frozen=True, slots=True)
class LabelRow:
    """A row of a table of labels, the columns as in ``index.csv``; ``group`` is a ward, a machine, a year."""

    path: str
    label: Label
    patient_id: Annotated[str, BeforeValidator(blank_unknown)] = ""
    group: Annotated[str, BeforeValidator(blank_unknown)] = ""


def read_labels(labels: str) -> list[LabelRow]:
    """The rows of a table of labels; see ``list_rows``."""
    return list_rows(Path(labels), "labels", LabelRow)


@task(name="measure against labels")
def measure_scores(labels: str, out: str, settings: Settings) -> Facts:
    """Measures the scores in the table ``out`` against labels; returns what it wrote.

    Raises:
        TableError: If too many of the labels, or none, belong to scored images.
    """
    threshold = read_threshold(Place(settings).folder)
    scores = pd.read_csv(out, keep_default_na=False, dtype=str)
    joined = join_labels(read_labels(labels), labels, scores, settings.quality.max_unmatched)
    found = measure_labelled(joined, threshold, settings) | {"n_unlabelled": len(scores) - len(joined)}
    target = Path(out).with_suffix(".metrics.json")
    write_json(target, found)
    print(
        f"{len(joined):,} scored images have a label, {found['n_unlabelled']:,} have none; {found['n_unread']:,} could "
        f"not be read and {found['n_refused']:,} got no decision; {found['n_no_patient']:,} are of unknown patients, "
        "each a patient of its own"
    )
    for name in ("all", "answered"):
        measured = {each: format_value(found[name].get(each) or {}) for each in ("auc", "sensitivity", "specificity")}
        print(f"{name}: {found[name]['n']:,} images, " + ", ".join(f"{each} {said}" for each, said in measured.items()))
    print(f"all figures, by group too: {target}")
    return found


def join_labels(rows: list[LabelRow], labels: str, scores: pd.DataFrame, max_unmatched: float) -> pd.DataFrame:
    """The scored images that have a label: columns of ``scores``, ``label, group_id, group`` and ``knows_patient``.

    Raises:
        TableError: If too many rows name no scored image, or two name the same.
    """
    known = [
        {
            "path": image,
            "label": row.label,
            # A name that no patient has, since both may be numbers.
            "group_id": f"patient {row.patient_id}" if row.patient_id else f"image {image}",
            "knows_patient": bool(row.patient_id),
            "group": row.group or UNKNOWN,
        }
        for image, row in match_rows(rows, f"labels: {labels}", list(scores["path"]), max_unmatched).items()
    ]
    return scores.merge(pd.DataFrame(known), on="path")


def measure_labelled(joined: pd.DataFrame, threshold: float, settings: Settings) -> Facts:
    """Figures of scored images with labels.

    Args:
        joined: As from ``join_labels``.
        threshold: From which probability on an image counts as pneumonia.
        settings: Draws behind each interval, seed, and ``screening.threshold``.

    Returns:
        Groups as in ``metrics.json``: ``all`` images that could be read, refused or not; ``answered``, those that got
        a decision; of these ``device_free`` and ``with_device`` by their device score, and ``by_group``; the
        ``calibration`` of those; ``threshold``, ``n_unread``, ``n_refused`` and ``n_no_patient``.
    """
    n_bootstrap, seed = settings.evaluation.n_bootstrap, settings.seed
    read = joined[joined["probability"] != ""]
    numbers = ["probability", "device_score"]
    read = read.assign(**{name: read[name].astype(float) for name in numbers})
    answered = read[read["refused"] == ""]
    shows = answered["device_score"] >= settings.screening.threshold
    groups = {"all": read, "answered": answered, "device_free": answered[~shows], "with_device": answered[shows]}
    return {
        "threshold": threshold,
        "n_unread": len(joined) - len(read),
        "n_refused": len(read) - len(answered),
        "n_no_patient": int((~joined["knows_patient"]).sum()),
        **{name: measure_group(rows, threshold, n_bootstrap, seed) for name, rows in groups.items()},
        "by_group": {
            str(name): measure_group(rows, threshold, n_bootstrap, seed) for name, rows in answered.groupby("group")
        },
        "calibration": measure_calibration(answered, n_bootstrap, seed),
    }
