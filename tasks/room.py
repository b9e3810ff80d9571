"""Room on a disk: writing where there is none ends in one sentence that says what was needed and what is free."""

import errno
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.records import DiskError, PipelineError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where no more can be written: the disk, a quota, or the largest file that is allowed."""
NOTHING_LEFT = 1 << 16
"""Bytes. NumPy and HDF5 tell of a full disk in words of their own: below this, they mean it."""
WAY_OUT = (
    "make room there, or name another disk with storage.cache, storage.raw or --run-dir, and give the same command "
    "again; what is finished is kept"
)


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
