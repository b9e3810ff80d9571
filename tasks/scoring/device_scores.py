"""Screen loose images: a table of device scores, and masks of devices and of lungs on request.

Reads a folder or zip of X-rays; writes a CSV ``path,device_score,has_device,refused`` and, into other folders, masks
``<image_id>.png``. No run folder, no cache: the table is the result.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from prefect import task

from tasks.devices.files import find_screener
from tasks.files import write_whole
from tasks.networks.shipped import find_network
from tasks.records import Facts
from tasks.runs.manifest import image_id
from tasks.scoring.batches import (
    format_rows,
    list_loose_images,
    open_segmenter,
    open_table,
    screen_batch,
    segment_batch,
    watch_batches,
)
from tasks.scoring.loose_images import LooseBatch, open_loose_images
from tasks.settings import Settings

HEADER = "path,device_score,has_device,refused\n"


@task(name="find images")
def find_images(images: str, out: str, folders: Mapping[str, str], settings: Settings) -> Facts:
    """Lists the images; refuses unusable places before anything is written."""
    find_screener(settings.screening.screener)
    if "lungs" in folders:
        find_network("segmenter", settings.screening.segmenter)
    return list_loose_images(images, out, folders, settings)


@task(name="screen images")
def screen_images(images: str, out: str, folders: Mapping[str, str], settings: Settings) -> Facts:
    """Scores the images batch by batch, then writes the table; returns counts for log and exit code.

    Args:
        images: Folder or archive.
        out: The table.
        folders: Where to write masks of devices (``masks``) and of ``lungs``, each if it is there.
        settings: Which networks, and the threshold.
    """
    from tasks.devices.screener import load_screener

    model = load_screener(find_screener(settings.screening.screener).folder)
    segmenter = open_segmenter(settings) if "lungs" in folders else None
    counts = {"n_images": 0, "n_devices": 0, "n_refused": 0}
    with open_loose_images(images, settings) as found, open_table(out, folders, HEADER) as table:
        for batch in watch_batches(found, "screen-images", f"Screening {len(found.paths):,} images for devices"):
            scores, drawn = screen_batch(model, batch.pixels)
            has_device = [score >= settings.screening.threshold for score in scores]
            cells = (f"{score:.6f},{str(has).lower()}," for score, has in zip(scores, has_device, strict=True))
            table.write("".join(format_rows(HEADER, batch, cells)).encode())
            if "masks" in folders:
                write_masks(Path(folders["masks"]), batch, drawn)
            if segmenter is not None:
                write_masks(Path(folders["lungs"]), batch, segment_batch(segmenter, batch.pixels))
            counts["n_images"] += len(batch.paths)
            counts["n_devices"] += sum(has_device)
            counts["n_refused"] += len(batch.paths) - len(scores)
    print(
        f"screened {counts['n_images']:,} images: {counts['n_devices']:,} show a device, "
        f"{counts['n_refused']:,} were refused, {found.n_left_out:,} other files left out"
    )
    return counts


def write_masks(folder: Path, batch: LooseBatch, drawn: NDArray[np.uint8]) -> None:
    """Writes ``<image_id>.png``, 224 x 224 uint8, for each image that was not refused; brightness is probability."""
    for path, mask in zip(batch.read_paths, drawn, strict=True):
        content = io.BytesIO()
        Image.fromarray(mask).save(content, "PNG", compress_level=1)  # five times as fast, a fifth larger
        write_whole(folder / f"{image_id(path)}.png", content.getvalue())
