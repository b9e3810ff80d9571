"""Fit the screener: from drawn devices, which bring exact masks, and from readings, which bring the real thing.

Reads ``manifest.parquet``, the packed arrays and a review table; writes ``screener/`` into the run folder:
``model.keras``, ``model.sha256``, ``history.csv``, ``readings.csv`` (which reading served for what) and ``card.json``.
Patients are kept apart: one part is fitted to, one balances the score at 0.5, and the rest is only reported on. After
each epoch a checkpoint is kept, so that a killed training resumes from its last whole epoch.
"""

import hashlib
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from tasks.devices.files import find_screener
from tasks.devices.quality import judge_screener
from tasks.devices.readings import Reading, find_review
from tasks.errors import SettingsError, TableError
from tasks.files import digest, write_json
from tasks.measures import format_value
from tasks.pixels.decoding import to_float
from tasks.pixels.packed import PackedImages
from tasks.records import CLASS_NAMES, Facts
from tasks.runs.artifacts import Progress
from tasks.runs.provenance import BACKENDS, describe_hardware, find_backend
from tasks.runs.run import Run
from tasks.runs.stages import stage_task
from tasks.settings import (
    ScreeningSettings,
    Section,
)
from tasks.tables import read_rows
from tasks.training.screener_lessons import Lesson, draw_chests, draw_lessons, read_lessons

PARTS = {"fit": 0.7, "tune": 0.1, "report": 0.2}
SALT = "screener"


class ScreenerRecipe(Section):
    """How a screener is trained (``flows.train_screener``); no part of a run's settings, which use a trained one."""

    epochs: int = Field(20, ge=1, le=1_000, description="Passes over all readings and as many fresh drawings.")
    batch_size: int = Field(32, ge=1, le=4_096, description="Images in one optimisation step.")
    learning_rate: float = Field(1.5e-3, gt=0, le=1, description="Peak learning rate of the cosine schedule (AdamW).")
    widths: tuple[int, ...] = Field(
        (24, 48, 96, 128, 160),
        min_length=2,
        max_length=5,  # below 7 px, halving and doubling no longer meet
        description="Channels of the network at 112 px, 56 px and so on, halving.",
    )
    start_from: str | None = Field(
        None, description="Folder of a screener of the same widths whose weights training starts from."
    )
    n_composites: int = Field(1_300, ge=10, le=10**6, description="Device-free images drawn on afresh in each epoch.")
    n_chests: int = Field(2_000, ge=40, le=10**6, description="Drawn chests in all.")
    n_chests_shown: int = Field(
        650, ge=0, le=10**6, description="Drawn chests in an epoch, a third of them drawn on afresh."
    )


@dataclass(frozen=True, slots=True)
class ReadingWithBox(Reading):
    """A row of a review table that is trained on; the box is in fractions, and none where these are no numbers."""

    confidence: Literal["", "0", "1", "2"] = ""
    x0: str = ""
    y0: str = ""
    x1: str = ""
    y1: str = ""


@stage_task("fit screener")
def fit_screener(run: Run, folder: str, recipe: ScreenerRecipe) -> Facts:
    """Trains a screener on the readings of the run's source, and says how good it is on other patients.

    Raises:
        TableError: If no review table applies.
    """
    manifest = run.manifest()
    backend = find_backend()
    review = find_review(run.settings.screening.review, Path(folder), manifest["path"])
    if review.address is None:
        raise TableError(
            "screening.review: no review table belongs to this source; name a CSV with the columns path,device"
        )
    rows = join_readings(manifest, pd.DataFrame(read_rows(review.address, "screening.review", ReadingWithBox)))

    def make(out: Path) -> Facts:
        return train_screener(rows, manifest, run.images(), recipe, run.settings.seed, out / "screener")

    given = {
        "rows": rows.to_csv(index=False),
        "recipe": recipe.model_dump(),
        "start_from": find_screener(recipe.start_from).sha256 if recipe.start_from is not None else None,
        "seed": run.settings.seed,
        "backend": backend,
    }
    facts = run.stage(
        "fit_screener",
        reads=["arrays/index.json"],
        given=given,
        make=make,
        packages=("keras", BACKENDS[backend]),
        resumable=True,
    )
    report = facts["card"]["figures"]["report"]
    figures = {
        name: format_value(report[name]["auc"]) if report[name]["n"] else "none" for name in ("all", "pneumonia")
    }
    print(
        f"the screener on {report['all']['n']:,} readings of patients it has not seen: AUC {figures['all']}, within "
        f"pneumonia {figures['pneumonia']}"
    )
    return facts


