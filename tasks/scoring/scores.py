"""Score loose images with the network of a run: probability, decision and device score, or why there is none.

Reads a folder or zip of X-rays, and of the run folder ``model.keras``, ``metrics.json`` (the threshold),
``familiar.npz`` and ``lungs/bounds.json``; writes a CSV ``path,probability,decision,device_score,refused``. Nothing in
the run folder changes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prefect import task

from tasks.devices.files import find_screener
from tasks.errors import RunError, SettingsError
from tasks.findings import read_metrics
from tasks.networks.familiarity import Familiarity, load_familiarity
from tasks.networks.files import check_network, load_network
from tasks.networks.lung_fields import LungBounds, describe_lungs, load_bounds, measure_fields
from tasks.networks.shipped import find_network
from tasks.pixels.greys import SIDE_PX
from tasks.records import Facts, StageParts
from tasks.runs.places import Place
from tasks.runs.stages import STAGES_FOLDER, read_stage
from tasks.scoring.batches import (
    fill_batch,
    format_rows,
    list_loose_images,
    open_segmenter,
    open_table,
    screen_batch,
    segment_batch,
    watch_batches,
    write_cell,
)
from tasks.scoring.loose_images import LooseBatch, open_loose_images
from tasks.settings import Settings

HEADER = "path,probability,decision,device_score,refused\n"


@dataclass(frozen=True)
class Scorer:
    """All that scoring needs: the network of a run, its threshold and bounds, a screener and a segmenter."""

    network: Any
    threshold: float
    familiarity: Familiarity
    lungs: LungBounds
    screener: Any
    segmenter: Any


@dataclass(frozen=True)
class ScoredImage:
    """The scores of an image that was read; ``unlike`` and ``lungless`` are empty, or why its decision is left out."""

    probability: float
    device_score: float
    unlike: str = ""
    lungless: str = ""

    @property
    def refused(self) -> str:
        """All reasons why its decision is left out, or empty."""
        return "; ".join(filter(None, (self.unlike, self.lungless)))


@task(name="find images to score")
def find_scored_images(images: str, out: str, settings: Settings) -> Facts:
    """Lists the images; refuses unusable places and runs before anything is written."""
    run = Place(settings).folder
    refuse_run_files(run, out)
    read_threshold(run)
    if not math.isfinite(load_familiarity(run).bound):
        print(f"{run} was trained on too few images to tell what looks unlike them: nothing is refused for its looks")
    find_screener(settings.screening.screener)
    if load_bounds(run).segmenter != find_network("segmenter", settings.screening.segmenter).sha256:
        print(f"warning: another segmenter drew the lungs of {run}: whether lungs are plausible is judged less well")
    return list_loose_images(images, out, {}, settings)


@task(name="score images")
def score_images(images: str, out: str, settings: Settings) -> Facts:
    """Scores the images batch by batch, then writes the table; returns counts for log and exit code."""
    run = Place(settings).folder
    scorer = load_scorer(run, settings)
    counts = {"n_images": 0, "n_pneumonia": 0, "n_unlike": 0, "n_lungless": 0, "n_refused": 0}
    with open_loose_images(images, as_packed(run, settings)) as found, open_table(out, {}, HEADER) as table:
        found.least_bits = read_bits(run)
        for batch in watch_batches(found, "score-images", f"Scoring {len(found.paths):,} images"):
            scored = score_batch(scorer, batch.pixels)
            table.write("".join(table_rows(batch, scored, scorer.threshold)).encode())
            counts["n_images"] += len(batch.paths)
            counts["n_pneumonia"] += sum(decide_image(image, scorer.threshold) == "1" for image in scored)
            counts["n_unlike"] += sum(bool(image.unlike) for image in scored)
            counts["n_lungless"] += sum(bool(image.lungless) for image in scored)
            counts["n_refused"] += len(batch.paths) - len(scored) + sum(bool(image.refused) for image in scored)
    print(
        f"scored {counts['n_images']:,} images: {counts['n_pneumonia']:,} count as pneumonia at the threshold "
        f"{scorer.threshold:g}, {counts['n_refused']:,} were refused, {counts['n_unlike']:,} of them as unlike the "
        f"training images and {counts['n_lungless']:,} for their lungs; {found.n_left_out:,} other files left out"
    )
    return counts


def refuse_run_files(run: Path, out: str) -> None:
    """Refuses a missing run folder, and a table that would overwrite a file of the run.

    Raises:
        RunError: If there is no such folder.
        SettingsError: If ``out`` names a file of the run folder that is not a table of scores.
    """
    if not run.is_dir():
        raise RunError(f"run_dir: {run} does not exist; name the folder of a finished run")
    table = Path(out)
    if table.is_file() and table.resolve().is_relative_to(run.resolve()):
        with table.open("rb") as stream:
            if stream.read(len(HEADER)) != HEADER.encode():
                raise SettingsError(f"out: {out} is a file of the run; name another one")


def read_threshold(run: Path) -> float:
    """The probability from which an image counts as pneumonia, from the ``metrics.json`` of a run.

    Raises:
        RunError: If the network, its checksum or the metrics are missing or changed, or the metrics have no threshold
            or belong to an earlier network.
    """
    sha256, metrics = check_network(run), read_metrics(run)
    measured = read_parts(run, "evaluate")
    if measured.reads.get("model.keras", measured.given.get("model", sha256)) != sha256:
        problem = f"{run / 'metrics.json'} was measured on another network"
        raise RunError(f"{problem}: run the train flow on this run folder again")
    return metrics.threshold


def load_scorer(run: Path, settings: Settings) -> Scorer:
    """Loads all that scoring needs.

    Raises:
        RunError: If a file of the run, or the screener, is missing, changed or does not load.
    """
    from tasks.devices.screener import load_screener
    from tasks.networks.classifier import OUTPUTS

    threshold, familiarity, lungs = read_threshold(run), load_familiarity(run), load_bounds(run)
    screener = load_screener(find_screener(settings.screening.screener).folder)
    segmenter = open_segmenter(settings)
    network = load_network(run)
    outputs = set(network.output) if isinstance(network.output, dict) else set()
    if network.input_shape != (None, SIDE_PX, SIDE_PX, 1) or not outputs >= {*OUTPUTS, "members"}:
        raise RunError(f"{run / 'model.keras'} is not a network of a run: run the train flow on this run folder again")
    return Scorer(network, threshold, familiarity, lungs, screener, segmenter)


def as_packed(run: Path, settings: Settings) -> Settings:
    """The settings with the run's own way of packing: with padding, or stretched."""
    padding = read_parts(run, "pack").given.get("padding", settings.packing.padding)
    return settings.model_copy(update={"packing": settings.packing.model_copy(update={"padding": bool(padding)})})


