"""S3: a bucket's folder mirrored on this machine, or one archive brought from it; only what is new travels again.

List, decide, fetch. The listing names every object with its ETag and size, the index beside the mirror knows what came
the last time, and the difference is fetched. Every request names the ETag that it means, so two versions of an object
are never mixed, and what came is held against size and checksum before it takes its name.
"""

import hashlib
import json
import math
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from botocore import UNSIGNED  # type: ignore[import-untyped]
from botocore import exceptions as boto  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
from urllib3.exceptions import HTTPError

from tasks.artifacts import Progress
from tasks.records import RunError, SourceError
from tasks.settings import IngestionSettings
from tasks.storage import digest, locked, read_json, write_json, write_whole

PIECE = 1 << 20  # bytes in memory for each connection
RANGE = 8 << 20
LARGE = 16 << 20  # objects above this come in ranges
LOOKS = 4  # versions of an object that are tried when it keeps changing
LONGEST_PAUSE_S = 30.0

Item = TypeVar("Item")
Result = TypeVar("Result")

WAYS_OUT = {
    "NoSuchBucket": "there is no such bucket; correct the address, or the endpoint (AWS_ENDPOINT_URL)",
    "AccessDenied": "access is denied; the credentials need s3:ListBucket and s3:GetObject there",
    "InvalidAccessKeyId": "the access key is not known there; correct the credentials or the endpoint",
    "SignatureDoesNotMatch": "the secret key does not fit the access key; correct the credentials",
    "InvalidToken": "the session token is not accepted; renew the credentials",
    "ExpiredToken": "the credentials have expired; renew them and run again, what was fetched is kept",
    "PermanentRedirect": "the bucket is in another region; set AWS_DEFAULT_REGION to it",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_DEFAULT_REGION to it",
    "InvalidObjectState": "an object lies in an archive storage class; restore it first",
}


class _BrokenError(Exception):
    """What came is not what was listed."""


class _ChangedError(Exception):
    """The object is no longer the version that was asked for."""


class _StoppedError(Exception):
    """Another thread failed, so this one need not go on."""


PASSING = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    ResponseParserError,
    HTTPError,
    _BrokenError,
)
PASSING_CODES = ("SlowDown", "RequestTimeout", "Throttling", "RequestLimitExceeded", "InternalError")


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


@dataclass(frozen=True)
class _Version:
    """One version of an object."""

    key: str
    etag: str
    size: int


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
    with _explained(address, folder):
        bucket = _Bucket(address, settings, make_client(settings))
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
    with _explained(address, folder):
        bucket = _Bucket(address, settings, make_client(settings))
        name = bucket.key.rpartition("/")[2]
        _refuse_name(name, address)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            version = bucket.look(bucket.key)
            _refuse_size(version.size, address, settings)
            return _mirror(bucket, folder, {name: version}, [name]).folder / name


def make_client(settings: IngestionSettings) -> Any:
    """A boto3 client for S3; endpoint and credentials by boto3's standard chain or from a prefect-aws block.

    Args:
        settings: ``aws_block`` names the block; ``tries``, ``timeout_s`` and ``n_connections`` shape the client.

    Raises:
        SourceError: If there are no credentials, or the block or the AWS settings cannot be used.
    """
    import boto3  # type: ignore[import-untyped]
    from botocore.config import Config  # type: ignore[import-untyped]

    shape = Config(
        retries={"mode": "standard", "total_max_attempts": settings.tries},
        connect_timeout=settings.timeout_s,
        read_timeout=settings.timeout_s,
        max_pool_connections=settings.n_connections,
    )
    try:
        session, options = _open_block(settings.aws_block) if settings.aws_block else (boto3.Session(), {})
        config = options.pop("config", Config()).merge(shape)
        # Looked at now: boto3 itself would complain at the first request only, and in other words.
        if config.signature_version is not UNSIGNED and session.get_credentials() is None:
            raise SourceError(
                "source: there are no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, "
                "or name a prefect-aws block with ingestion.aws_block"
            )
        return session.client("s3", config=config, **options)
    except (boto.BotoCoreError, boto.ClientError, ValueError) as error:  # only its kind: the text may hold a secret
        raise SourceError(
            f"source: the AWS settings cannot be used ({type(error).__name__}); look at the AWS_… variables, the "
            "profile, or the block that ingestion.aws_block names"
        ) from None


def _open_block(name: str) -> tuple[Any, dict[str, Any]]:
    from prefect_aws import AwsCredentials

    load: Callable[[str], Any] = AwsCredentials.load
    try:
        block = load(name)
    except ValueError:
        raise SourceError(
            f"ingestion.aws_block: there is no usable AwsCredentials block {name!r}; create it in Prefect, or leave "
            "the setting out and use the AWS_… variables"
        ) from None
    return block.get_boto3_session(), block.aws_client_parameters.get_params_override()


