"""Runs in a bucket: each has a working copy on this machine; finished work lies in a cache that machines share.

Machines that work on a run at ``s3://bucket/prefix/run`` share nothing but that address. When a flow starts, it syncs
the working copy with the bucket (``fetch_run``); the files of each stage are sent to the bucket at once (``send``).
Beside the runs, ``s3://bucket/prefix/cache/`` is the shared cache: shards of packed pixels and masks under the same
names as on a machine, and each finished stage as one archive. For a run on this machine these functions do nothing.
"""

import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar
from uuid import uuid4

from tasks.errors import OutsideError, RunError
from tasks.files import inside, is_held, locked, make_once, read_json, read_record, sha256_of_file, write_json
from tasks.pixels.shards import read_index
from tasks.records import Facts
from tasks.runs.places import SEAL, Place
from tasks.runs.s3_client import BucketFolder, open_bucket
from tasks.settings import IngestionSettings

KNOWN = ".bucket.json"
"""In a working copy: name -> ``[etag, sha256]`` of each file that is the same here and in the bucket."""
OWNER = ".owner.json"
"""In the bucket, among the files of a run: the process that began to work on it last."""
INDICES = ("arrays/index.json", "masks/index.json", "lungs/index.json")
TRIES = 100
"""Retries of a change to a shared file that other processes change too; each time one of them succeeds."""

owned: dict[str, str] = {}
"""Runs that this process works on: address -> ETag of its ``OWNER`` object; another ETag means another owner."""

Result = TypeVar("Result")


# -- the working copy --------------------------------------------------------------------------------------------------


def fetch_run(run: Place) -> None:
    """Syncs the working copy of a run with the bucket, and fetches the shards that it names.

    Raises:
        RunError: If the bucket cannot be used.
        OutsideError: If the server fails or cannot be reached.
    """
    if not run.in_bucket:
        return
    folder, bucket = run.folder, _open_run(run)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f".{folder.name}.copy.lock"):
        there = {name: etag for name, etag in bucket.entries().items() if name != OWNER}
        known = {name: pair for name, pair in _read_known(folder).items() if name in there}
        changed = [name for name, etag in there.items() if not _is_same(inside(folder, name), known.get(name), etag)]
        for name, found in _each(lambda name: bucket.get(name, folder / name), changed, run):
            if found:  # else it was removed since it was listed
                known[name] = [there[name], sha256_of_file(folder / name)]
        others = str(run.settings.run_dir) not in owned and is_held(folder / f".{folder.name}.lock")
        for path in () if others else folder.rglob("*"):  # gone from the bucket, or placed here and never sent
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name not in known and not path.name.startswith("."):
                path.unlink()
        write_json(folder / KNOWN, known)
    if changed:
        print(f"fetched {len(changed):,} files of the run from {bucket.address}")
    fetch_shards(run, folder)


def send(run: Place, names: Iterable[str], gone: Iterable[str] = ()) -> None:
    """Sends new and changed files of the working copy to the bucket, and removes those that are gone.

    Args:
        run: The run.
        names: Of files in the run folder; shards that an index among them names go first.
        gone: Names that left the run folder.

    Raises:
        RunError: If the bucket cannot be used, or another process has begun to work on the run.
        OutsideError: If the server fails or cannot be reached.
    """
    if not run.in_bucket:
        return
    folder, bucket = run.folder, _open_run(run)
    _require_owned(run, bucket)
    names = sorted(names)
    for index in set(INDICES) & set(names):
        keep_files(run, _shards(folder / index))
    with locked(folder.parent / f".{folder.name}.copy.lock"):
        known = _read_known(folder)
        left = [name for name in sorted(gone) if known.pop(name, None)]
        bucket.remove(left)
        new = [name for name in names if name not in known or known[name][1] != sha256_of_file(folder / name)]
        for name, etag in _each(lambda name: bucket.put(folder / name, name), [n for n in new if n != SEAL], run):
            known[name] = [etag, sha256_of_file(folder / name)]
        if SEAL in new:
            sealed = bucket.put_instead(folder / SEAL, SEAL, known.get(SEAL, [""])[0])
            if sealed is None:
                raise _taken_over(run)
            known[SEAL] = [sealed, sha256_of_file(folder / SEAL)]
        write_json(folder / KNOWN, known)


