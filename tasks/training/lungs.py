"""Fit the segmenter of lungs: to lungs that people drew in X-rays, and to drawn chests, which know theirs.

Reads ``manifest.parquet``, the packed arrays, and masks with their table; writes ``segmenter/`` into the run folder:
``model.keras``, ``model.sha256``, ``history.csv``, ``masks.csv`` (which image's mask served for what) and
``card.json``. Patients are kept apart: those of the validation split are only reported on, so that validation stays a
judge of what is built on the lungs; of the others some tune the recipe, and the rest is fitted to. How low
people draw the lower border goes with the class: masks that are far off are not fitted to.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from tasks.errors import ArchiveError, TableError
from tasks.files import sha256_of_file
from tasks.measures import format_value
from tasks.pixels.content import MAX_FILE_BYTES, UndecodableError
from tasks.pixels.decoding import decode
from tasks.records import SUBTYPES, Facts
from tasks.runs.provenance import BACKENDS, find_backend
from tasks.runs.run import Run
from tasks.runs.stages import stage_task
from tasks.sources.archives import open_archive
from tasks.tables import read_rows
from tasks.training.drawn_pictures import draw_pictures
from tasks.training.epochs import CourseRecipe, start_course
from tasks.training.lung_quality import judge_lungs, measure_dice

TUNE_SHARE = 0.1
SALT = "segmenter"
PARTS = ("report", "tune", "style", "fit")
OTHER_STYLE = 0.03
"""Share of the height by which a mask's lower border may differ from the usual one to be fitted to."""
N_CHESTS_JUDGED = 200


class LungRecipe(CourseRecipe):
    """How a segmenter of lungs is trained (``flows.train_lungs``); no part of a run's settings, which use a trained
    one.
    """

    widths: tuple[int, ...] = Field(
        (24, 48, 96, 80),
        min_length=2,
        max_length=4,  # below 7 px, halving and doubling no longer meet
        description="Channels of the network at 56 px, 28 px and so on, halving.",
    )
    batch_size: int = Field(16, ge=1, le=4_096, description="Images in one optimisation step.")
    learning_rate: float = Field(2.5e-3, gt=0, le=1, description="Peak learning rate of the cosine schedule (AdamW).")
    n_chests: int = Field(400, ge=40, le=10**6, description="Drawn chests in all.")
    n_chests_shown: int = Field(250, ge=0, le=10**6, description="Drawn chests in an epoch.")


@dataclass(frozen=True, slots=True)
class MaskRow:
    """A row of the table of masks."""

    path: str
    lower_border_below_prediction: float


class MaskedImages(NamedTuple):
    """Images in which people drew the lungs.

    Attributes:
        rows: As from ``join_masks``.
        pixels: uint8 ``(n, 224, 224)``.
        lungs: uint8 ``(n, 224, 224)``, 255 lung.
    """

    rows: pd.DataFrame
    pixels: NDArray[np.uint8]
    lungs: NDArray[np.uint8]

    def part(self, name: str) -> "MaskedImages":
        """Those of a part."""
        chosen = (self.rows["part"] == name).to_numpy()
        return MaskedImages(self.rows[chosen], self.pixels[chosen], self.lungs[chosen])


@stage_task("fit lungs")
def fit_lungs(run: Run, masks: str, table: str, recipe: LungRecipe) -> Facts:
    """Trains a segmenter on masks of the run's images, and says how good it is on other patients.

    Raises:
        TableError: If the table and the masks do not fit the source.
        ArchiveError: If the masks are no archive.
    """
    backend = find_backend()
    rows = join_masks(run.manifest(), pd.DataFrame(read_rows(Path(table), "table", MaskRow)))

    def make(out: Path) -> Facts:
        lungs = read_masks(Path(masks), list(rows["path"]), run)
        masked = MaskedImages(rows, run.images().read(list(rows["image_id"])), lungs)
        return train_lungs(masked, recipe, run.settings.seed, out / "segmenter")

    given = {
        "rows": rows.to_csv(index=False),
        "masks": sha256_of_file(Path(masks)),
        "recipe": recipe.model_dump(),
        "seed": run.settings.seed,
        "backend": backend,
    }
    packages = ("keras", BACKENDS[backend])
    facts = run.stage(
        "fit_lungs", reads=["arrays/index.json"], given=given, make=make, packages=packages, resumable=True
    )
    judged = facts["card"]["figures"]["report"]["all"]
    print(f"the segmenter on {judged['n']:,} masks of patients it has not seen: Dice {format_value(judged['dice'])}")
    return facts