# -- the mirror --------------------------------------------------------------------------------------------------------


def _list_folder(bucket: "_Bucket") -> dict[str, _Version]:
    prefix, limit = f"{bucket.key}/" if bucket.key else "", bucket.settings.max_members
    found: dict[str, _Version] = {}
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


def _mirror(bucket: "_Bucket", folder: Path, listing: Mapping[str, _Version], kept: Sequence[str]) -> BucketCopy:
    files, parts, index_path = folder / "files", folder / "parts", folder / "index.jsonl"
    index = _read_index(index_path)
    wanted = {name: listing[name] for name in kept}
    vanished = tuple(sorted(index.keys() - wanted.keys()))
    if vanished:
        some = ", ".join(vanished[:3]) + (", …" if len(vanished) > 3 else "")
        print(f"{bucket.address}: {len(vanished):,} files of the last fetch are gone and removed here: {some}")
    held = {n for n, v in wanted.items() if index.get(n, [])[:2] == [v.etag, v.size] and _has_size(files / n, v.size)}
    waiting = {name: version for name, version in wanted.items() if name not in held}
    _sweep(files, wanted.keys())
    _sweep(parts, {part + ending for part in map(_part_name, waiting.values()) for ending in ("", ".json")})
    parts.mkdir(parents=True, exist_ok=True)
    _write_index(index_path, index)  # a line torn by a kill goes
    tally = _Tally(bucket.address, len(waiting), sum(version.size for version in waiting.values()))
    writing = threading.Lock()

    def keep(name: str, version: _Version, part: Path, sha256: str) -> None:
        target = files / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # In this order a kill in between leaves a file missing, never one that the index takes for another version.
        target.unlink(missing_ok=True)
        with writing, index_path.open("a") as log:
            log.write(json.dumps([name, version.etag, version.size, sha256]) + "\n")
        os.replace(part, target)

    def fetch(waiting: Mapping[str, _Version]) -> list[str]:
        """Fetches all of it; returns the names whose objects were no longer the listed version."""
        changed: list[str] = []

        def fetch_one(name: str, get: Callable[[_Version, Path, _Tally], str] = bucket.get_whole) -> bool:
            part = parts / _part_name(waiting[name])
            try:
                keep(name, waiting[name], part, get(waiting[name], part, tally))
            except _ChangedError:
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


def _part_name(version: _Version) -> str:
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


def _has_size(path: Path, size: int) -> bool:
    """Whether there is a file of that size."""
    return path.is_file() and path.stat().st_size == size


class _Tally:
    """Says how far the fetch is: a line at each quarter or every 10 s, the bar at most every 2 s."""

    def __init__(self, address: str, n_files: int, n_bytes: int) -> None:
        self.address, self.n_files, self.n_bytes = address, n_files, n_bytes
        self.files = self.bytes = self.quarter = 0
        self.line_at = self.bar_at = time.monotonic()
        self.bar = Progress("fetching", f"Fetching {address}")

    def add(self, n_bytes: int, n_files: int = 0) -> None:
        """Counts what came."""
        self.bytes += n_bytes
        self.files += n_files

    def show(self) -> None:
        """Tells it when it is time to; from the main thread only."""
        now, share = time.monotonic(), self.bytes / self.n_bytes if self.n_bytes else 1.0
        if now - self.bar_at > 2:
            self.bar_at = now
            self.bar.show(share, 1.0)
        if int(4 * share) > self.quarter or now - self.line_at > 10:
            self.quarter, self.line_at = int(4 * share), now
            done = f"{self.files:,} of {self.n_files:,} files, {self.bytes / 1e6:,.1f} of {self.n_bytes / 1e6:,.1f} MB"
            print(f"{self.address}: fetched {done}")


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


# -- requests ----------------------------------------------------------------------------------------------------------


def _split_address(address: str) -> tuple[str, str]:
    found = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/(.*))?", address, re.DOTALL)
    if found is None:  # not repeated: what stands before an @ may be a secret
        raise SourceError("source: an S3 address is s3://bucket/prefix, the bucket in letters, digits, dots and dashes")
    return found[1], (found[2] or "").rstrip("/")


