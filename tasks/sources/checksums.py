"""Checksums of a source's files: a file is read again only when its size or times change.

A file that was written just before it was read is read again the next time, because it may change once more within the
same tick of its file system's clock.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tasks.errors import RunError
from tasks.files import open_source, read_json, write_whole

READERS = 4
FRESH_NS = 2 * 10**9

Sum = list[Any]
"""``[sha256, size, mtime_ns, ctime_ns, inode]``, or ``[sha256]`` of a file written just before."""


def sum_stream(stream: IO[bytes], known: Sum | None = None) -> Sum:
    """The checksum of an open file: the known one if the file is unchanged, else from reading it to its end."""
    found = os.fstat(stream.fileno())
    stamp = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    if known is not None and known[1:] == stamp:
        return known
    settled = max(found.st_mtime_ns, found.st_ctime_ns) < time.time_ns() - FRESH_NS
    stream.seek(0)
    return [hashlib.file_digest(stream, "sha256").hexdigest(), *(stamp if settled else [])]  # type: ignore[arg-type]


def sum_file(path: Path, known: Sum | None = None) -> Sum:
    """The checksum of a file of the source.

    Raises:
        SourceError: If it cannot be read.
    """
    with open_source(path) as stream:
        return sum_stream(stream, known)


def sum_files(folder: Path, names: Sequence[str], record: Path) -> dict[str, Sum]:
    """Name -> checksum of files below a folder; kept in a record for the next time."""
    known = read_sums(record)
    with ThreadPoolExecutor(READERS) as pool:
        sums = dict(zip(names, pool.map(lambda name: sum_file(folder / name, known.get(name)), names), strict=True))
    keep_sums(record, sums, known)
    return sums


def read_sums(record: Path) -> dict[str, Sum]:
    """Reads a record; empty if there is none."""
    try:
        return dict(read_json(record))
    except (RunError, TypeError, ValueError):
        return {}


def keep_sums(record: Path, sums: dict[str, Sum], known: dict[str, Sum]) -> None:
    """Writes a record if it changed; if it cannot be written, the files are read again the next time."""
    lasting = {name: found for name, found in sums.items() if found[1:]}
    if lasting != known:
        with suppress(OSError):
            write_whole(record, json.dumps(lasting))
