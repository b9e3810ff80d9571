"""A folder in a bucket: whole files in and out, known by their checksum; and the client for S3 that all use."""

import hashlib
import mimetypes
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore import UNSIGNED  # type: ignore[import-untyped]
from botocore import exceptions as boto  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
from urllib3.exceptions import HTTPError

from tasks.records import RunError, SourceError
from tasks.settings import IngestionSettings

MOST_AT_ONCE = 1_000
"""Objects that one request can remove."""

ANOTHER_VERSION = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey")
"""What a server says to a conditional write where not the expected version is there, or none."""

EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "InvalidToken")
"""What a server says to credentials that were good once."""

BROKEN_OFF = (
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
    ResponseParserError,
    HTTPError,  # of urllib3: an error of the server, the text of which broke off
)
"""What comes of an answer that broke off while it was read, which boto3 does not ask for again."""

WAYS_OUT = {
    "NoSuchBucket": "there is no such bucket; make it, or correct the address or the endpoint (AWS_ENDPOINT_URL)",
    "AccessDenied": "access is denied; the credentials need s3:ListBucket, GetObject, PutObject and DeleteObject there",
    "InvalidAccessKeyId": "the access key is not known there; correct the credentials or the endpoint",
    "SignatureDoesNotMatch": "the secret key does not fit the access key; correct the credentials",
    "ExpiredToken": "the AWS credentials have expired; renew them and run again, what is finished is kept",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it and run again, what is finished is kept",
    "PermanentRedirect": "the bucket is in another region; set AWS_DEFAULT_REGION to it",
}


@dataclass(frozen=True)
class Stored:
    """What a bucket holds under a name: ``etag`` of the version, ``size`` in bytes, ``sha256`` where it is known."""

    etag: str
    size: int
    sha256: str = ""


