"""Segment: looks at the lungs of every image, and finds what two plausible lungs are on the training images.

Reads the masks of lungs and ``manifest.parquet``; writes ``lungs/index.json`` (where the masks are in the cache),
``lungs/bounds.json`` (what is usual of the training images, those with devices too) and ``lungs/implausible.json`` (the
images of all splits that lie outside, and why). No image leaves training for it: the data checks name them, and scoring
gives such an image no decision.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.files import write_json
from tasks.networks.lung_fields import MEASURES, describe_lungs, fit_bounds, measure_fields, save_bounds
from tasks.pixels.masks import IMPLAUSIBLE, Masks
from tasks.pixels.shards import shards_exist
from tasks.preparing.mask_shards import find_files, index_masks
from tasks.records import CLASS_NAMES, DEVICE_REASONS, SPLITS, Facts
from tasks.runs.run import Run
from tasks.runs.stages import stage_task


@stage_task("segment")
def segment(run: Run) -> Facts:
    """Measures the lungs of every image and names the images without two plausible ones."""
    index, network = index_masks(run, "lungs"), find_files(run, "lungs")

    def make(out: Path) -> Facts:
        write_json(out / "lungs" / "index.json", index)
        manifest = run.manifest()
        seen = manifest[manifest["image_id"].isin(list(index["images"]))]
        measured = measure_images(Masks(out, run.cache, "lungs"), list(seen["image_id"]))
        bounds = fit_bounds(measured[find_learnt(seen)], network.sha256)
        reasons = [describe_lungs(row, bounds) for row in measured]
        save_bounds(bounds, out)
        write_json(out / IMPLAUSIBLE, {i: why for i, why in zip(seen["image_id"], reasons, strict=True) if why})
        return {
            "segmenter": {"sha256": network.sha256, "name": network.name},
            "n_learnt": bounds.n,
            "n_images": len(seen),
            "n_implausible": sum(map(bool, reasons)),
            "counts": count_implausible(seen, [bool(why) for why in reasons]),
        }

    facts = run.stage(
        "segment",
        reads=["manifest.parquet"],
        given={"masks": index, "segmenter": (network.sha256, network.name)},
        make=make,
        is_valid=lambda entry: shards_exist(entry / "lungs" / "index.json", run.cache),
    )
    print(
        f"looked for lungs with {facts['segmenter']['name']}: {facts['n_implausible']:,} of {facts['n_images']:,} "
        f"images show no two plausible ones, by bounds from {facts['n_learnt']:,} training images"
    )
    return facts


def find_learnt(manifest: pd.DataFrame) -> NDArray[np.bool_]:
    """The rows that bounds are fitted on: training images without a reason to leave other than a device, bool ``(n,)``.

    Images with devices are often of the sickest, and validation and test keep such images.
    """
    reasons = manifest["excluded"].fillna("")
    return np.asarray((manifest["split"] == "train") & ((reasons == "") | reasons.isin(DEVICE_REASONS)), bool)


def measure_images(lungs: Masks, image_ids: list[str], at_once: int = 256) -> NDArray[np.float64]:
    """The measures of the lungs of images, float64 ``(n, 12)`` (``measure_fields``)."""
    parts = [image_ids[start : start + at_once] for start in range(0, len(image_ids), at_once)]
    return np.concatenate([np.empty((0, len(MEASURES))), *(measure_fields(lungs.read(part)) for part in parts)])


def count_implausible(manifest: pd.DataFrame, implausible: list[bool]) -> list[Facts]:
    """For each split and class the images with pixels, and those without two plausible lungs."""
    table = manifest.assign(implausible=implausible)
    return [
        {"split": split, "class": name, "images": len(rows), "without_lungs": int(rows["implausible"].sum())}
        for split in SPLITS
        for label, name in CLASS_NAMES.items()
        if len(rows := table[(table["split"] == split) & (table["label"] == label)])
    ]
