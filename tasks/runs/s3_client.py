"""The S3 client of the product, a folder in a bucket, and boto3's errors in one sentence each."""

import mimetypes
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from botocore import UNSIGNED  # type: ignore[import-untyped]
from botocore import exceptions as boto  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
from urllib3.exceptions import HTTPError

from tasks.errors import OutsideError, RunError, SourceError
from tasks.settings import IngestionSettings

EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "InvalidToken", "400")
"""Error codes for expired credentials; the answer to a HEAD has only a number."""

BROKEN_OFF = (
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
    boto.FlexibleChecksumError,
    ResponseParserError,
    HTTPError,  # of urllib3: a server error whose text was cut off
)
"""Raised for an answer that was cut off while it was read; boto3 does not retry these."""

ANOTHER_VERSION = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey")
"""Error codes of a conditional write if the object is not the expected version, or exists."""

MOST_REMOVED = 1_000
"""The most objects that one request can remove."""

PASSING_CODES = ("SlowDown", "RequestTimeout", "Throttling", "RequestLimitExceeded", "InternalError")

WAYS_OUT = {
    "NoSuchBucket": "there is no such bucket; make it, or correct the address or the endpoint (AWS_ENDPOINT_URL)",
    "AccessDenied": "access is denied; the credentials need s3:ListBucket and s3:GetObject there, and for runs "
    "s3:PutObject and s3:DeleteObject",
    "InvalidAccessKeyId": "the access key is not known there; correct the credentials or the endpoint",
    "SignatureDoesNotMatch": "the secret key does not fit the access key; correct the credentials",
    "InvalidToken": "the session token is not accepted; renew the credentials",
    "ExpiredToken": "the AWS credentials have expired; renew them and run again, what is finished is kept",
    "400": "the AWS credentials may have expired; renew them and run again, what is finished is kept",
    "403": "access is denied; check the credentials",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it and run again, what is finished is kept",
    "PermanentRedirect": "the bucket is in another region; set AWS_DEFAULT_REGION to it",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_DEFAULT_REGION to it",
    "InvalidObjectState": "an object lies in an archive storage class; restore it first",
}


@contextmanager
def s3_explained(place: str, error_type: type[Exception]) -> Iterator[None]:
    """Turns boto3's errors into one sentence each, without boto3's own text, which may hold keys.

    Args:
        place: The setting and the address, ``run_dir: s3://bucket/prefix``.
        error_type: The error for a failure that only the user can fix, such as a refused key.

    Raises:
        OutsideError: If a retry may help.
    """
    try:
        yield
    except boto.ClientError as error:
        code = code_of(error)
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400) >= 500 or code in PASSING_CODES:
            raise OutsideError(f"{place} keeps failing ({code}); try again later, what is finished is kept") from None
        way_out = WAYS_OUT.get(code, f"the server refuses ({code}); check the address and credentials")
        raise error_type(f"{place}: {way_out}") from None
    except (boto.BotoCoreError, *BROKEN_OFF) as error:
        kind, what = type(error).__name__, "the network, the AWS_… variables and the endpoint (AWS_ENDPOINT_URL)"
        if isinstance(error, boto.ProxyConnectionError):
            what = "HTTPS_PROXY, which for S3 has to be http://host:port"
        raise OutsideError(
            f"{place} cannot be reached ({kind}); check {what}, and run again; what is finished is kept"
        ) from None


def code_of(error: Any) -> str:
    """The server's code of a failure, such as ``NoSuchKey``."""
    return str(error.response.get("Error", {}).get("Code", "unknown"))