@contextmanager
def claim_run(run: Place, is_part: bool) -> Iterator[None]:
    """Claims a run in a bucket for this process; the process that owned it before can send nothing any more.

    Args:
        run: The run.
        is_part: Whether this process works for another one, which keeps its claim.
    """
    address, bucket = str(run.settings.run_dir), _open_run(run)
    with TemporaryDirectory() as folder:
        write_json(Path(folder, OWNER), {"machine": os.uname().nodename, "process": os.getpid(), "key": uuid4().hex})
        owned[address] = bucket.etag(OWNER) if is_part else bucket.put(Path(folder, OWNER), OWNER)
    try:
        yield
    finally:
        del owned[address]


def read_seal(run: Place) -> Facts | None:
    """``run.json`` of a run, read where the run is kept; ``None`` while it is not finished."""
    if run.in_bucket:
        _open_run(run)  # refuses the folder of runs
    with files_of(run.address(), [SEAL], run.settings.ingestion) as folder:
        return read_record(folder / SEAL) if (folder / SEAL).exists() else None


# -- the cache that machines share -------------------------------------------------------------------------------------


def fetch_entry(run: Place, name: str, is_whole: Callable[[Path], bool]) -> None:
    """Fetches a folder of finished work from the shared cache, unless this machine's cache has it.

    One that cannot be unpacked is logged and skipped: it is made again.
    """
    target = run.cache / name
    if not run.in_bucket or (target.exists() and is_whole(target)):
        return
    bucket = _open_cache(run)
    with TemporaryDirectory() as folder:
        archive = Path(folder, "entry.tar")
        if not bucket.get(f"{name}.tar", archive):
            return
        try:
            make_once(target, lambda out: shutil.unpack_archive(archive, out, "tar", filter="data"), is_valid=is_whole)
        except (shutil.ReadError, tarfile.TarError):
            print(f"{bucket.address}/{name}.tar is damaged; it is made again here; remove it there")


def keep_entry(run: Place, name: str) -> None:
    """Sends a folder of finished work, as one archive, to the shared cache, unless that has it."""
    if not run.in_bucket or (bucket := _open_cache(run)).etag(f"{name}.tar"):
        return
    with TemporaryDirectory() as folder:
        archive = shutil.make_archive(f"{folder}/entry", "tar", run.cache / name)
        bucket.put_instead(Path(archive), f"{name}.tar", "")  # of two at once the first one is kept


def fetch_files(run: Place, names: Iterable[str], *, anew: bool = False) -> None:
    """Fetches files from the shared cache that this machine's lacks; with ``anew`` also those that it has."""
    here = run.cache
    missing = [name for name in names if anew or not (here / name).exists()]
    if missing and run.in_bucket:
        bucket = _open_cache(run)
        _each(lambda name: bucket.get(name, here / name), missing, run)


def keep_files(run: Place, names: Iterable[str], *, anew: bool = False) -> None:
    """Sends files to the shared cache that it lacks; with ``anew`` also those that it has."""
    names = list(names)
    if not names or not run.in_bucket:
        return
    bucket, here = _open_cache(run), run.cache
    there = {} if anew else _names_beside(bucket, names)
    _each(lambda name: bucket.put(here / name, name), [name for name in names if name not in there], run)


def fetch_lists(run: Place, below: str) -> None:
    """Fetches the JSON files directly below a name in the shared cache that this machine's lacks."""
    if run.in_bucket:
        fetch_files(run, [name for name in _open_cache(run).entries(below) if name.endswith(".json")])


def fetch_shards(run: Place, folder: Path) -> None:
    """Fetches the shards that the indices in a folder name and this machine's cache lacks."""
    if run.in_bucket:
        fetch_files(run, [name for index in INDICES for name in _shards(folder / index)])


# -- beside the runs ---------------------------------------------------------------------------------------------------


@contextmanager
def files_of(address: str, names: Iterable[str], ingestion: IngestionSettings) -> Iterator[Path]:
    """A folder on this machine with those of the named files that exist: the folder itself, or copies from a bucket.

    Args:
        address: A folder here, or ``s3://bucket/prefix``.
        names: Relative to it.
        ingestion: How to reach the bucket.
    """
    if not address.startswith("s3://"):
        yield Path(address)
        return
    with TemporaryDirectory() as folder:
        for name in names:
            open_bucket(address, ingestion).get(name, Path(folder, name))
        yield Path(folder)


