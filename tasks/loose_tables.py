"""Tables about loose images: where they may go, how a cell is written, and batches that are always full.

What ``flows.screen`` and ``flows.score`` share, so that both refuse the same places and give an image the same score.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.images import SIDE_PX, SUFFIXES
from tasks.layout import image_id
from tasks.loose_images import BATCH_IMAGES
from tasks.records import SettingsError


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

    An image's score does not depend on how many others came with it.
    """
    from tasks.screener import screen_pixels

    if not len(pixels):
        return [], pixels
    said = next(screen_pixels(model, fill_batch(pixels), BATCH_IMAGES))
    return [round(float(score), 6) for score in said.scores[: len(pixels)]], said.masks[: len(pixels)]


def fill_batch(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """At most a batch of packed images, uint8 ``(n, 224, 224)``, with black ones behind: ``(BATCH_IMAGES, 224, 224)``.

    A network always sees a full batch: another shape may take another path through its arithmetic.
    """
    full = np.zeros((BATCH_IMAGES, SIDE_PX, SIDE_PX), np.uint8)
    full[: len(pixels)] = pixels
    return full


def write_cell(text: str) -> str:
    """A cell of a CSV; unlike ``csv.writer``'s, one with a carriage return is quoted too. The text stays as it is."""
    return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in ',"\r\n') else text
