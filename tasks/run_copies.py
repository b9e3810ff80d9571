"""Runs in a bucket: each has a working copy on this machine, and finished work a cache that machines share.

Machines that work on a run at ``s3://bucket/prefix/run`` share nothing but that address. A flow brings the working copy
up to date when it starts (``fetch_run``); what a stage places in it goes to the bucket at once (``send``). Beside the
runs, ``s3://bucket/prefix/cache/`` holds what the cache of a machine holds, under the same names: entries of stages,
and shards of packed pixels and masks, each sent and fetched once. For a run on this machine all of it does nothing.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from tasks.bucket_folder import BucketFolder, Stored
from tasks.records import Facts
from tasks.settings import IngestionSettings, Settings
from tasks.storage import (
    SEAL,
    cache_folder,
    inside,
    is_in_bucket,
    locked,
    read_index,
    read_record,
    run_folder,
    runs_address,
    sha256_of_file,
    write_json,
)

KNOWN = ".bucket.json"
"""In a working copy: name -> ``[etag, sha256]`` of what is the same here and in the bucket."""
LOST_SHARDS = (
    "all workers need the same code and packages as this machine, and its folders (storage.cache) or a run in a bucket "
    "(run_dir s3://…)"
)
"""The way out where what a worker made is nowhere to be found."""
INDICES = ("arrays/index.json", "masks/index.json")

guards: dict[str, Callable[[], None]] = {}
"""By the address of a run that this process works on: raises once another process does (see ``tasks.run_locks``)."""


def fetch_run(settings: Settings) -> None:
    """Brings the working copy of a run, and the shards it names, up to date with the bucket.

    Raises:
        RunError: If the bucket cannot be used.
    """
    if not is_in_bucket(settings):
        return
    run, bucket = run_folder(settings), _open_run(settings)
    run.mkdir(parents=True, exist_ok=True)
    with locked(run.parent / f".{run.name}.lock"):
        known, there = _read_known(run), bucket.entries()
        changed = [
            name for name, stored in there.items() if _etag(known, name) != stored.etag or not (run / name).exists()
        ]
        for name, stored in _each(lambda name: bucket.get(name, run / name), changed, settings):
            if stored is not None:  # else it was removed since it was listed
                known[name] = [stored.etag, stored.sha256]
        for name in set(known) - set(there):
            inside(run, name).unlink(missing_ok=True)
            del known[name]
        write_json(run / KNOWN, known)
    if changed:
        print(f"fetched {len(changed):,} files of the run from {bucket.address}")
    fetch_beside(settings, "device_answers.csv")
    fetch_shards(settings, run)


def send(settings: Settings, names: Iterable[str], gone: Iterable[str] = ()) -> None:
    """Sends files of the working copy that the bucket does not hold as they are, and removes those that are gone.

    Args:
        settings: Name the run.
        names: Of files in the run folder, in any order; shards that an index among them names go first.
        gone: Names that left the run folder.

    Raises:
        RunError: If the bucket cannot be used, or another process has taken the run over.
    """
    if not is_in_bucket(settings):
        return
    if guard := guards.get(str(settings.run_dir)):
        guard()
    run, bucket = run_folder(settings), _open_run(settings)
    names, gone = sorted(names), sorted(gone)
    for index in set(INDICES) & set(names):
        keep_files(settings, [name for shard in _shards(run / index) for name in _with_listing(shard)])
    with locked(run.parent / f".{run.name}.lock"):
        known = _read_known(run)
        if gone := [name for name in gone if name in known]:
            bucket.remove(gone)
        for name in gone:
            del known[name]
        new = [name for name in names if name not in known or known[name][1] != sha256_of_file(run / name)]
        for name, stored in _each(lambda name: bucket.put(run / name, name), new, settings):
            assert stored is not None
            known[name] = [stored.etag, stored.sha256]
        write_json(run / KNOWN, known)


def address_of(settings: Settings, name: str = "") -> str:
    """Where people find a run, or a file of it: in the bucket, or the absolute path here."""
    if is_in_bucket(settings):
        return f"{settings.run_dir}/{name}".rstrip("/")
    return str((run_folder(settings) / name).resolve())


def read_seal(settings: Settings) -> Facts | None:
    """``run.json`` of a run as it is where the run is kept; ``None`` while it is not finished."""
    path = run_folder(settings) / SEAL
    if is_in_bucket(settings):
        path = path.with_name(".sealed.json")
        if _open_run(settings).get(SEAL, path) is None:
            return None
    return read_record(path) if path.exists() else None


def fetch_beside(settings: Settings, name: str) -> None:
    """Brings a file that all runs share, such as people's answers, beside the working copy."""
    if is_in_bucket(settings):
        _open_beside(settings).get(name, run_folder(settings).parent / name)


def send_beside(settings: Settings, name: str) -> None:
    """Sends a file that all runs share."""
    if is_in_bucket(settings):
        _open_beside(settings).put(run_folder(settings).parent / name, name)


# -- the cache that machines share -------------------------------------------------------------------------------------


