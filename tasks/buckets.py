"""S3: a bucket's folder mirrored on this machine, or one archive brought from it; only what is new travels again.

List, decide, fetch. The listing names every object with its ETag and size, the index beside the mirror knows what came
the last time, and the difference is fetched. Every request names the ETag that it means, so two versions of an object
are never mixed, and what came is held against size and checksum before it takes its name.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.bucket_requests import LARGE, Bucket, ChangedError, Tally, Version, explained, has_size
from tasks.records import SourceError
from tasks.s3_client import make_client
from tasks.settings import IngestionSettings
from tasks.storage import digest, locked, write_whole

LOOKS = 4  # versions of an object that are tried when it keeps changing


@dataclass(frozen=True)
class BucketCopy:
    """A bucket's folder, mirrored.

    Attributes:
        folder: Local folder with the selected files.
        names: Names of all objects of the listing relative to the prefix, selected or not, sorted.
        n_fetched: Objects that were fetched now.
        n_unchanged: Objects that were there already.
        vanished: Names that an earlier fetch brought and that are listed or selected no more; their files are removed.
    """

    folder: Path
    names: tuple[str, ...]
    n_fetched: int
    n_unchanged: int
    vanished: tuple[str, ...]


def is_archive_address(address: str) -> bool:
    """Whether an S3 address names one zip and not a folder."""
    return address.endswith(".zip")


def fetch_bucket(
    address: str, folder: Path, settings: IngestionSettings, select: Callable[[list[str]], Sequence[str]]
) -> BucketCopy:
    """Mirrors what is wanted of ``s3://bucket/prefix`` into ``folder/files``; fetches only what is new or changed.

    Args:
        address: The bucket and the folder in it; ``data`` does not stand for ``data2/…``.
        folder: Holds mirror and index; one run at a time writes it, and one that was killed goes on here.
        settings: Connections, timeouts, tries, limits and credentials.
        select: Given all names below the prefix, returns those to keep; may raise ``SourceError``.

    Raises:
        SourceError: If the bucket or the credentials cannot be used, nothing is below the prefix, a name leads out of
            the folder, a limit is passed, or the server keeps failing.
    """
    with explained(address, folder):
        bucket = Bucket(address, settings, make_client(settings, "source"))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            listing = _list_folder(bucket)
            kept = sorted(set(select(list(listing))))
            _refuse_collisions(kept, address)
            _refuse_size(sum(listing[name].size for name in kept), address, settings)
            return _mirror(bucket, folder, listing, kept)


def fetch_archive_object(address: str, folder: Path, settings: IngestionSettings) -> Path:
    """Brings one object, such as a zip, to ``folder/files``, in ranges; a killed fetch goes on with those it lacks.

    Args:
        address: ``s3://bucket/key``.
        folder: Holds the file and the index, and belongs to this one object.
        settings: Connections, timeouts, tries, limits and credentials.

    Returns:
        The file, named like the last part of the key; not fetched again while the object keeps ETag and size.

    Raises:
        SourceError: If the object is not there or cannot be read, is larger than ``max_unpacked_gb``, or the server
            keeps failing.
    """
    with explained(address, folder):
        bucket = Bucket(address, settings, make_client(settings, "source"))
        name = bucket.key.rpartition("/")[2]
        _refuse_name(name, address)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            version = bucket.look(bucket.key)
            _refuse_size(version.size, address, settings)
            return _mirror(bucket, folder, {name: version}, [name]).folder / name


def _list_folder(bucket: Bucket) -> dict[str, Version]:
    prefix, limit = f"{bucket.key}/" if bucket.key else "", bucket.settings.max_members
    found: dict[str, Version] = {}
    for page in bucket.pages(prefix):
        found |= {v.key.removeprefix(prefix): v for v in page if v.size or not v.key.endswith("/")}  # / marks a folder
        if len(found) > limit:
            raise SourceError(
                f"source: {bucket.address} holds more objects than ingestion.max_members = {limit:,}; "
                "raise it if that is right"
            )
    for name in found:
        _refuse_name(name, bucket.address)
    if not found:
        raise SourceError(f"source: there is nothing below {bucket.address}; correct the address")
    return dict(sorted(found.items()))


def _mirror(bucket: Bucket, folder: Path, listing: Mapping[str, Version], kept: Sequence[str]) -> BucketCopy:
    files, parts, index_path = folder / "files", folder / "parts", folder / "index.jsonl"
    index = _read_index(index_path)
    wanted = {name: listing[name] for name in kept}
    vanished = tuple(sorted(index.keys() - wanted.keys()))
    if vanished:
        # The record of the ingestion has their names, which may be those of patients.
        print(f"{bucket.address}: {len(vanished):,} files of the last fetch are gone and removed here")
    held = {n for n, v in wanted.items() if index.get(n, [])[:2] == [v.etag, v.size] and has_size(files / n, v.size)}
    waiting = {name: version for name, version in wanted.items() if name not in held}
    _sweep(files, wanted.keys())
    _sweep(parts, {part + ending for part in map(_part_name, waiting.values()) for ending in ("", ".json")})
    parts.mkdir(parents=True, exist_ok=True)
    _write_index(index_path, index)  # a line torn by a kill goes
    tally = Tally(bucket.address, len(waiting), sum(version.size for version in waiting.values()))
    writing = threading.Lock()

    def keep(name: str, version: Version, part: Path, sha256: str) -> None:
        target = files / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # In this order a kill in between leaves a file missing, never one that the index takes for another version.
        target.unlink(missing_ok=True)
        with writing, index_path.open("a") as log:
            log.write(json.dumps([name, version.etag, version.size, sha256]) + "\n")
        os.replace(part, target)

    def fetch(waiting: Mapping[str, Version]) -> list[str]:
        """Fetches all of it; returns the names whose objects were no longer the listed version."""
        changed: list[str] = []

        def fetch_one(name: str, get: Callable[[Version, Path, Tally], str] = bucket.get_whole) -> bool:
            part = parts / _part_name(waiting[name])
            try:
                keep(name, waiting[name], part, get(waiting[name], part, tally))
            except ChangedError:
                return False
            return True

        def take(name: str, came: bool) -> None:
            changed.extend([] if came else [name])
            tally.add(waiting[name].size if came and waiting[name].size <= LARGE else 0, int(came))

        bucket.parallel(fetch_one, [n for n, v in waiting.items() if v.size <= LARGE], take, tally)
        for name in [n for n, v in waiting.items() if v.size > LARGE]:
            take(name, fetch_one(name, bucket.get_ranges))
        return changed

    for _ in range(LOOKS):
        changed = fetch(waiting)
        if not changed:
            break
        print(f"{bucket.address}: {len(changed):,} files were changed during the fetch; asking for them again")
        waiting = {name: bucket.look(waiting[name].key) for name in changed}
    else:
        raise SourceError(f"source: {bucket.address}: {changed[0]!r} keeps changing; run again when it is at rest")
    _write_index(index_path, {name: line for name, line in _read_index(index_path).items() if name in wanted})
    shutil.rmtree(parts, ignore_errors=True)
    tally.bar.show(1.0, 1.0)
    n = len(wanted) - len(held)
    print(f"{bucket.address}: {n:,} fetched, {len(held):,} unchanged" if n else f"{bucket.address}: nothing new")
    return BucketCopy(files, tuple(listing), n, len(held), vanished)


def _part_name(version: Version) -> str:
    return digest([version.key, version.etag, version.size])[:32]  # so the part of another version is not gone on with


def _read_index(path: Path) -> dict[str, list[Any]]:
    """Name to ETag, size and sha256, as appended: the last line of a name counts, one torn by a kill does not."""
    index: dict[str, list[Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            name, etag, size, sha256 = json.loads(line)
            index[name] = [etag, size, sha256]
        except (ValueError, TypeError):
            continue
    return index


def _write_index(path: Path, index: Mapping[str, Sequence[Any]]) -> None:
    write_whole(path, "".join(json.dumps([name, *line]) + "\n" for name, line in index.items()))


def _sweep(folder: Path, kept: Set[str]) -> None:
    """Removes all files but the kept ones, and folders left empty: a file may come where a folder was."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent) / name
            if path.relative_to(folder).as_posix() not in kept:
                path.unlink()
        if not any(Path(parent).iterdir()):
            Path(parent).rmdir()


def _refuse_name(name: str, address: str) -> None:
    parts = name.split("/")
    hostile = "\\" in name or "\0" in name or any(p in ("", ".", "..") or len(p.encode()) > 255 for p in parts)
    if hostile:
        raise SourceError(
            f"source: {address} holds the name {name[:80]!r}, which is no safe file name here; rename the object"
        )


def _refuse_collisions(kept: Sequence[str], address: str) -> None:
    folders = {parent.as_posix() for name in kept for parent in PurePosixPath(name).parents}
    for name in kept:
        if name in folders:
            raise SourceError(f"source: {address} holds {name[:80]!r} both as a file and as a folder; rename one")


def _refuse_size(size: int, address: str, settings: IngestionSettings) -> None:
    if size > settings.max_unpacked_gb * 1e9:
        raise SourceError(
            f"source: {address} is larger than ingestion.max_unpacked_gb = {settings.max_unpacked_gb:g} GB; raise it "
            "if that is right"
        )
