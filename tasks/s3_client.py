"""The client for S3 that all use, and what its errors mean in one sentence: fetching a source, keeping a run."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from botocore import UNSIGNED  # type: ignore[import-untyped]
from botocore import exceptions as boto  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
from urllib3.exceptions import HTTPError

from tasks.records import OutsideError, SourceError
from tasks.settings import IngestionSettings

EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "InvalidToken", "400")
"""What a server says to credentials that were good once; to a HEAD it gives no more than a number."""

BROKEN_OFF = (
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
    boto.FlexibleChecksumError,
    ResponseParserError,
    HTTPError,  # of urllib3: an error of the server, the text of which broke off
)
"""What comes of an answer that broke off while it was read, which boto3 does not ask for again."""

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
    "403": "access is denied; look at the credentials",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it and run again, what is finished is kept",
    "PermanentRedirect": "the bucket is in another region; set AWS_DEFAULT_REGION to it",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_DEFAULT_REGION to it",
    "InvalidObjectState": "an object lies in an archive storage class; restore it first",
}


@contextmanager
def s3_explained(place: str, error_type: type[Exception]) -> Iterator[None]:
    """One sentence for what boto3 raises; never boto3's own text, which may hold keys.

    Args:
        place: The setting and the address, ``run_dir: s3://bucket/prefix``.
        error_type: What a failure is that only the user can mend, such as a refused key.

    Raises:
        OutsideError: If another try may help.
    """
    try:
        yield
    except boto.ClientError as error:
        code = code_of(error)
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 400) >= 500 or code in PASSING_CODES:
            raise OutsideError(f"{place} keeps failing ({code}); try again later, what is finished is kept") from None
        way_out = WAYS_OUT.get(code, f"the server refuses ({code}); look at the address and credentials")
        raise error_type(f"{place}: {way_out}") from None
    except (boto.BotoCoreError, *BROKEN_OFF) as error:
        kind = type(error).__name__
        raise OutsideError(
            f"{place} cannot be reached ({kind}); look at the network, the AWS_… variables and the endpoint "
            "(AWS_ENDPOINT_URL), and run again; what is finished is kept"
        ) from None


def code_of(error: Any) -> str:
    """What the server calls the failure, ``NoSuchKey``."""
    return str(error.response.get("Error", {}).get("Code", "unknown"))


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
