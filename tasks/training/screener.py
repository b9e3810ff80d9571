"""Fit the screener: from drawn devices, which bring exact masks, and from readings, which bring the real thing.

Reads ``manifest.parquet``, the packed arrays and a review table; writes ``screener/`` into the run folder:
``model.keras``, ``model.sha256``, ``history.csv``, ``readings.csv`` (which reading served for what) and ``card.json``.
Patients are kept apart: one part is fitted to, one balances the score at 0.5, and the rest is only reported on.
"""

import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from tasks.addresses import Place
from tasks.devices.files import find_screener
from tasks.devices.quality import judge_screener
from tasks.devices.readings import Reading, find_review_of
from tasks.errors import SettingsError, TableError
from tasks.measures import format_value
from tasks.pixels.packed import PackedImages
from tasks.records import CLASS_NAMES, Facts
from tasks.runs.provenance import BACKENDS, find_backend
from tasks.runs.run import Run
from tasks.runs.stages import stage_task
from tasks.settings import ScreeningSettings
from tasks.tables import read_rows
from tasks.training.epochs import CourseRecipe, start_course
from tasks.training.screener_lessons import Lesson, draw_chests, draw_lessons, read_lessons

PARTS = {"fit": 0.7, "tune": 0.1, "report": 0.2}
SALT = "screener"