def part_of_patient(patient_id: str) -> str:
    """``fit``, ``tune`` or ``report``: the same for a patient on every machine and in every year."""
    place = int(hashlib.sha256(f"{SALT}:{patient_id}".encode()).hexdigest()[:8], 16) / 2**32
    for part, share in PARTS.items():
        if place < share:
            return part
        place -= share
    return "report"


def join_readings(manifest: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Readings with what the manifest knows of their images, a row per distinct file.

    Returns:
        ``image_id, sha256, label, patient_id, device`` (0 or 1), ``confidence`` (2 clear to 0 guess; 2 where the
        table has none), ``x0, y0, x1, y1`` (fractions; missing where there is no box) and ``part``.
    """
    read = table[["path"]].copy()
    read["device"] = table["device"].astype(int)
    for name in ("confidence", "x0", "y0", "x1", "y1"):
        read[name] = pd.to_numeric(table[name], errors="coerce") if name in table else np.nan
    read["confidence"] = read["confidence"].fillna(2).astype(int)
    known = manifest.loc[
        manifest["excluded"].fillna("").str.startswith("undecodable").ne(True),
        ["path", "image_id", "sha256", "label", "patient_id", "split"],
    ]
    rows = read.merge(known, on="path").sort_values(["device", "path"], ascending=[False, True])
    rows = rows.drop_duplicates("sha256").sort_values("path", ignore_index=True)
    return rows.assign(part=rows["patient_id"].map(part_of_patient))


def train_screener(
    rows: pd.DataFrame, manifest: pd.DataFrame, images: PackedImages, recipe: ScreenerRecipe, seed: int, folder: Path
) -> Facts:
    """Trains, resuming from a checkpoint in ``folder`` if there is one; calibrates, measures, writes all files.

    Raises:
        TableError: If a part lacks images with or without devices, or none is surely without.
        SettingsError: If an epoch has fewer pictures than a batch.
    """
    from tasks.devices.screener import finish_screener, score_pixels
    from tasks.networks.checkpoints import (
        CHECKPOINT,
        build_optimizer,
        load_checkpoint,
        reseed,
        save_checkpoint,
    )
    from tasks.networks.files import save_network
    from tasks.training.screener_losses import build_screener_trainer, mean_of_losses

    for part in PARTS:
        if rows.loc[rows["part"] == part, "device"].nunique() < 2:
            raise TableError(
                f"screening.review: the readings of part {part!r} of the patients lack images with or without a "
                "device; read more images"
            )
    folder.mkdir(exist_ok=True)
    fitted, tuned = (rows[rows["part"] == part] for part in ("fit", "tune"))
    read = read_lessons(fitted, images.read(list(fitted["image_id"])))
    tune_pixels = images.read(list(tuned["image_id"]))
    chests = draw_chests(recipe.n_chests, seed + 1_000)
    n_epoch = len(read) + recipe.n_composites + recipe.n_chests_shown
    if n_epoch < recipe.batch_size:
        raise SettingsError(f"recipe.batch_size: {recipe.batch_size} is more than the {n_epoch} pictures of an epoch")

    of = digest([recipe.model_dump(), seed, len(read)])
    if (kept := load_checkpoint(folder, of)) is not None:
        trainer, state = kept
        print(f"resuming after epoch {len(state['history'])} from {folder}")
    else:
        state = {"history": [], "of": of}
        trainer = build_screener_trainer(start_core(recipe, seed), seed)
        optimizer = build_optimizer(recipe.learning_rate, recipe.epochs, n_epoch, recipe.batch_size)
        trainer.compile(optimizer=optimizer, loss=mean_of_losses)
    screener = finish_screener(trainer.get_layer("core"))
    progress = Progress("screener", f"Training the screener, {recipe.epochs} epochs")
    for epoch in range(len(state["history"]) + 1, recipe.epochs + 1):
        start = time.perf_counter()
        reseed(trainer, seed, epoch)
        rng = np.random.default_rng([seed, epoch])
        loss = run_screener_epoch(trainer, compose_epoch(read, fitted, chests, recipe, rng), recipe.batch_size, rng)
        plain = trainer.get_weights()
        trainer.optimizer.finalize_variable_values(trainer.trainable_variables)
        auc = within_class_auc(tuned, score_pixels(screener, tune_pixels))
        if epoch < recipe.epochs:
            trainer.set_weights(plain)
        seconds = round(time.perf_counter() - start, 2)
        state["history"].append({"epoch": epoch, "loss": round(loss, 6), "tune_auc": round(auc, 6), "seconds": seconds})
        save_checkpoint(trainer, state, folder)
        progress.show(epoch, recipe.epochs)
        print(f"epoch {epoch} of {recipe.epochs}: loss {loss:.4f}, AUC within pneumonia {auc:.4f}, {seconds:.1f} s")

    balance_score(trainer.get_layer("core"), tuned["device"].to_numpy(), score_pixels(screener, tune_pixels))
    checksum = save_network(screener, folder)
    pd.DataFrame(state["history"]).to_csv(folder / "history.csv", index=False)
    rows.assign(sha256=rows["sha256"].str[:16])[["sha256", "part"]].to_csv(folder / "readings.csv", index=False)
    scores = pd.Series(score_pixels(screener, images.read(list(rows["image_id"]))), index=rows.index)
    card = describe_screener(rows, scores, manifest, recipe, seed, checksum, state["history"])
    write_json(folder / "card.json", card)
    for leftover in [folder / CHECKPOINT, *folder.glob("checkpoint-*.keras")]:
        leftover.unlink()
    return {"card": card}


def start_core(recipe: ScreenerRecipe, seed: int) -> Any:
    """An untrained core, or one with the weights of the screener that ``recipe.start_from`` names.

    Raises:
        SettingsError: If that screener has other widths.
    """
    from tasks.devices.screener import build_core, load_screener

    core = build_core(seed, recipe.widths)
    if recipe.start_from is not None:
        try:
            core.set_weights(load_screener(Path(recipe.start_from)).get_weights())
        except ValueError:
            raise SettingsError(
                f"recipe.start_from: {recipe.start_from} has other widths than recipe.widths; give those of its card"
            ) from None
    return core


def compose_epoch(
    read: Lesson, fitted: pd.DataFrame, chests: Lesson, recipe: ScreenerRecipe, rng: np.random.Generator
) -> Lesson:
    """All readings once, and fresh drawings: on clean pictures, of which most are sick children's, and on chests."""
    clean = np.flatnonzero((read.devices == 0) & (read.weights > 0.5))
    if not len(clean):
        raise TableError("screening.review: no reading is sure that there is no device; read more images")
    sick = (fitted["label"] == 1).to_numpy()[clean]
    chance = np.where(sick, 0.65 / max(sick.sum(), 1), 0.35 / max((~sick).sum(), 1))
    drawn_on = rng.choice(clean, recipe.n_composites, p=chance / chance.sum())
    bare = np.flatnonzero(chests.devices == 0)
    n_afresh = recipe.n_chests_shown // 3
    return Lesson.join(
        [
            read,
            draw_lessons(read.pixels[drawn_on], rng),
            chests.take(rng.choice(len(chests), recipe.n_chests_shown - n_afresh)),
            draw_lessons(chests.pixels[rng.choice(bare, n_afresh)], rng),
        ]
    )


def run_screener_epoch(trainer: Any, lesson: Lesson, batch_size: int, rng: np.random.Generator) -> float:
    """One pass over a lesson in random order; returns the mean loss."""
    order = rng.permutation(len(lesson))
    losses = []
    for start in range(0, len(order) - batch_size + 1, batch_size):
        some = lesson.take(order[start : start + batch_size])
        pictures = [to_float(some.pixels), to_float(some.masks), some.boxes]
        facts = [values[:, None] for values in (some.devices, some.exact, some.weights)]
        loss = trainer.train_on_batch([*pictures, *facts], np.zeros((len(some), 1), np.float32))
        losses.append(float(np.ravel(loss)[0]))
        trainer.reset_metrics()
    return float(np.mean(losses))


def within_class_auc(rows: pd.DataFrame, scores: NDArray[np.float32]) -> float:
    """AUC over pneumonia images alone, if they show both: who merely sees sickness scores well over both classes."""
    from sklearn.metrics import roc_auc_score

    sick = (rows["label"] == 1).to_numpy()
    if len(set(rows["device"].to_numpy()[sick])) < 2:
        sick[:] = True
    return float(roc_auc_score(rows["device"].to_numpy()[sick], scores[sick]))


def balance_score(core: Any, devices: NDArray[Any], scores: NDArray[np.float32]) -> None:
    """Platt scaling (Platt 1999) of the score inside the network, both kinds weighing the same: balanced at 0.5."""
    from sklearn.linear_model import LogisticRegression

    clipped = np.clip(scores.astype(float), 1e-7, 1 - 1e-7)
    logits = np.log(clipped / (1 - clipped))[:, None]
    fitted = LogisticRegression(class_weight="balanced", C=1e6).fit(logits, devices)
    slope, shift = max(float(fitted.coef_[0, 0]), 1e-3), float(fitted.intercept_[0])
    layer = core.get_layer("score_logit")
    kernel, bias = layer.get_weights()
    layer.set_weights([kernel * slope, bias * slope + shift])


def describe_screener(
    rows: pd.DataFrame,
    scores: "pd.Series[float]",
    manifest: pd.DataFrame,
    recipe: ScreenerRecipe,
    seed: int,
    checksum: str,
    history: list[Facts],
) -> Facts:
    """``card.json``: what the screener was fitted to, how, and how good it is on the other parts.

    ``cuts`` lists, for the tuning part, what each choice of ``screening.exclude_from`` would cost and leave.
    """
    from importlib.metadata import version

    defaults = ScreeningSettings()
    train = manifest[manifest["excluded"].fillna("") == ""]
    figures, cuts = {}, []
    for part in ("tune", "report"):
        chosen = rows[rows["part"] == part].drop_duplicates("sha256")
        table = train.assign(usable=True)
        table = table.assign(
            device_reading=table["sha256"].map(dict(zip(chosen["sha256"], chosen["device"], strict=True))),
            device_score=table["sha256"].map(dict(zip(chosen["sha256"], scores[chosen.index], strict=True))),
        )
        figures[part] = judge_screener(table, (), defaults.threshold, defaults.exclude_from, 500, seed)
        if part == "tune":
            for cut in (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5):
                judged = judge_screener(table, (), defaults.threshold, cut, 20, seed)
                cost, residual = judged["cost"]["pneumonia"]["value"], judged["residual"]["value"]
                cuts.append({"exclude_from": cut, "cost_pneumonia": cost, "residual": residual})
    counts = rows.groupby(["part", "device"]).size()
    changed = recipe.model_dump(exclude_defaults=True)
    flags = " ".join(f"--recipe.{name.replace('_', '-')} {value}" for name, value in changed.items())
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": f"python -m flows.train_screener --source SOURCE --review REVIEW --seed {seed} {flags}".rstrip(),
        "model_sha256": checksum,
        "seed": seed,
        "recipe": recipe.model_dump(),
        "readings": {part: {str(d): int(counts.get((part, d), 0)) for d in (0, 1)} for part in PARTS},
        "patients": {part: int(rows.loc[rows["part"] == part, "patient_id"].nunique()) for part in PARTS},
        "classes": {CLASS_NAMES[c]: int((rows["label"] == c).sum()) for c in CLASS_NAMES},
        "figures": figures,
        "cuts": cuts,
        "seconds": round(sum(epoch["seconds"] for epoch in history), 1),
        "hardware": describe_hardware(),
        "versions": {name: version(name) for name in ("keras", BACKENDS[find_backend()], "numpy")},
    }
