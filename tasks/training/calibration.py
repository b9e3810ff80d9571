"""Calibrate: joins the members to one network whose probabilities mean what they say.

Reads ``members/``, ``manifest.parquet`` and the packed arrays; writes ``model.keras`` and ``model.sha256``;
``shifts.csv``, what the model says of validation images as they are and under each shift (looks of the other
class among these); and
``familiar.npz``, what the images that were learnt from look like. Of the unscreened twin: ``unfiltered.keras``,
``unfiltered.sha256`` and ``unfiltered/shifts.csv``.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.files import write_whole
from tasks.measures import Array, to_logit
from tasks.networks.files import check_network, load_network, save_network
from tasks.networks.shipped import find_network
from tasks.networks.twin import stage_name, used_rows, work_folder
from tasks.records import MODEL, TITLES, Facts
from tasks.runs.artifacts import Progress
from tasks.runs.run import Run
from tasks.runs.stages import stage_task

BATCH_IMAGES = 256


@stage_task("calibrate", task_run_name="calibrate {name}")
def calibrate(run: Run, name: str = MODEL) -> Facts:
    """Joins the members of the model, or of its twin, and calibrates on validation and shifts of it."""
    folder = work_folder(run.folder, name) / "members"
    members = [f"member_{number}" for number in range(1, run.settings.training.n_models + 1)]
    sees_lungs = run.settings.training.field == "lungs"
    lungs = find_network("segmenter", run.settings.screening.segmenter) if sees_lungs else None

    def make(out: Path) -> Facts:
        from tasks.networks.classifier import join_members
        from tasks.networks.familiarity import fit_familiarity, save_familiarity
        from tasks.networks.segmenter import load_segmenter
        from tasks.pixels.covering import find_lungs, widen_lungs

        segmenter = load_segmenter(lungs.folder) if lungs else None
        model = join_members([load_network(folder, member) for member in members], segmenter)
        images = run.images()
        rows = used_rows(run.manifest())
        val = rows[rows["split"] == "val"]
        ids = list(val["image_id"])
        masks = run.lungs().read(ids)
        shifts, found = calibrate_model(model, val, images.read(ids), masks, run.settings.seed)
        write_whole(work_folder(out, name) / "shifts.csv", shifts.to_csv(index=False, float_format="%.6f"))
        checksum = save_network(model, out, name)
        found |= {"n_without_lungs": int((~find_lungs(widen_lungs(masks))).sum())}
        found |= {"n_val": len(val), "n_weights": int(model.count_params()), "model_sha256": checksum}
        if name != MODEL:
            return found
        learnt = list(rows.loc[rows["split"] == "train", "image_id"])
        batches = (images.read(learnt[i : i + BATCH_IMAGES]) for i in range(0, len(learnt), BATCH_IMAGES))
        save_familiarity(fit_familiarity(batches, [run.settings.seed, len(learnt)]), out)
        return found

    given = {
        "network": name,
        "members": [check_network(folder, member) for member in members],
        "segmenter": lungs.sha256 if lungs else None,
        "seed": run.settings.seed,
    }
    stage = stage_name("calibrate", name)
    reads = ["manifest.parquet", "lungs/index.json"]
    facts = run.stage(stage, reads=reads, given=given, make=make, packages=("scikit-learn",))
    print(
        f"calibrated {TITLES[name]} on {facts['n_val']:,} validation images and {facts['n_shifts']} shifts of them: "
        f"logits times {facts['slope']:.2f}, plus {facts['offset']:.2f}"
    )
    if facts["n_without_lungs"]:
        print(f"{facts['n_without_lungs']:,} of these images show no lungs: they keep tones and frame, and lend none")
    return facts


def calibrate_model(
    model: Any, val: pd.DataFrame, packed: NDArray[np.uint8], lungs: NDArray[np.uint8], seed: int
) -> tuple[pd.DataFrame, Facts]:
    """Fits slope and offset of both answers on validation images, as they are and under each shift.

    Args:
        model: From ``tasks.networks.classifier.join_members``; its calibration is set.
        val: ``image_id, label, subtype``.
        packed: Their pixels, uint8 ``(n, 224, 224)``.
        lungs: The masks of their lungs, as the pixels.
        seed: Picks who lends whom a look.

    Returns:
        ``shift, image_id, label, subtype, probability, bacteria``, calibrated, a row per image and shift; and the slope
        and offset of ``probability``, and how many shifts there are.
    """
    from tasks.networks.classifier import answer, set_calibration
    from tasks.pixels.borrowed_looks import N_CONDITIONS, vary_conditions

    tables = []
    progress = Progress("calibrating", f"Validation under {N_CONDITIONS} conditions")
    conditions = vary_conditions(packed, val["label"].to_numpy(float), lungs, seed)
    for number, (name, changed) in enumerate(conditions, start=1):
        answers = answer(model, changed)
        table = val[["image_id", "label", "subtype"]].reset_index(drop=True)
        table.insert(0, "shift", name)
        tables.append(table.assign(probability=answers.probability, bacteria=answers.bacteria))
        progress.show(number, N_CONDITIONS)
    shifts = pd.concat(tables, ignore_index=True)
    asked = {
        "probability": (shifts["label"].notna(), shifts["label"] == 1),
        "bacteria": (shifts["subtype"].isin(["bacteria", "virus"]), shifts["subtype"] == "bacteria"),
    }
    facts: Facts = {"n_shifts": N_CONDITIONS - 1}  # the first is validation as it is
    for name, (rows, positive) in asked.items():
        logits, truth = to_logit(shifts[name].to_numpy(float)), positive[rows].to_numpy(float)
        slope, offset = fit_platt(logits[rows.to_numpy()], truth)
        set_calibration(model, name, slope, offset)
        shifts[name] = 1 / (1 + np.exp(-(slope * logits + offset)))
        if name == "probability":
            facts |= {"slope": round(slope, 4), "offset": round(offset, 4)}
    return shifts, facts


def fit_platt(logits: Array, labels: Array) -> tuple[float, float]:
    """Slope and offset that make sigmoid(slope * logit + offset) a calibrated probability (Platt 1999).

    Platt's targets, (n1 + 1) / (n1 + 2) and 1 / (n0 + 2), keep the slope finite where the classes do not overlap. A
    slope that is not positive would turn the order of answers round; then the logits stay as they are.

    Args:
        logits: ``(n,)``.
        labels: 0 or 1, ``(n,)``; where only one occurs, the logits stay as they are.
    """
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels)) < 2:
        return 1.0, 0.0
    n1, n0 = (labels == 1).sum(), (labels == 0).sum()
    target = np.where(labels == 1, (n1 + 1) / (n1 + 2), 1 / (n0 + 2))
    # A soft target is the hard two, weighted.
    x, y = np.tile(logits, 2)[:, None], np.repeat([1, 0], len(logits))
    fitted = LogisticRegression(C=1e6).fit(x, y, sample_weight=np.concatenate([target, 1 - target]))
    slope, offset = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    return (slope, offset) if slope > 0 else (1.0, 0.0)