class _Bucket:
    """Requests to one bucket, each tried again while its failure may pass."""

    def __init__(self, address: str, settings: IngestionSettings, client: Any) -> None:
        self.name, self.key = _split_address(address)
        self.address, self.settings, self.client = address, settings, client
        self.stop = threading.Event()
        self.sent = threading.local()
        self.client.meta.events.register("before-send.s3", self._count)

    def _count(self, **_: Any) -> None:
        if self.stop.is_set():
            raise _StoppedError
        self.sent.n = getattr(self.sent, "n", 0) + 1

    def attempt(self, action: Callable[..., Result], *args: Any, **named: Any) -> Result:
        """Does it until it works. Requests that boto3 repeated by itself count: ``tries`` is one budget, not two."""
        self.sent.n = failures = 0
        while True:
            try:
                return action(*args, **named)
            except (*PASSING, boto.ClientError) as error:
                if isinstance(error, boto.ClientError) and not _passes(error):
                    raise
                failures += 1
                if max(failures, self.sent.n) >= self.settings.tries:
                    raise self.failed(error) from None
            pause = min(self.settings.backoff_s * 2.0 ** (failures - 1), LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
            if self.stop.wait(pause):
                raise _StoppedError

    def failed(self, error: Exception) -> SourceError:
        """What is said when the tries are used up."""
        kind = _code(error) if isinstance(error, boto.ClientError) else type(error).__name__.strip("_")
        return SourceError(
            f"source: {self.address} could not be fetched in {self.settings.tries} tries ({kind}); look at the network "
            "and the endpoint (AWS_ENDPOINT_URL) and try again later, what was fetched is kept"
        )

    def pages(self, prefix: str) -> Iterator[list[_Version]]:
        """All objects whose key begins so, page by page."""
        token: dict[str, str] = {}
        while True:
            page = self.attempt(self.client.list_objects_v2, Bucket=self.name, Prefix=prefix, **token)
            yield [_Version(entry["Key"], entry["ETag"], entry["Size"]) for entry in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def look(self, key: str) -> _Version:
        """The version that is there now, asked with an unread GET: a refused HEAD does not say why."""

        def ask() -> _Version:
            answer = self.client.get_object(Bucket=self.name, Key=key)
            answer["Body"].close()
            return _Version(key, answer["ETag"], answer["ContentLength"])

        try:
            return self.attempt(ask)
        except boto.ClientError as error:
            if _code(error) != "NoSuchKey":
                raise
        where = f"s3://{self.name}/{key}"
        raise SourceError(f"source: {where} is not there, or no longer; look at the address and run again")

    def get(self, version: _Version, path: Path, start: int, size: int) -> bool:
        """Writes bytes of one version to their place in a file; tells whether its ETag speaks of the content."""
        part = {"Range": f"bytes={start}-{start + size - 1}"} if size < version.size else {}
        try:
            answer = self.client.get_object(Bucket=self.name, Key=version.key, IfMatch=version.etag, **part)
        except boto.ClientError as error:
            if _code(error) in ("PreconditionFailed", "412", "NoSuchKey"):
                raise _ChangedError from None
            raise
        with closing(answer["Body"]) as body, path.open("r+b") as out:
            if answer["ETag"] != version.etag:
                raise _ChangedError
            out.seek(start)
            while piece := body.read(PIECE):  # to the very end: only there boto3 compares the server's checksum
                if self.stop.is_set():
                    raise _StoppedError
                if out.tell() + len(piece) > start + size:
                    raise _BrokenError
                out.write(piece)
            if out.tell() != start + size:
                raise _BrokenError
        # With KMS or a customer's key an ETag is no checksum.
        return answer.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in answer

    def get_whole(self, version: _Version, path: Path, _: _Tally) -> str:
        """Fetches an object in one request; returns its sha256."""

        def get() -> str:
            path.write_bytes(b"")
            return self.verify(version, path, self.get(version, path, 0, version.size))

        return self.attempt(get)

    def get_ranges(self, version: _Version, path: Path, tally: _Tally) -> str:
        """Fetches those ranges of an object that are not there yet, at the same time; returns its sha256."""
        note = path.with_name(path.name + ".json")
        starts = range(0, version.size, RANGE)
        done = _read_note(note) if _has_size(path, version.size) else set()
        for _ in range(self.settings.tries):
            path.open("ab").close()
            os.truncate(path, version.size)
            tally.add(sum(self.length(version, start) for start in done))
            if done:
                print(f"{self.address}: going on with {len(done):,} of {len(starts):,} ranges here")
            spoken = [True]

            def fetch(start: int) -> bool:
                return self.attempt(self.get, version, path, start, self.length(version, start))

            def take(start: int, speaks: bool, spoken: list[bool] = spoken) -> None:
                spoken.append(speaks)
                tally.add(0 if start in done else self.length(version, start))
                done.add(start)
                write_json(note, sorted(done))

            # The last range always: its answer says whether the ETag speaks of the content.
            self.parallel(fetch, [s for s in starts if s not in done or s == starts[-1]], take, tally)
            try:
                return self.verify(version, path, all(spoken))
            except _BrokenError:
                print(f"{self.address}: {version.key} came damaged; fetching it again")
                tally.add(-version.size)
                done.clear()
        raise self.failed(_BrokenError())

    @staticmethod
    def length(version: _Version, start: int) -> int:
        """Bytes of the range that begins there."""
        return min(RANGE, version.size - start)

    def parallel(
        self,
        action: Callable[[Item], Result],
        items: Iterable[Item],
        take: Callable[[Item, Result], None],
        tally: _Tally,
    ) -> None:
        """Does something to each item, ``n_connections`` at a time; takes and tallies in this thread."""
        n, todo = self.settings.n_connections, iter(items)
        running: dict[Future[Result], Item] = {}
        pool = ThreadPoolExecutor(n, thread_name_prefix="s3")
        try:
            while True:
                for item in islice(todo, 2 * n - len(running)):  # a few wait, so that no connection does
                    running[pool.submit(action, item)] = item
                if not running:
                    return
                for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    take(running.pop(future), future.result())
                tally.show()
        except BaseException:
            self.stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self.stop.clear()

    def verify(self, version: _Version, path: Path, etag_speaks: bool) -> str:
        """The sha256 of a file, once its content is found to be what the ETag says.

        A plain ETag is the MD5 of the object, that of an upload in n parts the MD5 of the parts' MD5s, and ``-n``.
        """
        found = re.fullmatch(r'"?([0-9a-f]{32})(?:-([0-9]+))?"?', version.etag) if etag_speaks else None
        if found is None:
            return _hash(path, [version.size])[1]
        n_parts = int(found[2] or 0)
        sha256 = ""
        for sizes in self.part_sizes(version, n_parts) if n_parts > 1 else [[version.size]]:
            md5s, sha256 = _hash(path, sizes)
            if found[1] == (hashlib.md5(b"".join(md5s)).hexdigest() if n_parts else md5s[0].hex()):
                return sha256
        if sha256:
            raise _BrokenError
        return _hash(path, [version.size])[1]  # the server names no parts: its ETag on every range has to do

    def part_sizes(self, version: _Version, n_parts: int) -> Iterator[list[int]]:
        """Sizes that the parts may have: all alike but the last, as most upload; then what the server says."""

        def size_of(number: int) -> int:
            head = self.attempt(self.client.head_object, Bucket=self.name, Key=version.key, PartNumber=number)
            return int(head["ContentLength"])

        try:
            first = size_of(1)
            if not 0 < first < version.size:
                return
            if math.ceil(version.size / first) == n_parts:
                yield [first] * (n_parts - 1) + [version.size - first * (n_parts - 1)]
            sizes = [first, *(size_of(number) for number in range(2, n_parts + 1))]
        except boto.ClientError:
            return
        if sum(sizes) == version.size:
            yield sizes


def _hash(path: Path, sizes: Sequence[int]) -> tuple[list[bytes], str]:
    """The MD5 of each stretch of a file and the sha256 of it all, in one reading."""
    md5s, sha256 = [], hashlib.sha256()
    with path.open("rb") as stream:
        for size in sizes:
            md5, left = hashlib.md5(usedforsecurity=False), size
            while left and (piece := stream.read(min(PIECE, left))):
                md5.update(piece)
                sha256.update(piece)
                left -= len(piece)
            md5s.append(md5.digest())
    return md5s, sha256.hexdigest()


def _read_note(path: Path) -> set[int]:
    try:
        return set(read_json(path))
    except RunError:
        return set()


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _passes(error: Any) -> bool:
    return (
        error.response["ResponseMetadata"]["HTTPStatusCode"] in (429, *range(500, 600)) or _code(error) in PASSING_CODES
    )


@contextmanager
def _explained(address: str, folder: Path) -> Iterator[None]:
    """One sentence with the way out for what boto3 and the disk raise; never boto3's text, which may hold keys."""
    try:
        yield
    except boto.ClientError as error:
        way_out = WAYS_OUT.get(
            _code(error), f"the server refuses ({_code(error)}); look at the address and credentials"
        )
        raise SourceError(f"source: {address}: {way_out}") from None
    except boto.BotoCoreError as error:
        raise SourceError(
            f"source: {address} cannot be read ({type(error).__name__}); look at the AWS_… variables and the endpoint"
        ) from None
    except OSError as error:
        raise SourceError(
            f"source: {address} cannot be written to {folder} ({error.strerror or error}); put that right and run "
            "again, what was fetched is kept"
        ) from None
