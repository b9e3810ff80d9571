"""Masks of devices as the screener drew them: compressed shards in the cache, an index in the run folder."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.records import RunError
from tasks.storage import BROKEN, read_index, write_whole

MASK_SIDE_PX = 224


def write_shard(path: Path, scores: NDArray[np.float32], masks: NDArray[np.uint8]) -> None:
    """Writes the screener's results of a shard of images: scores ``(n,)``, masks uint8 ``(n, 224, 224)``, 255 sure."""
    content = io.BytesIO()
    np.savez_compressed(content, scores=scores, masks=masks)
    write_whole(path, content.getvalue())


def read_scores(path: Path) -> NDArray[np.float32]:
    """The scores of a shard, float32 ``(n,)``."""
    return _read_shard(path)[0]


def _read_shard(path: Path) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scores and masks of a shard; a zip checks its contents by CRC-32.

    Raises:
        RunError: If it is gone or damaged.
    """
    if not path.exists():
        raise RunError(f"{path} is gone from the cache: run the prepare flow again")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            scores, masks = np.asarray(content["scores"]), np.asarray(content["masks"])
        whole = scores.dtype == np.float32 and masks.dtype == np.uint8
        whole &= masks.shape == (*scores.shape, MASK_SIDE_PX, MASK_SIDE_PX)
    except BROKEN:
        whole = False
    if not whole:
        raise RunError(f"{path} is damaged: remove it and run the prepare flow again")
    return scores, masks


class DeviceMasks:
    """The masks of a run; ``masks/index.json`` holds the shards and, for each image id, its shard and row."""

    def __init__(self, run: Path, cache: Path) -> None:
        self._index = run / "masks" / "index.json"
        names, self._rows = read_index(self._index)
        self._shards = [cache / name for name in names]
        self._open: tuple[int, NDArray[np.uint8]] | None = None

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._rows

    def read(self, image_ids: Sequence[str]) -> NDArray[np.uint8]:
        """uint8 ``(len(image_ids), 224, 224)``: 255 surely a device, 0 surely none.

        Raises:
            RunError: If an image was not screened, or a shard is gone or damaged.
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
            self._open = (shard, _read_shard(self._shards[shard])[1])
        return self._open[1]
