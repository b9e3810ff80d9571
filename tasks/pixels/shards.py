"""Indices of packed shards: which image lies in which shard and row."""

import re
from pathlib import Path

from tasks.errors import RunError
from tasks.files import read_record

LOST_SHARDS = (
    "all workers need the same code and packages as this machine, and its folders (storage.cache) or a run in a bucket "
    "(run_dir s3://…)"
)
"""The way out if a worker's results cannot be found."""

SHARD_NAME = re.compile(r"(\w[\w.-]{0,200}/){0,4}\w[\w.-]{0,200}")


def shards_exist(index: Path, cache: Path) -> bool:
    """Whether the cache holds all shards that an index (``{"shards": [{"name"}], …}``) names."""
    return all((cache / name).exists() for name in read_index(index)[0])


def read_index(path: Path) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """Reads an index of shards: their names in the cache, and for each image id its shard and row.

    Raises:
        RunError: If it is missing or not an index.
    """
    found = read_record(path, shards=list, images=dict)
    try:
        shards = [shard["name"] for shard in found["shards"]]
        images = {str(image): (int(place[0]), int(place[1])) for image, place in found["images"].items()}
        whole = all(0 <= shard < len(shards) and row >= 0 for shard, row in images.values())
        whole &= all(SHARD_NAME.fullmatch(name) for name in shards)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError):
        whole = False
    if not whole:
        raise RunError(f"{path} is not what a run wrote there: run the prepare flow on this run folder again")
    return shards, images