def join_masks(manifest: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Masks with what the manifest knows of their images, a row per distinct file.

    Returns:
        ``path, image_id, sha256, subtype, group_id``; ``shift``, by how much the lower border differs from the usual
        one; and ``part``: ``report``, ``tune``, ``fit``, or ``style`` in place of ``fit`` for a mask of another style.

    Raises:
        TableError: If a part has no image.
    """
    usable = manifest["excluded"].fillna("").str.startswith("undecodable").ne(True)
    known = manifest.loc[usable, ["path", "image_id", "sha256", "subtype", "group_id", "split"]]
    rows = table.rename(columns={"lower_border_below_prediction": "shift"}).merge(known, on="path")
    tuned = rows["group_id"].map(patient_place) < TUNE_SHARE
    part = np.where(tuned, "tune", np.where(rows["shift"].abs() > OTHER_STYLE, "style", "fit"))
    rows["part"] = np.where(rows.pop("split") != "train", "report", part)
    # Of equal files the one that is fitted to least counts.
    rows = rows.sort_values("part", key=lambda part: part.map(PARTS.index), kind="stable")
    rows = rows.drop_duplicates("sha256").sort_values("path", ignore_index=True)
    for name in ("fit", "tune", "report"):
        if not (rows["part"] == name).any():
            raise TableError(
                f"table: no mask of the part {name!r} of the patients belongs to this source; give a table whose paths "
                "are those of the images, and more masks"
            )
    return rows


def patient_place(group_id: str) -> float:
    """A number in [0, 1) for a patient, the same on every machine and in every year."""
    return int(hashlib.sha256(f"{SALT}:{group_id}".encode()).hexdigest()[:8], 16) / 2**32


def read_masks(masks: Path, paths: list[str], run: Run) -> NDArray[np.uint8]:
    """The masks of images, from a zip: uint8 ``(n, 224, 224)``, 255 lung; each lies at the image's path, as PNG.

    Raises:
        ArchiveError: If one is missing or does not decode.
    """
    found = []
    with open_archive(masks, run.settings.ingestion, Path(run.settings.storage.raw)) as archive:
        held = set(archive.names)
        for path in paths:
            name = f"{path.rpartition('.')[0]}.png"
            if name not in held:
                raise ArchiveError(f"masks: {masks} lacks {name}; add it, or take its image out of the table")
            try:
                found.append(decode(archive.read(name, MAX_FILE_BYTES)))
            except UndecodableError as error:
                raise ArchiveError(f"masks: {name} of {masks} {error}; add it again as a PNG") from None
    return np.stack(found)


def train_lungs(masked: MaskedImages, recipe: LungRecipe, seed: int, folder: Path) -> Facts:
    """Trains, resuming from a checkpoint in ``folder`` if there is one; measures, writes all files.

    Raises:
        SettingsError: If an epoch has fewer pictures than a batch.
    """
    from tasks.networks.segmenter import build_core, finish_segmenter, segment_pixels
    from tasks.training.lung_lessons import LungLesson, build_lung_trainer

    fitted, tuned = masked.part("fit"), masked.part("tune")
    lesson = LungLesson(fitted.pixels, fitted.lungs)
    n_shown = len(lesson) + recipe.n_chests_shown
    course = start_course(
        recipe, seed, n_shown, folder, lambda: build_lung_trainer(build_core(seed, recipe.widths), seed)
    )
    segmenter = finish_segmenter(course.trainer.get_layer("core"))
    pixels, lungs, _ = draw_pictures(recipe.n_chests, seed + 1_000, "lungs")
    chests = LungLesson(pixels, lungs)

    def segment(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return np.concatenate(list(segment_pixels(segmenter, pixels)))

    def compose(rng: np.random.Generator) -> LungLesson:
        return lesson.join(chests, rng.choice(len(chests), recipe.n_chests_shown))

    def judge() -> Facts:
        figures = judge_lungs(tuned.rows, segment(tuned.pixels), tuned.lungs, OTHER_STYLE, seed)
        return {"tune_dice": figures["all"]["dice"]["value"], "tune_class_gap": figures["class_gap"]}

    course.train("segmenter of lungs", compose, judge)
    figures = {}
    for part in ("tune", "report"):
        some = masked.part(part)
        figures[part] = judge_lungs(some.rows, segment(some.pixels), some.lungs, OTHER_STYLE, seed)
    pixels, lungs, _ = draw_pictures(N_CHESTS_JUDGED, seed + 2_000, "lungs")
    found = measure_dice(segment(pixels), lungs)
    figures["drawn"] = {"n": len(found), "dice": round(float(found.mean()), 4), "lowest": round(float(found.min()), 4)}
    card = course.describe("flows.train_lungs --source SOURCE --masks MASKS --table TABLE")
    card |= count_masks(masked.rows) | {"figures": figures}
    return {"card": course.finish(segmenter, card, masked.rows, "masks.csv")}


def count_masks(rows: pd.DataFrame) -> Facts:
    """What ``card.json`` says of the masks: how many images and patients are in each part, by class."""
    counts = rows.groupby(["part", "subtype"]).size()
    return {
        "masks": {part: {kind: int(counts.get((part, kind), 0)) for kind in SUBTYPES} for part in PARTS},
        "patients": {part: int(rows.loc[rows["part"] == part, "group_id"].nunique()) for part in PARTS},
    }
