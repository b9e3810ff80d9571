"""S3: a bucket's folder, or one archive in it, mirrored on this machine; only what is new travels again.

Gather, decide, apply. The listing names every object with its ETag and size, the index beside the mirror knows what
came the last time, and boto3's own transfer fetches the difference. Every request names the ETag that it means, so two
versions of an object are never mixed. A file takes its name when it is whole, and enters the index after that.
"""

import json
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from boto3.s3.transfer import ProgressCallbackInvoker, TransferConfig, create_transfer_manager
from botocore import exceptions as boto
from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError, S3ValidationError  # type: ignore[import-untyped]
from s3transfer.subscribers import BaseSubscriber  # type: ignore[import-untyped]

from tasks.records import SourceError
from tasks.room import room_in
from tasks.s3_client import code_of, make_client, s3_explained
from tasks.settings import IngestionSettings
from tasks.storage import locked, write_whole

LOOKS = 4  # listings that are tried while objects change during the fetch
AHEAD = 100  # objects that are asked for before the first of them is there
WHOLE = 64 << 20  # bytes; below, an object comes in one request, the only kind whose checksum boto3 compares
LONGEST_NAME = 240  # bytes; boto3 adds nine while it writes

Index = dict[str, list[Any]]
"""Name to ``[etag, size]``; to ``[]`` what came once and is to be fetched again."""


@dataclass(frozen=True)
class BucketCopy:
    """A mirror: the folder with the selected files, the names of all objects, those fetched now, those here no more."""

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
    """Mirrors what is wanted of ``s3://bucket/prefix`` into ``folder/files``; fetches only what is new or changed.

    Args:
        address: The bucket and the folder in it, ``data`` does not stand for ``data2/…``; or one object, ``….zip``.
        folder: Holds mirror and index; one run at a time writes it, and one that was killed goes on here.
        settings: Connections, timeouts, tries, limits and credentials.
        select: Given all names below the prefix, returns those to keep; may raise ``SourceError``.
        progress: Called with the bytes fetched so far and the bytes to be fetched.

    Raises:
        SourceError: If the bucket or the credentials cannot be used, nothing is there, a name leads out of the folder,
            a limit is passed, or objects keep changing.
        OutsideError: If the network or the server keeps failing.
    """
    files, index_path, fetched = folder / "files", folder / "index.jsonl", set[str]()
    with s3_explained(f"source: {address}", SourceError):
        bucket, prefix, archive = split_address(address)
        client = make_client(settings, "source")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            for _ in range(LOOKS):
                listing = _look(client, bucket, prefix, archive) if archive else _list(client, bucket, prefix, settings)
                wanted = {name: listing[name] for name in sorted(set(select(list(listing))))}
                _refuse(wanted, address, settings)
                index, sizes = _read_index(index_path), _sizes_below(files)
                held, vanished = decide(wanted, index, sizes)
                _remove(files, sizes.keys() - held)
                # A kill from here on leaves files that the index does not name, never one that it takes for another.
                _write_index(index_path, {name: version if name in held else [] for name, version in index.items()})
                waiting = {name: version for name, version in wanted.items() if name not in held}
                with room_in(folder, sum(size for _, size in waiting.values())):
                    came = _Transfer(client, bucket, prefix, folder, settings).fetch(waiting, progress)
                fetched |= came
                if len(came) == len(waiting):
                    break
                print(f"{address}: {len(waiting) - len(came):,} files changed during the fetch; looking again")
            else:
                raise SourceError(f"source: {address} keeps changing while it is fetched; run again when it is at rest")
            _write_index(index_path, wanted)
    if vanished:  # the record of the ingestion has their names, which may be those of patients
        print(f"{address}: {len(vanished):,} files of the last fetch are gone and removed here")
    n_held = len(wanted.keys() - fetched)
    print(f"{address}: {len(fetched):,} fetched, {n_held:,} unchanged" if fetched else f"{address}: nothing new")
    return BucketCopy(files, tuple(listing), frozenset(fetched), tuple(sorted(vanished)))


def decide(wanted: Index, index: Index, sizes: Mapping[str, int]) -> tuple[set[str], set[str]]:
    """The names whose files are here as they are listed, and those that came once and are wanted no more."""
    held = {name for name, version in wanted.items() if index.get(name) == version == [version[0], sizes.get(name)]}
    return held, index.keys() - wanted.keys()


# -- gather ------------------------------------------------------------------------------------------------------------


def split_address(address: str) -> tuple[str, str, str]:
    """Bucket, folder (``""`` or ending in ``/``) and, where the address names one, the archive in it."""
    found = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/(.*))?", address, re.DOTALL)
    if found is None:  # not repeated: what stands before an @ may be a secret
        raise SourceError("source: an S3 address is s3://bucket/prefix, the bucket in letters, digits, dots and dashes")
    bucket, key = found[1], found[2] or ""
    if key.endswith(".zip"):
        folder, slash, name = key.rpartition("/")
        return bucket, folder + slash, name
    return bucket, f"{key.rstrip('/')}/".lstrip("/") if key.strip("/") else "", ""


def _list(client: Any, bucket: str, prefix: str, settings: IngestionSettings) -> Index:
    address, listing, limit = f"s3://{bucket}/{prefix}", Index(), settings.max_members
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", ()):
            if entry["Size"] or not entry["Key"].endswith("/"):  # such a one marks a folder
                listing[entry["Key"].removeprefix(prefix)] = [entry["ETag"], entry["Size"]]
        if len(listing) > limit:
            raise SourceError(
                f"source: {address} holds more objects than ingestion.max_members = {limit:,}; "
                "raise it if that is right"
            )
    if not listing:
        raise SourceError(f"source: there is nothing below {address}; correct the address")
    for name in listing:
        parts = name.split("/")
        if "\\" in name or "\0" in name or any(p in ("", ".", "..") or len(p.encode()) > LONGEST_NAME for p in parts):
            raise SourceError(
                f"source: {address} holds the name {name[:80]!r}, which is no safe file name here; rename the object"
            )
    return dict(sorted(listing.items()))


