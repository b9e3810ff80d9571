"""Shared parts of tables about loose images: flags, checks of places, cells, and batches that are always full.

``flows.screen`` and ``flows.score`` use them, so that both refuse the same places and give an image the same score.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from tasks.addresses import Place, is_archive
from tasks.errors import RunError, SettingsError, SourceError
from tasks.files import open_whole
from tasks.networks.shipped import find_network
from tasks.pixels.content import promises_picture
from tasks.pixels.greys import SIDE_PX
from tasks.pixels.looks import LOOKS, judge_looks
from tasks.records import Facts
from tasks.runs.artifacts import Progress
from tasks.runs.manifest import image_id
from tasks.scoring.loose_images import BATCH_IMAGES, LooseBatch, LooseImages, open_loose_images
from tasks.settings import Settings

SECONDS_BETWEEN_SHOWS = 2.0


class TableFlags(BaseModel):
    """Flags of each flow about loose images."""

    images: Place = Field(
        min_length=1,
        description="Folder, .zip or .tar.gz file of X-rays (JPEG, PNG, TIFF, BMP, WebP, DICOM), in any structure.",
    )
    strict: bool = Field(
        False, description="End with exit code 2 when an image was refused; the CSV is written anyway."
    )


def demand_all(counts: Facts, out: str) -> None:
    """For ``strict``: raises SourceError if an image was refused, by the counts of the table ``out``."""
    if counts["n_refused"]:
        raise SourceError(
            f"strict: {counts['n_refused']:,} of {counts['n_images']:,} images were refused; {out} names them and why: "
            "fix or remove them, or leave --strict out"
        )


def refuse_places(images: str, out: str, folders: Mapping[str, str]) -> None:
    """Refuses places where the table or the masks cannot or should not be written; touches nothing.

    Args:
        images: Of the input.
        out: Of the table.
        folders: Of masks, by the flag that names each.

    Raises:
        SettingsError: If one is an address, of the wrong kind, below a file, or would overwrite or mix with the input.
    """
    table, source = Path(out), Path(images)
    for name, value in (("out", out), *folders.items()):
        if "://" in value or "\x00" in value or not value:
            raise SettingsError(f"{name}: {value!r} is not a path on this machine; give one")
    try:
        if table.is_dir():
            raise SettingsError(f"out: {out} is a folder; name a .csv file in it")
        if promises_picture(out) or is_archive(out) or (table.exists() and source.exists() and table.samefile(source)):
            raise SettingsError(f"out: {out} is named like an image or archive; name a .csv file")
        for name, folder in (("out", table.parent), *((name, Path(at)) for name, at in folders.items())):
            for part in (folder, *folder.parents):
                if part.exists() and not part.is_dir():
                    raise SettingsError(f"{name}: {part} is a file; name a folder, or one that does not exist yet")
        places = {name: Path(folder).resolve() for name, folder in folders.items()}
        for name, folder in places.items():
            if source.is_dir() and folder.is_relative_to(source.resolve()):
                raise SettingsError(
                    f"{name}: {folders[name]} lies in the folder of the images, where the next run would screen the "
                    "masks; name another folder"
                )
        if len(set(places.values())) < len(places):
            raise SettingsError(f"{' and '.join(places)}: both are {folder}; name a folder for each")
    except OSError as error:
        names = " or ".join(("out", *folders))
        raise SettingsError(f"{names}: {error.filename} cannot be used ({error.strerror}); name another") from None


@contextmanager
def open_table(out: str, folders: Mapping[str, str], header: str) -> Iterator[BinaryIO]:
    """Opens the table, with its header, once files can be written there and into the folders of masks.

    Raises:
        SettingsError: If they cannot.
    """
    table = Path(out)
    tries = [("out", table.parent, table.name), *((name, Path(at), image_id("")) for name, at in folders.items())]
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
    with open_whole(table) as stream:
        stream.write(header.encode())
        yield stream


def list_loose_images(images: str, out: str, folders: Mapping[str, str], settings: Settings) -> Facts:
    """Counts the images of a folder or zip; `refuse_places` and `open_loose_images` list what is refused."""
    refuse_places(images, out, folders)
    with open_loose_images(images, settings) as found:
        facts = {"n_images": len(found.paths), "n_left_out": found.n_left_out}
    print(f"{facts['n_images']:,} images in {images}; left out {facts['n_left_out']:,} other files")
    return facts


def watch_batches(found: LooseImages, key: str, description: str) -> Iterator[LooseBatch]:
    """All batches in order; progress is shown every few seconds, and with the pace when the last one is done.

    At the end, images whose pixels look wrong (``judge_looks``) are named in a warning; their rows stay as they are.
    """
    progress, odd = Progress(key, description), dict[str, list[str]]()
    n_done, start = 0, time.monotonic()
    shown = start
    for batch in found.read_batches():
        yield batch
        for path, look in zip(batch.read_paths, judge_looks(batch.pixels), strict=True):
            odd.setdefault(look, []).append(path)
        n_done += len(batch.paths)
        if time.monotonic() - shown > SECONDS_BETWEEN_SHOWS or n_done == len(found.paths):
            shown = time.monotonic()
            progress.show(n_done, len(found.paths))
    print(f"{n_done / max(time.monotonic() - start, 1e-9):,.1f} images/s")
    for look, says in LOOKS.items():
        if paths := odd.get(look):
            print(f"warning: {len(paths):,} images look {says}, such as {', '.join(paths[:3])}")


def screen_batch(model: Any, pixels: NDArray[np.uint8]) -> tuple[list[float], NDArray[np.uint8]]:
    """Scores, rounded as in the table, and masks uint8 ``(n, 224, 224)`` of at most a batch of packed images.

    An image's score does not depend on the size of its batch.

    Raises:
        RunError: If the network returns no number for an image.
    """
    from tasks.devices.screener import screen_pixels

    if not len(pixels):
        return [], pixels
    screened = next(screen_pixels(model, fill_batch(pixels), BATCH_IMAGES))
    scores, masks = screened.scores[: len(pixels)], screened.masks[: len(pixels)]
    if not np.isfinite(scores).all():
        raise RunError("screening.screener: the network returns no number for an image; use another one")
    return [round(float(score), 6) for score in scores], masks


def open_segmenter(settings: Settings) -> Any:
    """The segmenter of lungs that ``screening.segmenter`` names, or the shipped one; RunError if it does not load."""
    from tasks.networks.segmenter import load_segmenter

    return load_segmenter(find_network("segmenter", settings.screening.segmenter).folder)


def segment_batch(model: Any, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Masks of lungs, uint8 ``(n, 224, 224)``, of at most a batch of packed images; none depends on the others."""
    from tasks.networks.segmenter import segment_pixels

    return next(segment_pixels(model, fill_batch(pixels), BATCH_IMAGES))[: len(pixels)] if len(pixels) else pixels


def fill_batch(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Fills up a batch of packed images, uint8 ``(n, 224, 224)``, with black ones: ``(BATCH_IMAGES, 224, 224)``.

    A network always gets a full batch: another shape may be computed in another way and round differently.
    """
    full = np.zeros((BATCH_IMAGES, SIDE_PX, SIDE_PX), np.uint8)
    full[: len(pixels)] = pixels
    return full


def format_rows(header: str, batch: LooseBatch, cells: Iterable[str]) -> Iterator[str]:
    """Lines of a table whose first column is ``path`` and whose last one ``refused``.

    Args:
        header: The line with the names of the columns.
        batch: Images; those without pixels get their reason and else empty cells.
        cells: For each image with pixels what stands behind its path.
    """
    remaining, empty = iter(cells), "," * (header.count(",") - 1)
    for path, reason in zip(batch.paths, batch.refused, strict=True):
        yield f"{write_cell(path)},{empty + write_cell(reason) if reason else next(remaining)}\n"


def write_cell(text: str) -> str:
    """A cell of a CSV, its text unchanged; unlike with ``csv.writer``, one with a carriage return is quoted too."""
    return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in ',"\r\n') else text