class ScreenerRecipe(CourseRecipe):
    """How a screener is trained (``flows.train_screener``); no part of a run's settings, which use a trained one."""

    widths: tuple[int, ...] = Field(
        (24, 48, 96, 128, 160),
        min_length=2,
        max_length=5,  # below 7 px, halving and doubling no longer meet
        description="Channels of the network at 112 px, 56 px and so on, halving.",
    )
    start_from: Place | None = Field(
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


class ReadImages(NamedTuple):
    """Images that people have read for devices.

    Attributes:
        rows: As from ``join_readings``.
        manifest: Of all images of the source.
        images: The pixels of all images of the source.
    """

    rows: pd.DataFrame
    manifest: pd.DataFrame
    images: PackedImages

    def part(self, name: str) -> "ReadImages":
        """Those of a part of the patients."""
        return self._replace(rows=self.rows[self.rows["part"] == name])

    def pixels(self) -> NDArray[np.uint8]:
        """uint8 ``(n, 224, 224)``, in the order of the rows."""
        return self.images.read(list(self.rows["image_id"]))


@stage_task("fit screener")
def fit_screener(run: Run, folder: str, recipe: ScreenerRecipe) -> Facts:
    """Trains a screener on the readings of the run's source, and says how good it is on other patients.

    Raises:
        TableError: If no review table applies.
    """
    manifest = run.manifest()
    backend = find_backend()
    review = find_review_of(run, Path(folder))
    if review.address is None:
        raise TableError(
            "screening.review: no review table belongs to this source; name a CSV with the columns path,device"
        )
    table = pd.DataFrame(read_rows(review.address, "screening.review", ReadingWithBox))
    rows = join_readings(manifest, table.assign(path=table["path"].map(review.images)))
    if review.warning:
        print(f"warning: {review.warning}")

    def make(out: Path) -> Facts:
        return train_screener(ReadImages(rows, manifest, run.images()), recipe, run.settings.seed, out / "screener")

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


def part_of_patient(group_id: str) -> str:
    """``fit``, ``tune`` or ``report``: the same for a patient on every machine and in every year."""
    place = int(hashlib.sha256(f"{SALT}:{group_id}".encode()).hexdigest()[:8], 16) / 2**32
    for part, share in PARTS.items():
        if place < share:
            return part
        place -= share
    return "report"


def join_readings(manifest: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Readings with what the manifest knows of their images, a row per distinct file.

    Returns:
        ``image_id, sha256, label, group_id, device`` (0 or 1), ``confidence`` (2 clear to 0 guess; 2 where the
        table has none), ``x0, y0, x1, y1`` (fractions; missing where there is no box) and ``part``.
    """
    read = table[["path"]].copy()
    read["device"] = table["device"].astype(int)
    for name in ("confidence", "x0", "y0", "x1", "y1"):
        read[name] = pd.to_numeric(table[name], errors="coerce") if name in table else np.nan
    read["confidence"] = read["confidence"].fillna(2).astype(int)
    known = manifest.loc[
        manifest["excluded"].fillna("").str.startswith("undecodable").ne(True),
        ["path", "image_id", "sha256", "label", "group_id", "split"],
    ]
    rows = read.merge(known, on="path").sort_values(["device", "path"], ascending=[False, True])
    rows = rows.drop_duplicates("sha256").sort_values("path", ignore_index=True)
    return rows.assign(part=rows["group_id"].map(part_of_patient))


def train_screener(read: ReadImages, recipe: ScreenerRecipe, seed: int, folder: Path) -> Facts:
    """Trains, resuming from a checkpoint in ``folder`` if there is one; calibrates, measures, writes all files.

    Raises:
        TableError: If a part lacks images with or without devices, or none is surely without.
        SettingsError: If an epoch has fewer pictures than a batch.
    """
    from tasks.devices.screener import finish_screener, score_pixels
    from tasks.training.screener_losses import build_screener_trainer

    check_parts(read.rows)
    fitted, tuned = read.part("fit"), read.part("tune")
    lesson, tune_pixels = read_lessons(fitted.rows, fitted.pixels()), tuned.pixels()
    chests = draw_chests(recipe.n_chests, seed + 1_000)
    n_shown = len(lesson) + recipe.n_composites + recipe.n_chests_shown
    course = start_course(recipe, seed, n_shown, folder, lambda: build_screener_trainer(start_core(recipe, seed), seed))
    core = course.trainer.get_layer("core")
    screener = finish_screener(core)

    def compose(rng: np.random.Generator) -> Lesson:
        return compose_epoch(lesson, fitted.rows, chests, recipe, rng)

    def judge() -> Facts:
        return {"tune_auc": within_class_auc(tuned.rows, score_pixels(screener, tune_pixels))}

    course.train("screener", compose, judge)
    balance_score(core, tuned.rows["device"].to_numpy(), score_pixels(screener, tune_pixels))
    card = course.describe("flows.train_screener --source SOURCE --review REVIEW")
    card |= count_readings(read.rows) | judge_parts(read, screener, seed)
    return {"card": course.finish(screener, card, read.rows, "readings.csv")}


def check_parts(rows: pd.DataFrame) -> None:
    """Refuses readings of which a part of the patients cannot serve its purpose.

    Raises:
        TableError: If a part lacks images with or without devices.
    """
    for part in PARTS:
        if rows.loc[rows["part"] == part, "device"].nunique() < 2:
            raise TableError(
                f"screening.review: the readings of part {part!r} of the patients lack images with or without a "
                "device; read more images"
            )


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


def judge_parts(read: ReadImages, screener: Any, seed: int) -> Facts:
    """How good the screener is on the parts of the patients that it was not fitted to.

    Returns:
        ``figures`` by part, and ``cuts``: what each choice of ``screening.exclude_from`` would cost on the tuning part,
        and leave.
    """
    from tasks.devices.screener import score_pixels

    defaults = ScreeningSettings()
    scores = pd.Series(score_pixels(screener, read.pixels()), index=read.rows.index)
    train = read.manifest[read.manifest["excluded"].fillna("") == ""]
    figures, cuts = {}, []
    for part in ("tune", "report"):
        chosen = read.part(part).rows.drop_duplicates("sha256")
        table = train.assign(
            usable=True,
            device_reading=train["sha256"].map(dict(zip(chosen["sha256"], chosen["device"], strict=True))),
            device_score=train["sha256"].map(dict(zip(chosen["sha256"], scores[chosen.index], strict=True))),
        )
        figures[part] = judge_screener(table, (), defaults.threshold, defaults.exclude_from, 500, seed)
        if part == "tune":
            for cut in (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5):
                judged = judge_screener(table, (), defaults.threshold, cut, 20, seed)
                cost, residual = judged["cost"]["pneumonia"]["value"], judged["residual"]["value"]
                cuts.append({"exclude_from": cut, "cost_pneumonia": cost, "residual": residual})
    return {"figures": figures, "cuts": cuts}


def count_readings(rows: pd.DataFrame) -> Facts:
    """What ``card.json`` says of the readings: how many images and patients are in each part and class."""
    counts = rows.groupby(["part", "device"]).size()
    return {
        "readings": {part: {str(d): int(counts.get((part, d), 0)) for d in (0, 1)} for part in PARTS},
        "patients": {part: int(rows.loc[rows["part"] == part, "group_id"].nunique()) for part in PARTS},
        "classes": {CLASS_NAMES[c]: int((rows["label"] == c).sum()) for c in CLASS_NAMES},
    }
