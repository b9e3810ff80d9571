"""Files that appear whole or not at all, run folders, and the manifest."""

import errno
import hashlib
import json
import os
import resource
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

from filelock import FileLock, Timeout

from tasks.errors import DiskError, PipelineError, RunError, SourceError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where no more can be written: the disk, a quota, or the largest file that is allowed."""

NOTHING_LEFT = 1 << 16
"""Bytes. NumPy and HDF5 tell of a full disk in words of their own: below this, they mean it."""

WAY_OUT = (
    "make room there, or name another disk with storage.cache, storage.raw or --run-dir, and give the same command "
    "again; what is finished is kept"
)

REPOSITORY = Path(__file__).resolve().parents[1]
BROKEN = (
    *(OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What NumPy and zipfile raise when a file is broken or another one: bytes anywhere in it may be wrong."""


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


@contextmanager
def room_in(folder: Path, needed: int | None = None) -> Iterator[None]:
    """Around what writes below a folder: a disk that is full, or becomes so, ends in one sentence.

    Args:
        folder: Need not be there yet.
        needed: Bytes, where they are known before; if they are not free, the block does not begin.

    Raises:
        DiskError: Names the folder, what was needed and what is free.
    """
    free = free_bytes(folder)
    if needed is not None and needed > free:
        raise DiskError(say_full(folder, say_bytes(needed), free))
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        if not (is_full(error) or (isinstance(error, OSError | ValueError) and free_bytes(folder) < NOTHING_LEFT)):
            raise
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            largest = say_bytes(resource.getrlimit(resource.RLIMIT_FSIZE)[0])
            said = f"more than {largest}" if needed is None else say_bytes(needed)
            raise DiskError(
                f"{folder}: {said} are needed there, and a file may have {largest} at most, though "
                f"{say_bytes(free_bytes(folder))} are free; raise that limit (ulimit -f) and give the same command "
                "again; what is finished is kept"
            ) from None
        said = f"more than {say_bytes(free)}" if needed is None else say_bytes(needed)
        raise DiskError(say_full(folder, said, free_bytes(folder))) from None


def is_full(error: BaseException) -> bool:
    """Whether the system says that no more can be written."""
    return isinstance(error, OSError) and error.errno in FULL


def say_full(folder: Path, needed: str, free: int) -> str:
    """The sentence for a disk that is full."""
    return f"{folder}: the disk is full: {needed} are needed there and {say_bytes(free)} are free; {WAY_OUT}"


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written to the disk that a folder lies on, or will lie on."""
    there = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
    return shutil.disk_usage(there).free


def say_bytes(n: int) -> str:
    """``1.3 MB``; small counts as they are."""
    return f"{n / 1e6:,.1f} MB" if n >= 100_000 else f"{n:,} bytes"
