"""The packed pixels of a run, in shards on disk that are read row by row."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.errors import RunError
from tasks.files import BROKEN, read_record, sha256_of_file
from tasks.pixels.greys import SIDE_PX
from tasks.pixels.shards import read_index


class PackedImages:
    """The packed pixels of a run, in shards on disk that are read row by row.

    ``arrays/index.json`` holds the names of the shards in the cache and, for each image id, its shard and row.
    """

    def __init__(self, run: Path, cache: Path) -> None:
        self._index = run / "arrays" / "index.json"
        if not self._index.exists():
            raise RunError(f"{self._index} is missing: run the prepare flow on this run folder first")
        names, self._rows = read_index(self._index)
        self._paths = [cache / name for name in names]
        for path in self._paths:
            if not path.exists():
                raise RunError(f"{path} is gone from the cache: run the prepare flow again")

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._rows

    def read(self, image_ids: Sequence[str]) -> NDArray[np.uint8]:
        """uint8 ``(len(image_ids), 224, 224)``, in the order of ``image_ids``.

        Raises:
            RunError: If an image was not packed, or its shard is damaged.
        """
        if missing := [image_id for image_id in image_ids if image_id not in self._rows]:
            raise RunError(f"{self._index} lacks the image {missing[0]}: run the prepare flow on this run folder again")
        pixels = np.empty((len(image_ids), SIDE_PX, SIDE_PX), np.uint8)
        shards: dict[int, NDArray[np.uint8]] = {}  # not kept: pages of a mapped file count as memory of the process
        for i, image_id in enumerate(image_ids):
            number, row = self._rows[image_id]
            if number not in shards:
                shards[number] = open_shard(self._paths[number])
            shard = shards[number]
            if row >= len(shard):
                raise RunError(f"{self._paths[number]} is damaged: remove it and run the prepare flow again")
            pixels[i] = shard[row]
        return pixels


def open_shard(path: Path) -> NDArray[np.uint8]:
    """The packed pixels of a shard, uint8 ``(n, 224, 224)``, memory-mapped.

    Raises:
        RunError: If it is not a shard, or its content changed since packing (the list beside it has the sha256).
    """
    try:
        state = path.stat()
        whole = _is_as_packed(path, state.st_size, state.st_mtime_ns)
        shard = np.lib.format.open_memmap(path, mode="r")  # unlike numpy.load, opens no other kind of file
        whole &= shard.dtype == np.uint8 and shard.ndim == 3 and shard.shape[1:] == (SIDE_PX, SIDE_PX)
    except BROKEN:
        whole = False
    if not whole:
        raise RunError(f"{path} is damaged: remove it and run the prepare flow again")
    return shard


@lru_cache(maxsize=4096)
def _is_as_packed(path: Path, n_bytes: int, mtime_ns: int) -> bool:
    listing = path.with_suffix(".json")
    expected = read_record(listing).get("sha256") if listing.exists() else None
    return expected is None or expected == sha256_of_file(path)
