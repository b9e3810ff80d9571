"""Screen loose images: a table of device scores, and masks where they are asked for.

Reads a folder or zip of X-rays; writes a CSV ``path,device_score,has_device,refused`` and, into another folder, masks
``<image_id>.png``. No run folder, no cache: the table is the result.
"""

import io
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import Progress
from tasks.images import SIDE_PX, SUFFIXES
from tasks.layout import image_id
from tasks.loose_images import BATCH_IMAGES, LooseBatch, open_loose_images
from tasks.records import Facts, RunError, SettingsError
from tasks.screener_files import find_screener
from tasks.settings import Settings
from tasks.storage import open_whole, write_whole

HEADER = "path,device_score,has_device,refused\n"
SECONDS_BETWEEN_SHOWS = 2.0


@task(name="find images", cache_policy=NO_CACHE)
def find_images(images: str, out: str, masks: str | None, settings: Settings) -> Facts:
    """Lists the images; refuses, before anything is written, what cannot be read or written."""
    refuse_places(images, out, masks)
    find_screener(settings.screening.screener)
    with open_loose_images(images, settings) as found:
        facts = {"n_images": len(found.paths), "n_left_out": found.n_left_out}
    print(f"{facts['n_images']:,} images in {images}; left out {facts['n_left_out']:,} other files")
    return facts


@task(name="screen images", cache_policy=NO_CACHE)
def screen_images(images: str, out: str, masks: str | None, settings: Settings) -> Facts:
    """Scores the images, batch after batch, and writes the table when all are done; counts for log and exit code."""
    from tasks.screener import load_screener

    model = load_screener(find_screener(settings.screening.screener).folder)
    counts = {"n_images": 0, "n_devices": 0, "n_refused": 0}
    with open_loose_images(images, settings) as found:
        prepare_places(out, masks)
        progress = Progress("screen-images", f"Screening {len(found.paths):,} images for devices")
        start = shown = time.monotonic()
        with open_whole(Path(out)) as table:
            table.write(HEADER.encode())
            for batch in found.read_batches():
                scores, drawn = screen_batch(model, batch.pixels)
                if not np.isfinite(scores).all():
                    raise RunError("screening.screener: the network gives no number for an image; use another one")
                table.write("".join(table_rows(batch, scores, settings.screening.threshold)).encode())
                if masks is not None:
                    write_masks(Path(masks), batch, drawn)
                counts["n_images"] += len(batch.paths)
                counts["n_devices"] += sum(score >= settings.screening.threshold for score in scores)
                counts["n_refused"] += len(batch.paths) - len(scores)
                if time.monotonic() - shown > SECONDS_BETWEEN_SHOWS or counts["n_images"] == len(found.paths):
                    shown = time.monotonic()
                    progress.show(counts["n_images"], len(found.paths))
        per_second = counts["n_images"] / max(time.monotonic() - start, 1e-9)
        print(
            f"screened {counts['n_images']:,} images: {counts['n_devices']:,} show a device, "
            f"{counts['n_refused']:,} were refused, {found.n_left_out:,} other files left out; "
            f"{per_second:,.1f} images/s"
        )
    return counts


def refuse_places(images: str, out: str, masks: str | None) -> None:
    """Refuses places that the table or the masks cannot go to, or should not; touches nothing.

    Raises:
        SettingsError: If one is an address, of the wrong kind, below a file, or would overwrite or mix with the input.
    """
    table, source = Path(out), Path(images)
    for name, value in (("out", out), ("masks", masks)):
        if value is not None and ("://" in value or "\x00" in value or not value):
            raise SettingsError(f"{name}: {value!r} is no path on this machine; give one")
    try:
        if table.is_dir():
            raise SettingsError(f"out: {out} is a folder; name a .csv file in it")
        if table.suffix.lower() in (*SUFFIXES, ".zip") or (
            table.exists() and source.exists() and table.samefile(source)
        ):
            raise SettingsError(f"out: {out} is named like an image or archive; name a .csv file")
        folders = [("out", table.parent)] + ([("masks", Path(masks))] if masks is not None else [])
        for name, folder in folders:
            for part in (folder, *folder.parents):
                if part.exists() and not part.is_dir():
                    raise SettingsError(f"{name}: {part} is a file; name a folder, or one that does not exist yet")
        if masks is not None and source.is_dir() and Path(masks).resolve().is_relative_to(source.resolve()):
            raise SettingsError(
                f"masks: {masks} lies in the folder of the images, where the next run would screen the masks; "
                "name another folder"
            )
    except OSError as error:
        raise SettingsError(f"out or masks: {error.filename} cannot be used ({error.strerror}); name another") from None


def prepare_places(out: str, masks: str | None) -> None:
    """Makes the folders of the table and the masks, and tries whether files can be written there.

    Raises:
        SettingsError: If not.
    """
    table = Path(out)
    tries = [("out", table.parent, table.name)] + ([("masks", Path(masks), image_id(""))] if masks is not None else [])
    for name, folder, file in tries:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{file}.", suffix=".partial"):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise SettingsError(
                f"{name}: {folder / file if name == 'out' else folder} cannot be written ({reason}); name another place"
            ) from None


def screen_batch(model: Any, pixels: NDArray[np.uint8]) -> tuple[list[float], NDArray[np.uint8]]:
    """Scores, as the table shows them, and masks uint8 ``(n, 224, 224)`` of at most a batch of packed images.

    The network always sees a full batch: another shape may take another path through its arithmetic, and an image's
    score must not depend on how many others came with it.
    """
    from tasks.screener import screen_pixels

    if not len(pixels):
        return [], pixels
    full = np.zeros((BATCH_IMAGES, SIDE_PX, SIDE_PX), np.uint8)
    full[: len(pixels)] = pixels
    said = next(screen_pixels(model, full, BATCH_IMAGES))
    return [round(float(score), 6) for score in said.scores[: len(pixels)]], said.masks[: len(pixels)]


def table_rows(batch: LooseBatch, scores: list[float], threshold: float) -> list[str]:
    """Lines of the table for a batch; ``scores`` has one for each image that was not refused."""
    remaining = iter(scores)
    rows = []
    for path, reason in zip(batch.paths, batch.refused, strict=True):
        if reason:
            rows.append(f"{_cell(path)},,,{_cell(reason)}\n")
        else:
            score = next(remaining)
            rows.append(f"{_cell(path)},{score:.6f},{'true' if score >= threshold else 'false'},\n")
    return rows


def write_masks(folder: Path, batch: LooseBatch, drawn: NDArray[np.uint8]) -> None:
    """Writes ``<image_id>.png``, 224 x 224 uint8, for each image that was not refused; brightness is probability."""
    scored = [path for path, reason in zip(batch.paths, batch.refused, strict=True) if not reason]
    for path, mask in zip(scored, drawn, strict=True):
        content = io.BytesIO()
        Image.fromarray(mask).save(content, "PNG", compress_level=1)  # five times as fast, a fifth larger
        write_whole(folder / f"{image_id(path)}.png", content.getvalue())


def _cell(text: str) -> str:
    """A cell of a CSV; unlike ``csv.writer``'s, one with a carriage return is quoted too. The text stays as it is."""
    return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in ',"\r\n') else text
