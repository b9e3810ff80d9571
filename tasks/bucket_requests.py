"""Requests to one S3 bucket: each tried again while its failure may pass, none mixing two versions of an object."""

import hashlib
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from botocore import exceptions as boto  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
from urllib3.exceptions import HTTPError

from tasks.artifacts import Progress
from tasks.records import RunError, SourceError
from tasks.room import is_full, room_in
from tasks.settings import IngestionSettings
from tasks.storage import read_json, write_json

PIECE = 1 << 20  # bytes in memory for each connection
RANGE = 8 << 20
LARGE = 16 << 20  # objects above this come in ranges
LONGEST_PAUSE_S = 30.0

Item = TypeVar("Item")
Result = TypeVar("Result")

WAYS_OUT = {
    "NoSuchBucket": "there is no such bucket; correct the address, or the endpoint (AWS_ENDPOINT_URL)",
    "AccessDenied": "access is denied; the credentials need s3:ListBucket and s3:GetObject there",
    "InvalidAccessKeyId": "the access key is not known there; correct the credentials or the endpoint",
    "SignatureDoesNotMatch": "the secret key does not fit the access key; correct the credentials",
    "InvalidToken": "the session token is not accepted; renew the credentials",
    "ExpiredToken": "the AWS credentials have expired; renew them and run again, what was fetched is kept",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it and run again, what was fetched is kept",
    "PermanentRedirect": "the bucket is in another region; set AWS_DEFAULT_REGION to it",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_DEFAULT_REGION to it",
    "InvalidObjectState": "an object lies in an archive storage class; restore it first",
}


class _BrokenError(Exception):
    """What came is not what was listed."""


class ChangedError(Exception):
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
class Version:
    """One version of an object."""

    key: str
    etag: str
    size: int


class Tally:
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


def _split_address(address: str) -> tuple[str, str]:
    found = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/(.*))?", address, re.DOTALL)
    if found is None:  # not repeated: what stands before an @ may be a secret
        raise SourceError("source: an S3 address is s3://bucket/prefix, the bucket in letters, digits, dots and dashes")
    return found[1], (found[2] or "").rstrip("/")


class Bucket:
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

    def pages(self, prefix: str) -> Iterator[list[Version]]:
        """All objects whose key begins so, page by page."""
        token: dict[str, str] = {}
        while True:
            page = self.attempt(self.client.list_objects_v2, Bucket=self.name, Prefix=prefix, **token)
            yield [Version(entry["Key"], entry["ETag"], entry["Size"]) for entry in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def look(self, key: str) -> Version:
        """The version that is there now, asked with an unread GET: a refused HEAD does not say why."""

        def ask() -> Version:
            answer = self.client.get_object(Bucket=self.name, Key=key)
            answer["Body"].close()
            return Version(key, answer["ETag"], answer["ContentLength"])

        try:
            return self.attempt(ask)
        except boto.ClientError as error:
            if _code(error) != "NoSuchKey":
                raise
        where = f"s3://{self.name}/{key}"
        raise SourceError(f"source: {where} is not there, or no longer; look at the address and run again")

    def get(self, version: Version, path: Path, start: int, size: int) -> bool:
        """Writes bytes of one version to their place in a file; tells whether its ETag speaks of the content."""
        part = {"Range": f"bytes={start}-{start + size - 1}"} if size < version.size else {}
        try:
            answer = self.client.get_object(Bucket=self.name, Key=version.key, IfMatch=version.etag, **part)
        except boto.ClientError as error:
            if _code(error) in ("PreconditionFailed", "412", "NoSuchKey"):
                raise ChangedError from None
            raise
        with closing(answer["Body"]) as body, path.open("r+b") as out:
            if answer["ETag"] != version.etag:
                raise ChangedError
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

    def get_whole(self, version: Version, path: Path, _: Tally) -> str:
        """Fetches an object in one request; returns its sha256."""

        def get() -> str:
            path.write_bytes(b"")
            return self.verify(version, path, self.get(version, path, 0, version.size))

        return self.attempt(get)

    def get_ranges(self, version: Version, path: Path, tally: Tally) -> str:
        """Fetches those ranges of an object that are not there yet, at the same time; returns its sha256."""
        note = path.with_name(path.name + ".json")
        done = _read_note(note) if has_size(path, version.size) else set()
        left = version.size - sum(self.length(version, start) for start in done)
        with room_in(path.parent, left):
            return self._get_ranges(version, path, tally, done)

    def _get_ranges(self, version: Version, path: Path, tally: Tally, done: set[int]) -> str:
        note, starts = path.with_name(path.name + ".json"), range(0, version.size, RANGE)
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
                print(f"{self.address}: a file came damaged; fetching it again")
                tally.add(-version.size)
                done.clear()
        raise self.failed(_BrokenError())

    @staticmethod
    def length(version: Version, start: int) -> int:
        """Bytes of the range that begins there."""
        return min(RANGE, version.size - start)

    def parallel(
        self,
        action: Callable[[Item], Result],
        items: Iterable[Item],
        take: Callable[[Item, Result], None],
        tally: Tally,
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

    def verify(self, version: Version, path: Path, etag_speaks: bool) -> str:
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

    def part_sizes(self, version: Version, n_parts: int) -> Iterator[list[int]]:
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
def explained(address: str, folder: Path) -> Iterator[None]:
    """One sentence with the way out for what boto3 and the disk raise; never boto3's text, which may hold keys.

    A full disk is left to whoever knows what was needed (``room_in``).
    """
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
        if is_full(error):
            raise
        raise SourceError(
            f"source: {address} cannot be written to {folder} ({error.strerror or error}); put that right and run "
            "again, what was fetched is kept"
        ) from None


def has_size(path: Path, size: int) -> bool:
    """Whether there is a file of that size."""
    return path.is_file() and path.stat().st_size == size
