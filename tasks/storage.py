"""Files that appear whole or not at all, run folders, and the manifest."""

import hashlib
import json
import os
import re
import shutil
import stat
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
from filelock import FileLock, Timeout

from tasks.records import MANIFEST_DTYPES, RunError, SourceError
from tasks.room import room_in
from tasks.settings import Settings

REPOSITORY = Path(__file__).resolve().parent.parent
SHIPPED_REVIEW = REPOSITORY / "data" / "device_review.csv"
SEAL = "run.json"
SHARD_NAME = re.compile(r"(\w[\w.-]{0,200}/){0,4}\w[\w.-]{0,200}")
BROKEN = (
    *(OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What NumPy and zipfile raise when a file is broken or another one: bytes anywhere in it may be wrong."""


def cache_folder(settings: Settings) -> Path:
    """Where this machine keeps finished work."""
    return Path(settings.storage.cache)


def is_in_bucket(settings: Settings) -> bool:
    """Whether the run is kept in a bucket, with a working copy on this machine."""
    return str(settings.run_dir).startswith("s3://")


def runs_address(settings: Settings) -> str:
    """Where the runs lie that this one belongs to, in a bucket."""
    address = str(settings.run_dir)
    return address.rstrip("/") if address.endswith("/") else address.rpartition("/")[0]


def run_folder(settings: Settings) -> Path:
    """The run folder that the settings name, or for one in a bucket its working copy, in the cache.

    Raises:
        RunError: If no run folder is named, a file is in its place, or no folder can have that name.
    """
    if settings.run_dir is None:
        raise RunError("run_dir: no run folder is named; give --run-dir DIR")
    folder = Path(settings.run_dir)
    if is_in_bucket(settings):
        folder = cache_folder(settings) / "runs" / digest(runs_address(settings))[:16] / folder.name
    try:
        in_place = next((part for part in (folder, *folder.parents) if part.exists() and not part.is_dir()), None)
    except OSError as error:
        raise RunError(f"run_dir: {folder} cannot be used ({error.strerror}); name another folder") from None
    if in_place is not None:
        raise RunError(f"run_dir: {in_place} is a file; name a folder, or one that does not exist yet")
    return folder


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file's content, 64 hex digits, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def open_source(path: Path) -> Iterator[BufferedReader]:
    """Opens a file of the source; a pipe or device, which might never end, is not opened.

    Raises:
        SourceError: If it cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is no file but a pipe or device")
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        reason = error.strerror or error
        raise SourceError(
            f"source: {path} cannot be read ({reason}); put it right or remove it, and run again"
        ) from None


def digest(value: object) -> str:
    """The sha256 of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def open_whole(path: Path, n_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Opens a file beside its place and renames it after the block, so that it is whole whenever it is there.

    Args:
        path: The file.
        n_bytes: How many it will have, where that is known.

    Raises:
        DiskError: If there is no room for it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with room_in(path.parent, n_bytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as stream:
                yield stream
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes a file beside its place and renames it, so that it is whole whenever it is there."""
    data = content.encode() if isinstance(content, str) else content
    with open_whole(path, len(data)) as stream:
        stream.write(data)


def write_json(path: Path, value: object) -> None:
    """Writes JSON whole; a value that is not finite is refused, because JSON has no NaN."""
    write_whole(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run.

    Raises:
        RunError: If the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{path} is missing: run the stage that writes it first") from None
    except (ValueError, RecursionError):
        raise RunError(f"{path} is not JSON: remove it and run again") from None


def read_record(path: Path, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """A JSON object of a run that has entries of these names and types.

    Raises:
        RunError: If the file is missing, not JSON, or something else.
    """
    found = read_json(path)
    if not isinstance(found, dict) or any(not isinstance(found.get(name), kind) for name, kind in kinds.items()):
        raise RunError(f"{path} is not what a run wrote there: remove it and run again")
    return found


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a record names below a folder.

    Raises:
        RunError: If the name leads out of it.
    """
    if name.startswith("/") or ".." in name.split("/") or "\x00" in name:
        raise RunError(
            f"{folder}: a record names {name!r}, which leads out of this folder; remove stages/ and run again"
        )
    return folder / name


def make_once(
    target: Path,
    make: Callable[[Path], None],
    *,
    is_valid: Callable[[Path], bool] = lambda target: True,
    resumable: bool = False,
) -> bool:
    """Makes a folder unless it is there already; whole or not at all, and by one process at a time.

    Args:
        target: The folder that shall exist afterwards.
        make: Fills the folder it is given, which is renamed to ``target`` when it returns.
        is_valid: Whether a folder that is there still holds; one that does not is made again.
        resumable: Keep what an interrupted attempt left, so that ``make`` can go on from it.

    Returns:
        Whether the folder was there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".partial")
    with locked(target.with_name(f".{target.name}.lock")):
        if target.exists() and is_valid(target):
            return True
        for stale in [target] if resumable else [target, beside]:
            shutil.rmtree(stale, ignore_errors=True)
        try:
            with room_in(target.parent):
                beside.mkdir(exist_ok=True)
                make(beside)
        except BaseException:
            if not resumable:
                shutil.rmtree(beside, ignore_errors=True)
            raise
        os.replace(beside, target)
    return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file; waits, and says so, while another process does. The system frees it when a process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        name = path.name.removeprefix(".").removesuffix(".lock")
        with suppress(FileNotFoundError):
            print(f"another run ({path.read_text() or 'just begun'}) is making {name}; waiting for it")
        lock.acquire()
    try:
        with suppress(OSError):  # on a full disk only this note is missing
            path.write_text(f"process {os.getpid()} on {os.uname().nodename}")
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits looks whether what it got still has a name
        lock.release()


def is_held(path: Path) -> bool:
    """Whether somebody holds a lock file just now."""
    if not path.exists():
        return False
    try:
        with FileLock(path, blocking=False):
            return False
    except Timeout:
        return True


def shards_exist(index: Path, cache: Path) -> bool:
    """Whether the cache holds all shards that an index (``{"shards": [{"name"}], …}``) names."""
    return all((cache / name).exists() for name in read_index(index)[0])


def read_index(path: Path) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """An index of shards: their names in the cache, and of each image id its shard and row.

    Raises:
        RunError: If it is missing or another file.
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


# -- the manifest ------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> pd.DataFrame:
    """Reads ``manifest.parquet``: a row per image, nullable dtypes, sorted by path.

    Raises:
        RunError: If the folder has none, or another file under its name.
    """
    path = folder / "manifest.parquet"
    if not path.exists():
        raise RunError(f"{path} is missing: run the prepare flow on this run folder first")
    try:
        manifest = pd.read_parquet(path, dtype_backend="numpy_nullable")
    except Exception:  # pyarrow raises many kinds for bytes that are wrong
        manifest = pd.DataFrame()
    if not set(MANIFEST_DTYPES) <= set(manifest.columns):
        raise RunError(f"{path} is not what the prepare flow wrote: remove it and run that flow on this run folder")
    return manifest


def write_manifest(folder: Path, manifest: pd.DataFrame) -> None:
    """Writes ``manifest.parquet`` with the fixed columns first, in their dtypes; columns not known yet are added."""
    columns = {
        name: manifest[name].astype(dtype) if name in manifest else pd.array([pd.NA] * len(manifest), dtype=dtype)
        for name, dtype in MANIFEST_DTYPES.items()
    }
    table = pd.DataFrame(columns).sort_values("path", ignore_index=True)
    path = folder / "manifest.parquet"
    beside = path.with_name(path.name + ".partial")
    table.to_parquet(beside, index=False)
    os.replace(beside, path)