def fetch_below(settings: Settings, below: str, last: str = "", ending: str = "") -> bool:
    """Brings what the shared cache holds below a name and this machine's cache does not.

    Args:
        settings: Name run and cache.
        below: Start of the names: ``arrays/…/`` or ``<stage>/<key>/``.
        last: Name of the file that is written last; without it nothing below counts as there.
        ending: Only names that end so.

    Returns:
        Whether anything, with its last file, is there.
    """
    if not is_in_bucket(settings):
        return False
    bucket, here = _open_cache(settings), cache_folder(settings)
    there = bucket.entries(below)
    if not there or (last and below + last not in there):
        return False
    wanted = [name for name in there if name.endswith(ending) and name != below + last]
    missing = [name for name in wanted if not (here / name).exists()]
    _each(lambda name: bucket.get(name, here / name), missing, settings)
    if last:
        bucket.get(below + last, here / (below + last))
    return True


def keep_below(settings: Settings, below: str, last: str = "") -> None:
    """Sends what this machine's cache holds below a folder's name to the shared cache.

    Args:
        settings: Name run and cache.
        below: Start of the names.
        last: Name of the file that goes last; where it is there, nothing is sent.
    """
    if not is_in_bucket(settings) or (last and _open_cache(settings).entries(below + last)):
        return
    here = cache_folder(settings)
    names = [path.relative_to(here).as_posix() for path in (here / below).rglob("*") if path.is_file()]
    keep_files(settings, [name for name in names if name != below + last])
    if last:
        keep_files(settings, [below + last])


def fetch_shards(settings: Settings, folder: Path) -> None:
    """Brings the shards that the indices in a folder name and this machine's cache does not hold."""
    if not is_in_bucket(settings):
        return
    here = cache_folder(settings)
    named = [shard for index in INDICES if (folder / index).exists() for shard in _shards(folder / index)]
    missing = [name for shard in named for name in _with_listing(shard) if not (here / name).exists()]
    bucket = _open_cache(settings)
    if missing:
        _each(lambda name: bucket.get(name, here / name), missing, settings)
        print(f"fetched {len(missing):,} shards and their lists from {bucket.address}")


def fetch_files(settings: Settings, names: Iterable[str]) -> None:
    """Brings files that the shared cache holds, and this machine's cache does not."""
    here = cache_folder(settings)
    missing = [name for name in names if not (here / name).exists()]
    if not missing or not is_in_bucket(settings):
        return
    bucket = _open_cache(settings)
    there = _names_beside(bucket, missing)
    _each(lambda name: bucket.get(name, here / name), [name for name in missing if name in there], settings)


def keep_files(settings: Settings, names: Sequence[str]) -> None:
    """Sends files of this machine's cache that the shared cache does not hold."""
    if not names or not is_in_bucket(settings):
        return
    bucket, here = _open_cache(settings), cache_folder(settings)
    there = _names_beside(bucket, names)
    _each(lambda name: bucket.put(here / name, name), [name for name in names if name not in there], settings)


def _names_beside(bucket: BucketFolder, names: Iterable[str]) -> set[str]:
    folders = sorted({name.rpartition("/")[0] + "/" for name in names})
    return {name for folder in folders for name in bucket.entries(folder)}


def fetch_note(settings: Settings, name: str) -> None:
    """Brings one file of the shared cache, as it is now."""
    if is_in_bucket(settings):
        _open_cache(settings).get(name, cache_folder(settings) / name)


def keep_note(settings: Settings, name: str) -> None:
    """Sends one file of this machine's cache, in place of one that is there."""
    if is_in_bucket(settings):
        _open_cache(settings).put(cache_folder(settings) / name, name)


def open_bucket(address: str, settings: Settings) -> BucketFolder:
    """A folder in a bucket, with one client for all that this process does there."""
    return _open(address.rstrip("/"), settings.ingestion, _surroundings())


# -- small parts -------------------------------------------------------------------------------------------------------


def _shards(index: Path) -> list[str]:
    return read_index(index)[0]


def _with_listing(shard: str) -> list[str]:
    # A shard of pixels has its list of files beside it, written last.
    return [shard, str(Path(shard).with_suffix(".json"))] if shard.endswith(".npy") else [shard]


def _each(
    do: Callable[[str], Stored | None], names: Iterable[str], settings: Settings
) -> list[tuple[str, Stored | None]]:
    names = list(names)
    with ThreadPoolExecutor(settings.ingestion.n_connections) as pool:
        return list(zip(names, pool.map(do, names), strict=True))


def _read_known(run: Path) -> dict[str, list[str]]:
    return read_record(run / KNOWN) if (run / KNOWN).exists() else {}


def _etag(known: dict[str, list[str]], name: str) -> str:
    return known[name][0] if name in known else ""


def _open_run(settings: Settings) -> BucketFolder:
    return open_bucket(str(settings.run_dir), settings)


def _open_beside(settings: Settings) -> BucketFolder:
    return open_bucket(runs_address(settings), settings)


def _open_cache(settings: Settings) -> BucketFolder:
    return open_bucket(f"{runs_address(settings)}/cache", settings)


@cache
def _open(address: str, settings: IngestionSettings, surroundings: tuple[tuple[str, str], ...]) -> BucketFolder:
    return BucketFolder(address, settings)


def _surroundings() -> tuple[tuple[str, str], ...]:
    # What boto3 reads when a client is made: another endpoint or key, another client.
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
