"""Masks of devices as the screener drew them: compressed shards in the cache, an index in the run folder."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.records import RunError
from tasks.storage import read_json, write_whole

MASK_SIDE_PX = 224


def write_shard(path: Path, scores: NDArray[np.float32], masks: NDArray[np.uint8]) -> None:
    """Writes what the screener said of a shard of images: scores ``(n,)``, masks uint8 ``(n, 224, 224)``, 255 sure."""
    content = io.BytesIO()
    np.savez_compressed(content, scores=scores, masks=masks)
    write_whole(path, content.getvalue())


def read_scores(path: Path) -> NDArray[np.float32]:
    """The scores of a shard, float32 ``(n,)``."""
    with np.load(path) as content:
        return np.asarray(content["scores"])


class DeviceMasks:
    """The masks of a run; ``masks/index.json`` holds the shards and, for each image id, its shard and row."""

    def __init__(self, run: Path, cache: Path) -> None:
        index = read_json(run / "masks" / "index.json")
        self._shards = [cache / shard["name"] for shard in index["shards"]]
        self._rows: dict[str, tuple[int, int]] = {
            image: (place[0], place[1]) for image, place in index["images"].items()
        }
        self._open: tuple[int, NDArray[np.uint8]] | None = None

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._rows

    def read(self, image_ids: Sequence[str]) -> NDArray[np.uint8]:
        """uint8 ``(len(image_ids), 224, 224)``: 255 surely a device, 0 surely none.

        Raises:
            KeyError: If an image was not screened.
            RunError: If a shard is gone.
        """
        places = [self._rows[image_id] for image_id in image_ids]
        masks = np.empty((len(places), MASK_SIDE_PX, MASK_SIDE_PX), np.uint8)
        for i in sorted(range(len(places)), key=lambda i: places[i]):  # each shard is unpacked once
            shard, row = places[i]
            masks[i] = self._unpack(shard)[row]
        return masks

    def _unpack(self, shard: int) -> NDArray[np.uint8]:
        if self._open is None or self._open[0] != shard:
            if not self._shards[shard].exists():
                raise RunError(f"{self._shards[shard]} is gone from the cache: run the prepare flow again")
            with np.load(self._shards[shard]) as content:
                self._open = (shard, content["masks"])
        return self._open[1]
