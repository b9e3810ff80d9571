"""S3: a folder of a bucket, or one archive in it, mirrored on this machine; only new objects are fetched.

Gather, decide, apply: the listing names every object with its ETag and size, the index beside the mirror records the
last fetch, and boto3 fetches the difference. Then all is listed once more, and what changed meanwhile is fetched again,
so that no file mixes two versions of its object.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from boto3.exceptions import RetriesExceededError
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as boto
from s3transfer.exceptions import S3DownloadFailedError  # type: ignore[import-untyped]

from tasks.addresses import is_archive
from tasks.errors import SourceError
from tasks.files import locked, room_in, write_whole
from tasks.runs.s3_client import code_of, make_client, s3_explained
from tasks.settings import IngestionSettings

LOOKS = 5  # most listings while objects change
WHOLE = 64 << 20  # bytes; smaller objects come in one request: only then does boto3 check the checksum
LONGEST_NAME = 240  # bytes; boto3 appends nine while it writes

Index = dict[str, list[Any]]
"""Name to ``[etag, size]``."""


@dataclass(frozen=True)
class BucketCopy:
    """A mirror: the folder with the selected files; names of all objects, of those fetched now and those removed."""

    folder: Path
    names: tuple[str, ...]
    fetched: frozenset[str]
    vanished: tuple[str, ...]


def fetch_bucket(
    address: str,
    folder: Path,
    settings: IngestionSettings,
    select: Callable[[list[str]], Iterable[str]],
    progress: Callable[[int, int], None],
) -> BucketCopy:
    """Mirrors selected objects of ``s3://bucket/prefix`` in ``folder/files``; fetches only new and changed ones.

    Args:
        address: The bucket and the folder in it, ``data`` does not stand for ``data2/…``; or one archive, ``….zip``.
        folder: Holds mirror and index; one run at a time writes it, and a killed fetch is resumed here.
        settings: Connections, timeouts, tries, limits and credentials.
        select: Given all names below the prefix, returns those to keep; may raise ``SourceError``.
        progress: Called with the bytes fetched so far and the bytes to be fetched.

    Raises:
        SourceError: If the bucket or the credentials cannot be used, there are no objects, a name leads out of the
            folder, a limit is exceeded, or objects keep changing.
        OutsideError: If the network or the server keeps failing.
    """
    files, index_path, fetched, vanished = folder / "files", folder / "index.jsonl", set[str](), set[str]()
    with locked(folder.with_name(f".{folder.name}.lock")), s3_explained(f"source: {address}", SourceError):
        bucket, prefix, archive = split_address(address)
        client = make_client(settings, "source")
        for _ in range(LOOKS):
            listing = _list(client, bucket, prefix, archive, settings)
            wanted = {name: listing[name] for name in sorted(set(select(list(listing))))}
            _refuse(wanted, address, settings)
            index, sizes = _read_index(index_path), _sizes_below(files)
            waiting, gone = plan_fetch(wanted, index, sizes)
            vanished |= gone
            # A kill from here on may leave files that the index does not name, never an outdated one that it does.
            _write_index(index_path, {name: wanted[name] for name in wanted.keys() - waiting})
            _remove(files, sizes.keys() - (wanted.keys() - waiting))
            if not waiting:
                break
            with room_in(folder, sum(wanted[name][1] for name in waiting)), index_path.open("a") as log:
                objects = {name: wanted[name] for name in sorted(waiting)}
                for name in _fetch(client, f"s3://{bucket}/{prefix}", objects, files, settings, progress):
                    log.write(json.dumps([name, *wanted[name]]) + "\n")
                    log.flush()
                    fetched.add(name)
        else:
            raise SourceError(
                f"source: {address} keeps changing while it is fetched; run again when it no longer changes"
            )
    if vanished:  # only the record of the ingestion names them: names may be those of patients
        print(f"{address}: {len(vanished):,} files of the last fetch are gone and removed here")
    n_held = len(wanted.keys() - fetched)
    print(f"{address}: {len(fetched):,} fetched, {n_held:,} unchanged" if fetched else f"{address}: nothing new")
    return BucketCopy(files, tuple(listing), frozenset(fetched & wanted.keys()), tuple(sorted(vanished)))


def plan_fetch(wanted: Index, index: Index, sizes: dict[str, int]) -> tuple[set[str], set[str]]:
    """The names to fetch, and the names of fetched files that are no longer wanted.

    Args:
        wanted: The listing.
        index: The index of the last fetch.
        sizes: Sizes of the files on this machine, in bytes.
    """
    waiting = {
        name for name, version in wanted.items() if not index.get(name) == version == [version[0], sizes.get(name)]
    }
    return waiting, index.keys() - wanted.keys()


def split_address(address: str) -> tuple[str, str, str]:
    """Bucket, folder (``""`` or ending in ``/``) and, where the address names one, the archive in it."""
    found = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/(.*))?", address, re.DOTALL)
    if found is None:  # not quoted: the part before an @ may be a secret
        raise SourceError("source: an S3 address is s3://bucket/prefix, the bucket in letters, digits, dots and dashes")
    bucket, key = found[1], found[2] or ""
    if is_archive(key):
        folder, slash, name = key.rpartition("/")
        return bucket, folder + slash, name
    return bucket, f"{key.rstrip('/')}/" if key.strip("/") else "", ""


def _list(client: Any, bucket: str, prefix: str, archive: str, settings: IngestionSettings) -> Index:
    """All objects below a prefix, or the one archive."""
    address, listing, limit = f"s3://{bucket}/{prefix}{archive}", Index(), settings.max_members
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + archive):
        for entry in page.get("Contents", ()):
            name = entry["Key"].removeprefix(prefix)
            is_marker = entry["Key"].endswith("/") and not entry["Size"]  # of a folder
            if name == archive if archive else not is_marker:
                listing[name] = [entry["ETag"], entry["Size"]]
        if len(listing) > limit:
            raise SourceError(
                f"source: {address} holds more objects than ingestion.max_members = {limit:,}; raise it if that is "
                "right"
            )
    if not listing:
        reason = f"{address} is not there" if archive else f"there is nothing below {address}"
        raise SourceError(f"source: {reason}; correct the address")
    for name in listing:
        parts = name.split("/")
        if "\\" in name or "\0" in name or any(p in ("", ".", "..") or len(p.encode()) > LONGEST_NAME for p in parts):
            raise SourceError(
                f"source: {address} holds the name {name[:80]!r}, which is not a safe file name here; rename the object"
            )
    return dict(sorted(listing.items()))


def _refuse(wanted: Index, address: str, settings: IngestionSettings) -> None:
    folders = {parent.as_posix() for name in wanted for parent in PurePosixPath(name).parents}
    if both := sorted(folders & wanted.keys()):
        raise SourceError(f"source: {address} holds {both[0][:80]!r} both as a file and as a folder; rename one")
    if sum(size for _, size in wanted.values()) > settings.max_unpacked_gb * 1e9:
        raise SourceError(
            f"source: {address} is larger than ingestion.max_unpacked_gb = {settings.max_unpacked_gb:g} GB; raise it "
            "if that is right"
        )


def _fetch(
    client: Any,
    address: str,
    waiting: Index,
    files: Path,
    settings: IngestionSettings,
    progress: Callable[[int, int], None],
) -> Iterable[str]:
    """Fetches objects, some at a time, and yields the name of each; one that is gone meanwhile is skipped."""
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    done, total = 0, sum(size for _, size in waiting.values())
    # Of many objects each has one connection; a single object has them all.
    config = TransferConfig(
        multipart_threshold=WHOLE,
        max_concurrency=settings.n_connections,
        num_download_attempts=settings.tries,
        use_threads=len(waiting) == 1,
    )

    def get(name: str) -> str | None:
        path = files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            client.download_file(bucket, prefix + name, str(path), Config=config)
        except (boto.ClientError, S3DownloadFailedError) as error:
            if isinstance(error, boto.ClientError) and code_of(error) not in ("404", "NoSuchKey", "412"):
                raise
            return None  # it changed or vanished meanwhile: the next listing shows which
        except RetriesExceededError as error:
            raise boto.HTTPClientError(error=error) from None
        return name if path.stat().st_size == waiting[name][1] else None

    with ThreadPoolExecutor(settings.n_connections) as pool:
        running = [pool.submit(get, name) for name in waiting]
        try:
            for future in as_completed(running):
                if name := future.result():
                    done += waiting[name][1]
                    progress(done, total)
                    yield name
        finally:
            pool.shutdown(cancel_futures=True)


def _sizes_below(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.lstat().st_size for p in folder.rglob("*") if not p.is_dir()}


def _read_index(path: Path) -> Index:
    """Reads the index, to which lines are appended: the last line of a name counts, a line cut by a kill does not."""
    index = Index()
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError):
            name, *version = json.loads(line)
            index[name] = version
    return index


def _write_index(path: Path, index: Index) -> None:
    write_whole(path, "".join(json.dumps([name, *version]) + "\n" for name, version in index.items()))


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Removes files, such as boto3's unfinished ones, and empty folders: a new file may have a folder's old name."""
    for name in names:
        (folder / name).unlink()
    for parent, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # not empty
            Path(parent).rmdir()