def checksum_at(address: str, name: str, ingestion: IngestionSettings) -> str | None:
    """The sha256 of a file, read where it is kept; ``None`` if it does not exist."""
    with files_of(address, [name], ingestion) as folder:
        return sha256_of_file(folder / name) if (folder / name).is_file() else None


def read_shared(address: str, name: str, ingestion: IngestionSettings) -> Facts | None:
    """Reads a JSON file beside the runs; ``None`` if it does not exist.

    Raises:
        RunError: If it is not a JSON object.
    """
    with files_of(address, [name], ingestion) as folder:
        return _read_object(folder / name, f"{address}/{name}") if (folder / name).exists() else None


def change_shared(
    address: str, name: str, ingestion: IngestionSettings, change: Callable[[Facts | None], Facts | None]
) -> None:
    """Changes a JSON file beside the runs; of two concurrent changes neither is lost.

    Args:
        address: The folder of runs.
        name: Of the file.
        ingestion: How to reach the bucket.
        change: From the old content, ``None`` if there is none, to the new content, ``None`` to leave it. Called
            again if another process was faster.

    Raises:
        RunError: If the file is not a JSON object.
        OutsideError: If other processes keep changing it.
    """
    if not address.startswith("s3://"):
        path = Path(address, name)
        with locked(path.with_name(f".{name}.lock")):
            wanted = change(_read_object(path, str(path)) if path.exists() else None)
            if wanted is not None:
                write_json(path, wanted)
        return
    bucket = open_bucket(address, ingestion)
    with TemporaryDirectory() as folder:
        for _ in range(TRIES):
            etag = bucket.etag(name)
            wanted = change(read_shared(address, name, ingestion))
            if wanted is None:
                return
            write_json(Path(folder, name), wanted)
            if bucket.put_instead(Path(folder, name), name, etag) is not None:
                return
    raise OutsideError(f"run_dir: {address}/{name} keeps being changed by others; run again later")


# -- small parts -------------------------------------------------------------------------------------------------------


def _require_owned(run: Place, bucket: BucketFolder) -> None:
    etag = owned.get(str(run.settings.run_dir))
    if etag is not None and bucket.etag(OWNER) != etag:
        raise _taken_over(run)


def _taken_over(run: Place) -> RunError:
    return RunError(
        f"run_dir: {run.settings.run_dir} was taken over by another process, which began to work on it meanwhile; let "
        "that one end, or give another folder"
    )


def _shards(index: Path) -> list[str]:
    """The shards that an index names, each before its list of files, if it has one; none without an index."""
    shards = read_index(index)[0] if index.exists() else []
    lists = {name: [str(Path(name).with_suffix(".json"))] if name.endswith(".npy") else [] for name in shards}
    return [part for name in shards for part in (name, *lists[name])]


def _each(do: Callable[[str], Result], names: Iterable[str], run: Place) -> list[tuple[str, Result]]:
    names = list(names)
    with ThreadPoolExecutor(run.settings.ingestion.n_connections) as pool:
        return list(zip(names, pool.map(do, names), strict=True))


def _read_known(run: Path) -> dict[str, list[str]]:
    return read_record(run / KNOWN) if (run / KNOWN).exists() else {}


def _is_same(path: Path, known: list[str] | None, etag: str) -> bool:
    return known is not None and known[0] == etag and path.exists() and known[1] == sha256_of_file(path)


def _names_beside(bucket: BucketFolder, names: Iterable[str]) -> set[str]:
    folders = sorted({name.rpartition("/")[0] + "/" for name in names})
    return {name for folder in folders for name in bucket.entries(folder)}


def _read_object(path: Path, place: str) -> Facts:
    try:
        found = read_json(path)
    except RunError:
        found = None
    if not isinstance(found, dict):
        raise RunError(f"{place} is not a JSON object; restore a whole copy, or remove it to start again")
    return found


def _open_run(run: Place) -> BucketFolder:
    if str(run.settings.run_dir).endswith("/"):
        raise RunError(f"run_dir: {run.settings.run_dir} names the folder of runs; name one of the runs in it")
    return open_bucket(str(run.settings.run_dir), run.settings.ingestion)


def _open_cache(run: Place) -> BucketFolder:
    return open_bucket(f"{run.runs}/cache", run.settings.ingestion)