def read_bits(run: Path) -> int:
    """The bits in use of the 16-bit files that a run was trained on; 0 where it had none, or nobody knows."""
    there = (run / STAGES_FOLDER / "ingest.json").is_file()
    facts = read_stage(run, "ingest").facts if there else {}
    return int(facts["bits"]) if facts.get("n_deep") else 0


def read_parts(run: Path, stage: str) -> StageParts:
    """The parts of the key of a run's stage; empty if the run folder has no record of it.

    Raises:
        RunError: If placing the stage's files was cut off.
    """
    there = (run / STAGES_FOLDER / f"{stage}.json").is_file()
    return read_stage(run, stage).parts if there else StageParts()


def score_batch(scorer: Scorer, pixels: NDArray[np.uint8]) -> list[ScoredImage]:
    """Scores at most a batch of packed images, uint8 ``(n, 224, 224)``; numbers are rounded as in the table.

    An image's scores do not depend on the size of its batch.

    Raises:
        RunError: If a network returns no number for an image.
    """
    from tasks.networks.classifier import predict

    if not len(pixels):
        return []
    probabilities = predict(scorer.network, fill_batch(pixels))[: len(pixels)]
    device_scores = screen_batch(scorer.screener, pixels)[0]
    if not np.isfinite(probabilities).all():
        raise RunError("run_dir: the network returns no number for an image; train again")
    unlike = [describe_distance(each, scorer.familiarity.bound) for each in scorer.familiarity.distances(pixels)]
    measured = measure_fields(segment_batch(scorer.segmenter, pixels))
    lungless = [describe_lungs(each, scorer.lungs) for each in measured]
    numbers = ([round(float(probability), 6) for probability in probabilities], device_scores)
    return [ScoredImage(*image) for image in zip(*numbers, unlike, lungless, strict=True)]


def describe_distance(distance: float, bound: float) -> str:
    """Why an image beyond the bound is refused, in one short sentence; ``""`` within the bound."""
    if distance <= bound:
        return ""
    return (
        "does not look like a chest X-ray of the kind this network was trained on "
        f"(distance {math.ceil(distance * 100) / 100:.2f}, bound {math.floor(bound * 100) / 100:.2f})"
    )


def decide_image(image: ScoredImage, threshold: float) -> str:
    """``1`` from the threshold, ``0`` below it, ``""`` for a refused image."""
    return "" if image.refused else str(int(image.probability >= threshold))


def table_rows(batch: LooseBatch, scored: Sequence[ScoredImage], threshold: float) -> list[str]:
    """Lines of the table for a batch; ``scored`` has one for each image that could be read."""
    numbers = (f"{image.probability:.6f},{decide_image(image, threshold)},{image.device_score:.6f}" for image in scored)
    cells = (f"{part},{write_cell(image.refused)}" for part, image in zip(numbers, scored, strict=True))
    return list(format_rows(HEADER, batch, cells))
