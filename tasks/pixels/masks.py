"""Masks of devices or of lungs: compressed shards in the cache, an index in the run folder."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.errors import RunError
from tasks.files import BROKEN, write_whole
from tasks.pixels.shards import read_index

MaskKind = Literal["masks", "lungs"]
IMPLAUSIBLE = "lungs/implausible.json"
MASK_SIDE_PX = 224
SURE = 128
"""Brightness of a mask from which a pixel counts as device, or as lung: a probability of one half."""


def write_shard(path: Path, masks: NDArray[np.uint8], scores: NDArray[np.float32] | None = None) -> None:
    """Writes a shard: masks uint8 ``(n, 224, 224)``, 255 sure; the screener's ``scores`` too, float32 ``(n,)``."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, masks=masks, **({} if scores is None else {"scores": scores}))
    write_whole(path, content.getvalue())


def read_scores(path: Path) -> NDArray[np.float32]:
    """The scores of a shard, float32 ``(n,)``; its masks, most of the file, are not unpacked."""
    return _read_part(path, "scores", np.dtype(np.float32), ())


def _read_part(path: Path, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The scores or masks of a shard, a row of this shape per image; the zip's CRC-32 detects damage.

    Raises:
        RunError: If the shard is gone or damaged.
    """
    if not path.exists():
        raise RunError(f"{path} is gone from the cache: run the prepare flow again")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            found = np.asarray(content[name])
        whole = found.dtype == dtype and found.shape[1:] == shape and found.ndim == 1 + len(shape)
    except BROKEN:
        whole = False
    if not whole:
        raise RunError(f"{path} is damaged: remove it and run the prepare flow again")
    return found


class Masks:
    """The masks of a run, of devices (``masks``) or of ``lungs``.

    ``<kind>/index.json`` holds the shards and, for each image id, its shard and row.
    """

    def __init__(self, run: Path, cache: Path, kind: MaskKind = "masks") -> None:
        self._index = run / kind / "index.json"
        names, self._rows = read_index(self._index)
        self._shards = [cache / name for name in names]
        self._open: tuple[int, NDArray[np.uint8]] | None = None

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._rows

    def read(self, image_ids: Sequence[str]) -> NDArray[np.uint8]:
        """uint8 ``(len(image_ids), 224, 224)``: 255 surely a device or lung, 0 surely none.

        Raises:
            RunError: If an image has no mask, or a shard is gone or damaged.
        """
        if missing := [image_id for image_id in image_ids if image_id not in self._rows]:
            raise RunError(f"{self._index} lacks the image {missing[0]}: run the prepare flow on this run folder again")
        places = [self._rows[image_id] for image_id in image_ids]
        masks = np.empty((len(places), MASK_SIDE_PX, MASK_SIDE_PX), np.uint8)
        for i in sorted(range(len(places)), key=lambda i: places[i]):  # each shard is unpacked once
            shard, row = places[i]
            found = self._unpack(shard)
            if row >= len(found):
                raise RunError(f"{self._shards[shard]} is damaged: remove it and run the prepare flow again")
            masks[i] = found[row]
        return masks

    def _unpack(self, shard: int) -> NDArray[np.uint8]:
        if self._open is None or self._open[0] != shard:
            masks = _read_part(self._shards[shard], "masks", np.dtype(np.uint8), (MASK_SIDE_PX, MASK_SIDE_PX))
            self._open = (shard, masks)
        return self._open[1]
