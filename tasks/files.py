"""Files that appear whole or not at all; folders made once, resumed where they can be; locks; and room on a disk."""

import errno
import hashlib
import json
import os
import resource
import shutil
import stat
import threading
import tokenize
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
"""Error codes where no more can be written: the disk, a quota, or the size limit of a file is reached."""

NOTHING_LEFT = 1 << 16
"""Bytes. NumPy and HDF5 report a full disk as errors of their own; with less than this free, that is the cause."""

WAY_OUT = (
    "make room there, or name another disk with storage.cache, storage.raw or --run-dir, and give the same command "
    "again; what is finished is kept"
)

REPOSITORY = Path(__file__).resolve().parents[1]
BROKEN = (
    *(OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
"""What NumPy and zipfile raise for a damaged or foreign file."""


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file's content, 64 hex digits, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def open_source(path: Path) -> Iterator[BufferedReader]:
    """Opens a file of the source; refuses a pipe or device, which might never end.

    Raises:
        SourceError: If it cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is a pipe or device, not a file")
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        reason = error.strerror or error
        raise SourceError(f"source: {path} cannot be read ({reason}); fix or remove it, and run again") from None


def digest(value: object) -> str:
    """The sha256 of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def open_whole(path: Path, n_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Opens a temporary file and renames it after the block, so that the file is complete whenever it exists.

    Args:
        path: The file.
        n_bytes: Its size, where that is known.

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
    """Writes a temporary file and renames it, so that the file is complete whenever it exists."""
    data = content.encode() if isinstance(content, str) else content
    with open_whole(path, len(data)) as stream:
        stream.write(data)


def write_json(path: Path, value: object) -> None:
    """Writes JSON by ``write_whole``; refuses a value that is not finite, because JSON has no NaN."""
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
    """Reads a JSON object of a run and checks that it has entries of these names and types.

    Raises:
        RunError: If the file is missing, not JSON, or lacks an entry.
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
    """Makes a folder unless it exists; complete or not at all, and by one process at a time.

    Args:
        target: The folder.
        make: Fills the folder it is given, which is renamed to ``target`` when it returns.
        is_valid: Whether an existing folder is still valid; an invalid one is made again.
        resumable: Keep what an interrupted attempt left, so that ``make`` can resume it.

    Returns:
        Whether the folder existed.
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
    """Holds a lock file; waits, and logs that, while another process holds it. A process that dies frees its lock."""
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
        path.unlink(missing_ok=True)  # while held: a waiting process checks that its file still exists
        lock.release()


def is_held(path: Path) -> bool:
    """Whether a process holds a lock file."""
    if not path.exists():
        return False
    try:
        with FileLock(path, blocking=False):
            return False
    except Timeout:
        return True


@contextmanager
def room_in(folder: Path, needed: int | None = None) -> Iterator[None]:
    """Wraps code that writes below a folder: a disk that is or becomes full is reported in one sentence.

    Args:
        folder: Need not exist yet.
        needed: Bytes, where known before; if they are not free, the block is not run.

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
            amount = f"more than {largest}" if needed is None else say_bytes(needed)
            raise DiskError(
                f"{folder}: {amount} are needed there, and a file may have {largest} at most, though "
                f"{say_bytes(free_bytes(folder))} are free; raise that limit (ulimit -f) and give the same command "
                "again; what is finished is kept"
            ) from None
        amount = f"more than {say_bytes(free)}" if needed is None else say_bytes(needed)
        raise DiskError(say_full(folder, amount, free_bytes(folder))) from None


def is_full(error: BaseException) -> bool:
    """Whether an error means that no more can be written."""
    return isinstance(error, OSError) and error.errno in FULL


def say_full(folder: Path, needed: str, free: int) -> str:
    """The sentence for a disk that is full."""
    return f"{folder}: the disk is full: {needed} are needed there and {say_bytes(free)} are free; {WAY_OUT}"


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    there = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
    return shutil.disk_usage(there).free


def say_bytes(n: int) -> str:
    """``1.3 MB``; below 0.1 MB in bytes."""
    return f"{n / 1e6:,.1f} MB" if n >= 100_000 else f"{n:,} bytes"
