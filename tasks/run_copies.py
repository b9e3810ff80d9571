"""Runs in a bucket: each has a working copy on this machine, and finished work a cache that machines share.

Machines that work on a run at ``s3://bucket/prefix/run`` share nothing but that address. A flow brings the working copy
up to date when it starts (``fetch_run``); what a stage places in it goes to the bucket at once (``send``). Beside the
runs, ``s3://bucket/prefix/cache/`` holds what the cache of a machine holds: shards of packed pixels and masks under the
same names, and entries of stages by content, each sent and fetched once. For a run on this machine all of it does
nothing.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tasks.bucket_folder import BucketFolder, Stored
from tasks.records import Facts, RunError
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
TRIES = 100
"""A change of a shared file is tried again while others change it; each time one of them gets on."""

INDICES = ("arrays/index.json", "masks/index.json")

WHOLE = "whole.json"
"""In a folder of the shared cache: the files that belong to it, ``{"files": {name: sha256}}``."""

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
        changed = {
            name for name, stored in there.items() if _etag(known, name) != stored.etag or not (run / name).exists()
        }
        placed = _placed_by(run, changed)  # maybe by a try that was cut off here before it sent them
        changed |= {name for name in (placed & set(there)) - changed if known[name][1] != sha256_of_file(run / name)}
        for name, stored in _each(lambda name: bucket.get(name, run / name), changed, settings):
            if stored is not None:  # else it was removed since it was listed
                known[name] = [stored.etag, stored.sha256]
        for name in {*known, *placed} - set(there):
            inside(run, name).unlink(missing_ok=True)
            known.pop(name, None)
        write_json(run / KNOWN, known)
    if changed:
        print(f"fetched {len(changed):,} files of the run from {bucket.address}")
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


def share_beside(settings: Settings, name: str, join: Callable[[Path], None]) -> None:
    """Brings what a file that all runs share has in the bucket into the one here, and sends what it has beyond that.

    Of several who do so at once none loses another's step.

    Args:
        settings: Name the run.
        name: Of the file.
        join: Takes over into the file here what a copy of the one in the bucket, at a path, has beyond it.

    Raises:
        RunError: If the bucket cannot be used, or others never stop changing the file.
    """
    if not is_in_bucket(settings):
        return
    bucket, here = _open_beside(settings), run_folder(settings).parent / name
    with TemporaryDirectory() as place:
        for _ in range(TRIES):
            stored = bucket.get(name, Path(place, name))
            if stored is not None:
                join(Path(place, name))
            if not here.exists() or (stored is not None and stored.sha256 == sha256_of_file(here)):
                return
            if bucket.put_instead(here, name, None if stored is None else stored.etag):
                return
    raise RunError(f"run_dir: {bucket.address}/{name} is changed by others all the time; run again later")


# -- the cache that machines share -------------------------------------------------------------------------------------


def fetch_entry(settings: Settings, below: str, last: str) -> bool:
    """Brings a folder of finished work from the shared cache to this machine's, as one machine made it.

    Args:
        settings: Name run and cache.
        below: Name of the folder in the cache, with a slash at its end.
        last: Name of the file that is brought last; without it the folder does not count as there.

    Returns:
        Whether it is there, whole.

    Raises:
        RunError: If the bucket cannot be used, or a name in it leads out of the folder.
    """
    if not is_in_bucket(settings):
        return False
    bucket, folder = _open_cache(settings), cache_folder(settings) / below
    files = _read_whole(bucket, below)
    if files is None or last not in files:
        return False

    def bring(name: str) -> Stored | None:
        return bucket.get(f"{below}{files[name]}/{name}", inside(folder, name))

    for names in ([name for name in files if name != last], [last]):
        wrong = [name for name, stored in _each(bring, names, settings) if not stored or stored.sha256 != files[name]]
        if wrong:
            print(
                f"{bucket.address}/{below} lacks {wrong[0]} as it was written; it is made again here; remove it there"
            )
            return False
    return True


def keep_entry(settings: Settings, below: str) -> None:
    """Sends a folder of finished work in this machine's cache to the shared one, unless that has one of its name.

    Files lie there by their content, and ``whole.json``, written last and never in place of another, says which of
    them the folder is: one that several machines make, also where one of them dies over it, is of one of them alone.
    """
    if not is_in_bucket(settings) or _open_cache(settings).entries(below + WHOLE):
        return
    bucket, folder = _open_cache(settings), cache_folder(settings) / below
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files = {name: sha256_of_file(path) for name, path in paths.items()}
    there = bucket.entries(below)
    new = [name for name, sha256 in files.items() if f"{below}{sha256}/{name}" not in there]
    _each(lambda name: bucket.put(paths[name], f"{below}{files[name]}/{name}"), new, settings)
    with TemporaryDirectory() as place:
        write_json(Path(place, WHOLE), {"files": files})
        bucket.put_instead(Path(place, WHOLE), below + WHOLE, None)
    kept = _read_whole(bucket, below)
    if kept is not None:
        named = {below + WHOLE, *(f"{below}{sha256}/{name}" for name, sha256 in kept.items())}
        bucket.remove(set(bucket.entries(below)) - named)  # begun by others, or by us where another was faster


def _read_whole(bucket: BucketFolder, below: str) -> dict[str, str] | None:
    with TemporaryDirectory() as place:
        path = Path(place, WHOLE)
        return None if bucket.get(below + WHOLE, path) is None else dict(read_record(path, files=dict)["files"])


def fetch_lists(settings: Settings, below: str) -> None:
    """Brings the JSON files that lie directly below a name in the shared cache, and not in this machine's."""
    if is_in_bucket(settings):
        fetch_files(settings, [name for name in _open_cache(settings).entries(below) if name.endswith(".json")])


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


def _placed_by(run: Path, names: Iterable[str]) -> set[str]:
    """Files that the records of stages among these names, as they are here, say may lie in the working copy."""
    records = [run / name for name in names if name.startswith("stages/") and (run / name).exists()]
    return {str(name) for record in records for name in read_record(record, files=list)["files"]}


def _etag(known: dict[str, list[str]], name: str) -> str:
    return known[name][0] if name in known else ""


def _open_run(settings: Settings) -> BucketFolder:
    if str(settings.run_dir).endswith("/"):
        raise RunError(f"run_dir: {settings.run_dir} names the folder of runs; name one of the runs in it")
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