class BucketFolder:
    """The objects below ``s3://bucket/prefix/``, by relative name; boto3 transfers and retries.

    Raises:
        RunError: From every method, if the bucket cannot be used.
        OutsideError: From every method, if the server fails or cannot be reached.
    """

    def __init__(self, address: str, settings: IngestionSettings) -> None:
        self.address = address.rstrip("/")
        bucket, _, prefix = self.address.removeprefix("s3://").partition("/")
        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""
        self.place = f"run_dir: {self.address}"
        try:
            self.client = make_client(settings, "run_dir")
        except SourceError as error:
            raise RunError(str(error)) from None

    def entries(self, below: str = "") -> dict[str, str]:
        """Name -> ETag of all objects whose name begins with ``below``."""
        with s3_explained(self.place, RunError):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + below
            )
            found = {entry["Key"]: str(entry["ETag"]) for page in pages for entry in page.get("Contents", ())}
        return {key.removeprefix(self.prefix): etag for key, etag in found.items()}

    def etag(self, name: str) -> str:
        """The ETag of an object; empty if it does not exist."""
        return self.entries(name).get(name, "")

    def get(self, name: str, path: Path) -> bool:
        """Downloads an object to a file, complete or not at all; returns whether it exists.

        Raises:
            RunError: As all methods, and if the name leads out of the target folder.
        """
        if name.startswith("/") or ".." in name.split("/"):
            raise RunError(f"run_dir: {self.address} holds the name {name!r}, which leads out of its folder; remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with s3_explained(self.place, RunError):
            try:
                self.client.download_file(self.bucket, self.prefix + name, str(path))
            except boto.ClientError as error:
                if code_of(error) in ("404", "NoSuchKey"):
                    return False
                raise
        return True

    def put(self, path: Path, name: str) -> str:
        """Uploads a file with its content type; returns the ETag."""
        with s3_explained(self.place, RunError):
            return self._upload(path, name)

    def put_instead(self, path: Path, name: str, etag: str) -> str | None:
        """Like ``put``, but only if the object has this ETag (empty: does not exist); otherwise returns ``None``."""
        with s3_explained(self.place, RunError):
            try:
                return self._upload(path, name, **({"IfMatch": etag} if etag else {"IfNoneMatch": "*"}))
            except boto.ClientError as error:
                if code_of(error) not in ANOTHER_VERSION:
                    raise
        with TemporaryDirectory() as folder:  # it may be ours, if only the answer got lost
            copy = Path(folder, "copy")
            return self.etag(name) if self.get(name, copy) and copy.read_bytes() == path.read_bytes() else None

    def _upload(self, path: Path, name: str, **condition: str) -> str:
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        kind = f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
        place = {"Bucket": self.bucket, "Key": self.prefix + name}
        with path.open("rb") as stream:
            return str(self.client.put_object(**place, Body=stream, ContentType=kind, **condition)["ETag"])

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects; a missing one is not an error.

        Raises:
            RunError: As all methods, and if the server keeps one.
        """
        waiting = [{"Key": self.prefix + name} for name in sorted(names)]
        with s3_explained(self.place, RunError):
            for start in range(0, len(waiting), MOST_REMOVED):
                some = waiting[start : start + MOST_REMOVED]
                answer = self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": some, "Quiet": True})
                for kept in answer.get("Errors", ()):  # although the status is a success
                    raise boto.ClientError({"Error": {"Code": kept.get("Code", "unknown")}}, "DeleteObjects")


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
        # Checked now: boto3 itself would complain only at the first request, in its own words.
        found = session.get_credentials()
        if found is None:
            raise SourceError(
                f"{about}: there are no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
                "AWS_PROFILE, or name a prefect-aws block with ingestion.aws_block"
            )
        credentials = _RenewedCredentials(found, lambda: _open_session(settings.aws_block)[0].get_credentials())
        session._session._credentials = credentials  # boto3 has no other way to set a custom provider
        client = session.client("s3", config=config, **options)
        client.meta.events.register_first("needs-retry.s3", credentials.renew_expired)
        return client
    except (
        boto.BotoCoreError,
        boto.ClientError,
        ValueError,
    ) as error:  # only the error's type: the text may hold a secret
        raise SourceError(
            f"{about}: the AWS settings cannot be used ({type(error).__name__}); check the AWS_… variables, the "
            "profile, or the block that ingestion.aws_block names"
        ) from None


class _RenewedCredentials(Credentials):  # type: ignore[misc]
    """Credentials that are looked up again when the server says that they have expired.

    boto3 renews credentials of roles and processes by their own expiry date, which may differ from the server's. A file
    or block that something else keeps fresh, such as a login for some hours, boto3 reads only once.
    """

    def __init__(self, found: Any, look_up: Callable[[], Any]) -> None:
        first = found.get_frozen_credentials()
        super().__init__(first.access_key, first.secret_key, first.token, found.method)
        self._found, self._look_up, self._lock = found, look_up, threading.Lock()
        self._found_at = time.monotonic()

    def get_frozen_credentials(self) -> Any:
        """The credentials that sign a request."""
        return self._found.get_frozen_credentials()

    def renew_expired(self, response: Any, request_dict: Any, **_: Any) -> float | None:
        """Botocore's retry hook: looks up the credentials again and retries the request once, at once."""
        code = response[1].get("Error", {}).get("Code") if response else None
        if code not in EXPIRED or request_dict["context"].get("renewed"):
            return None
        request_dict["context"]["renewed"] = True
        with self._lock:
            if time.monotonic() - self._found_at > 1.0:  # otherwise another thread has just done so
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


def open_bucket(address: str, settings: IngestionSettings) -> BucketFolder:
    """A folder in a bucket, with one client per process."""
    # What boto3 reads when a client is made: another endpoint or key needs another client.
    surroundings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _open(address.rstrip("/"), settings, surroundings)


@cache
def _open(address: str, settings: IngestionSettings, surroundings: tuple[tuple[str, str], ...]) -> BucketFolder:
    return BucketFolder(address, settings)