class BucketFolder:
    """The objects below ``s3://bucket/prefix/``, by their names relative to it.

    An object appears whole or not at all: that is how S3 writes. Requests are tried again by boto3.

    Raises:
        RunError: From every method, if the bucket cannot be used, in one sentence.
    """

    def __init__(self, address: str, settings: IngestionSettings, about: str = "run_dir") -> None:
        self.address, self.about, self.tries = address.rstrip("/"), about, settings.tries
        bucket, _, prefix = self.address.removeprefix("s3://").partition("/")
        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""
        try:
            self.client = make_client(settings, about)
        except SourceError as error:
            raise RunError(str(error)) from None

    def entries(self, below: str = "") -> dict[str, Stored]:
        """All objects whose name begins so, by name."""
        found: dict[str, Stored] = {}
        with self._explained():
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + below
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    found[entry["Key"].removeprefix(self.prefix)] = Stored(entry["ETag"], entry["Size"])
        return found

    def get(self, name: str, path: Path) -> Stored | None:
        """Brings an object to a file, whole or not at all, and checks what came; ``None`` where there is none.

        Raises:
            RunError: If the bucket cannot be used, or the name would lead out of the folder it is brought to.
        """
        if name.startswith("/") or ".." in name.split("/"):
            raise RunError(f"run_dir: {self.address} holds the name {name!r}, which leads out of its folder; remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
        try:
            with self._explained():
                stored = self._again(lambda: self._download(name, beside))
            if stored is not None:
                os.replace(beside, path)
            return stored
        finally:
            beside.unlink(missing_ok=True)

    def _download(self, name: str, path: Path) -> Stored | None:
        try:
            answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + name)
        except boto.ClientError as error:
            if error.response["Error"].get("Code") == "NoSuchKey":
                return None
            raise
        said, seen = answer["Metadata"].get("sha256", ""), hashlib.sha256()
        with path.open("wb") as stream:
            for piece in answer["Body"].iter_chunks(1 << 20):
                seen.update(piece)
                stream.write(piece)
        if path.stat().st_size != answer["ContentLength"] or said not in ("", seen.hexdigest()):
            raise boto.IncompleteReadError(actual_bytes=path.stat().st_size, expected_bytes=answer["ContentLength"])
        return Stored(answer["ETag"], answer["ContentLength"], seen.hexdigest())

    def put(self, path: Path, name: str) -> Stored:
        """Writes a file as an object, with its sha256 beside it and its type for a browser."""
        with self._explained():
            return self._upload(path, name)

    def put_instead(self, path: Path, name: str, etag: str | None) -> Stored | None:
        """The same, but only in place of the version with this etag, or of none; else ``None``, and nothing changes."""
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        with self._explained():
            try:
                return self._upload(path, name, **condition)
            except boto.ClientError as error:
                if error.response["Error"].get("Code") in ANOTHER_VERSION:
                    return None
                raise

    def _upload(self, path: Path, name: str, **condition: str) -> Stored:
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
            answer = self.client.put_object(
                Bucket=self.bucket,
                Key=self.prefix + name,
                Body=stream,
                ContentType=f"{kind}; charset=utf-8" if kind.startswith("text/") else kind,
                Metadata={"sha256": sha256},
                **condition,
            )
        return Stored(answer["ETag"], path.stat().st_size, sha256)

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects; one that is not there is no error.

        Raises:
            RunError: As all methods, and if the server keeps one.
        """
        waiting = [{"Key": self.prefix + name} for name in sorted(names)]
        with self._explained():
            for start in range(0, len(waiting), MOST_AT_ONCE):
                some = waiting[start : start + MOST_AT_ONCE]
                answer = self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": some, "Quiet": True})
                for kept in answer.get("Errors", ()):  # with the status of a success
                    raise boto.ClientError({"Error": {"Code": kept.get("Code", "unknown")}}, "DeleteObjects")

    def _again(self, action: Callable[[], Stored | None]) -> Stored | None:
        for tried in range(1, self.tries + 1):
            try:
                return action()
            except BROKEN_OFF:
                if tried == self.tries:
                    raise
                time.sleep(min(2.0**tried / 4, 10.0))
        raise AssertionError("settings.tries is at least 1")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        # Never boto3's own text: it may hold keys.
        try:
            yield
        except boto.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "unknown"))
            way_out = WAYS_OUT.get(code, f"the server refuses ({code}); look at the address and credentials")
            raise RunError(f"{self.about}: {self.address}: {way_out}") from None
        except (boto.BotoCoreError, *BROKEN_OFF) as error:
            raise RunError(
                f"{self.about}: {self.address} cannot be reached ({type(error).__name__}); look at the network, the "
                "AWS_… variables and the endpoint (AWS_ENDPOINT_URL), and run again; what is finished is kept"
            ) from None


def make_client(settings: IngestionSettings, about: str) -> Any:
    """A boto3 client for S3; endpoint and credentials by boto3's standard chain or from a prefect-aws block.

    Args:
        settings: ``aws_block`` names the block; ``tries``, ``timeout_s`` and ``n_connections`` shape the client.
        about: The setting that an error names.

    Raises:
        SourceError: If there are no credentials, or the block or the AWS settings cannot be used.
    """
    from botocore.config import Config  # type: ignore[import-untyped]

    shape = Config(
        retries={"mode": "standard", "total_max_attempts": settings.tries},
        connect_timeout=settings.timeout_s,
        read_timeout=settings.timeout_s,
        max_pool_connections=settings.n_connections,
    )
    try:
        session, options = _open_session(settings.aws_block)
        config = options.pop("config", Config()).merge(shape)
        if config.signature_version is UNSIGNED:
            return session.client("s3", config=config, **options)
        # Looked at now: boto3 itself would complain at the first request only, and in other words.
        found = session.get_credentials()
        if found is None:
            raise SourceError(
                f"{about}: there are no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
                "AWS_PROFILE, or name a prefect-aws block with ingestion.aws_block"
            )
        credentials = _RenewedCredentials(found, lambda: _open_session(settings.aws_block)[0].get_credentials())
        session._session._credentials = credentials  # boto3 has no other way to bring a provider of one's own
        client = session.client("s3", config=config, **options)
        client.meta.events.register_first("needs-retry.s3", credentials.renew_expired)
        return client
    except (boto.BotoCoreError, boto.ClientError, ValueError) as error:  # only its kind: the text may hold a secret
        raise SourceError(
            f"{about}: the AWS settings cannot be used ({type(error).__name__}); look at the AWS_… variables, the "
            "profile, or the block that ingestion.aws_block names"
        ) from None


class _RenewedCredentials(Credentials):  # type: ignore[misc]
    """Credentials that are looked up anew when the server says that they have expired.

    boto3 renews those of roles and processes by their own date, which the server need not share; a file or block that
    somebody else keeps fresh, such as a login for some hours, it reads once.
    """

    def __init__(self, found: Any, look_up: Callable[[], Any]) -> None:
        first = found.get_frozen_credentials()
        super().__init__(first.access_key, first.secret_key, first.token, found.method)
        self._found, self._look_up, self._lock = found, look_up, threading.Lock()
        self._found_at = time.monotonic()

    def get_frozen_credentials(self) -> Any:
        """What a request is signed with."""
        return self._found.get_frozen_credentials()

    def renew_expired(self, response: Any, request_dict: Any, **_: Any) -> float | None:
        """Botocore's question whether to try a request again: once more with what is found now, at once."""
        code = response[1].get("Error", {}).get("Code") if response else None
        if code not in EXPIRED or request_dict["context"].get("renewed"):
            return None
        request_dict["context"]["renewed"] = True
        with self._lock:
            if time.monotonic() - self._found_at > 1.0:  # else another thread has just done so
                self._found = self._look_up() or self._found
                self._found_at = time.monotonic()
        return 0.0


def _open_session(aws_block: str | None) -> tuple[Any, dict[str, Any]]:
    import boto3  # type: ignore[import-untyped]

    return _open_block(aws_block) if aws_block else (boto3.Session(), {})


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