def _look(client: Any, bucket: str, prefix: str, name: str) -> Index:
    """One object, asked for with an unread GET: a refused HEAD does not say why."""
    try:
        answer = client.get_object(Bucket=bucket, Key=prefix + name)
    except boto.ClientError as error:
        if code_of(error) != "NoSuchKey":
            raise
        raise SourceError(f"source: s3://{bucket}/{prefix}{name} is not there; correct the address") from None
    answer["Body"].close()
    return {name: [answer["ETag"], answer["ContentLength"]]}


def _refuse(wanted: Index, address: str, settings: IngestionSettings) -> None:
    folders = {parent.as_posix() for name in wanted for parent in PurePosixPath(name).parents}
    if both := sorted(folders & wanted.keys()):
        raise SourceError(f"source: {address} holds {both[0][:80]!r} both as a file and as a folder; rename one")
    if sum(size for _, size in wanted.values()) > settings.max_unpacked_gb * 1e9:
        raise SourceError(
            f"source: {address} is larger than ingestion.max_unpacked_gb = {settings.max_unpacked_gb:g} GB; raise it "
            "if that is right"
        )


def _sizes_below(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.lstat().st_size for p in folder.rglob("*") if not p.is_dir()}


def _read_index(path: Path) -> Index:
    """As appended: the last line of a name counts, one torn by a kill does not."""
    index = Index()
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError):
            name, *version = json.loads(line)
            index[name] = version[:2]
    return index


# -- apply -------------------------------------------------------------------------------------------------------------


def _write_index(path: Path, index: Index) -> None:
    write_whole(path, "".join(json.dumps([name, *version]) + "\n" for name, version in index.items()))


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Removes files, such as boto3's unfinished ones, and folders left empty: a file may come where a folder was."""
    for name in names:
        (folder / name).unlink()
    for parent, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):  # it is not empty
            Path(parent).rmdir()


class _Transfer:
    """Objects on their way from a bucket into a mirror."""

    def __init__(self, client: Any, bucket: str, prefix: str, folder: Path, settings: IngestionSettings) -> None:
        self.client, self.bucket, self.prefix, self.folder = client, bucket, prefix, folder
        self.config = TransferConfig(
            multipart_threshold=WHOLE,
            max_concurrency=settings.n_connections,
            num_download_attempts=settings.tries,
            preferred_transfer_client="classic",
        )
        self.lock, self.came, self.n_bytes = threading.Lock(), set[str](), 0

    def fetch(self, waiting: Index, progress: Callable[[int, int], None]) -> set[str]:
        """Fetches objects and enters each into the index as it comes; the names of those that were as listed."""
        context, total = copy_context(), sum(size for _, size in waiting.values())

        def count(n_bytes: int) -> None:
            with self.lock:
                self.n_bytes += n_bytes
                context.run(progress, self.n_bytes, total)  # else what it prints is not in the log of the run

        def ask_for_version(params: Any, **_: Any) -> Any:
            return {**params, "IfMatch": waiting[params["Key"].removeprefix(self.prefix)][0]}

        self.client.meta.events.register("provide-client-params.s3.GetObject", ask_for_version)
        running: deque[Any] = deque()
        try:
            with create_transfer_manager(self.client, self.config) as manager:
                for name, (etag, size) in waiting.items():
                    path = self.folder / "files" / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    enter = partial(self.enter, name, etag, size)
                    notes = [_Arrival(etag, size, enter), ProgressCallbackInvoker(count)]
                    running.append(manager.download(self.bucket, self.prefix + name, str(path), {}, notes))
                    if len(running) > AHEAD:
                        _await(running.popleft())
                while running:
                    _await(running.popleft())
        finally:
            self.client.meta.events.unregister("provide-client-params.s3.GetObject", ask_for_version)
        return self.came

    def enter(self, name: str, etag: str, size: int) -> None:
        """Enters a file into the index, unless it is another than was listed."""
        if (self.folder / "files" / name).stat().st_size == size:
            with self.lock, (self.folder / "index.jsonl").open("a") as index:
                index.write(json.dumps([name, etag, size]) + "\n")
                self.came.add(name)


class _Arrival(BaseSubscriber):
    """What boto3's transfer is told of an object, so that it need not ask, and what is done when the object is here."""

    def __init__(self, etag: str, size: int, enter: Callable[[], None]) -> None:
        self.etag, self.size, self.enter = etag, size, enter

    def on_queued(self, future: Any, **_: Any) -> None:
        """Before anything is asked for."""
        future.meta.provide_transfer_size(self.size)
        future.meta.provide_object_etag(self.etag)

    def on_done(self, future: Any, **_: Any) -> None:
        """It ended, well or not; what went wrong is raised where the transfer is awaited."""
        with suppress(Exception):
            future.result()
            self.enter()


def _await(transfer: Any) -> None:
    """Waits for an object; one that changed or went meanwhile is left to the next look."""
    try:
        transfer.result()
    except S3DownloadFailedError:
        return
    except boto.ClientError as error:
        if code_of(error) != "NoSuchKey":
            raise
    except (RetriesExceededError, S3ValidationError) as error:
        raise boto.HTTPClientError(error=error) from None
