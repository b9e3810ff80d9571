"""Requests to https links without trust: hosts from a list, addresses checked, what failed outside tried again.

The standard library's client does the talking: it has no log that would print the secret query of a link, follows no
redirect and reads no proxy variable by itself, and lets a connection go to the very address that was checked (the same
name may lead elsewhere when it is asked a second time).
"""

import http.client
import ipaddress
import random
import socket
import ssl
import string
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import certifi

from tasks.addresses import hide_keys
from tasks.artifacts import Progress
from tasks.records import SourceError
from tasks.settings import IngestionSettings

PIECE = 1 << 16
MAX_REDIRECTS = 10
MAX_PAUSE_S = 60.0
MAX_RETRY_AFTER_S = 600.0
REDIRECTS = (301, 302, 303, 307, 308)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

T = TypeVar("T")


class OutsideError(Exception):
    """A failure that another try may mend; it never leaves ``keep_trying``.

    Attributes:
        reason: A few words, without the link.
        retry_after_s: How long the server asks to be left alone.
        progressed: Whether the attempt brought the file further than it was.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None, *, progressed: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.progressed = progressed


# -- trying again ------------------------------------------------------------------------------------------------------


def keep_trying(
    attempt: Callable[[], T], what: str, settings: IngestionSettings, stop: threading.Event | None = None
) -> T:
    """Calls ``attempt`` until it returns; pauses in between, with exponential backoff and full jitter.

    Args:
        attempt: What is tried; an ``OutsideError`` is a reason to try again, everything else passes through.
        what: What is being fetched, for messages; no secrets.
        settings: ``tries`` (attempts without progress) and ``backoff_s``.
        stop: Ends a pause early, and with it the trying.

    Raises:
        SourceError: When ``settings.tries`` attempts in a row brought nothing.
    """
    stop = stop or threading.Event()
    failures = 0
    while True:
        try:
            return attempt()
        except OutsideError as error:
            failures = 0 if error.progressed else failures + 1
            if failures >= settings.tries or stop.is_set():
                tries = "1 try" if settings.tries == 1 else f"{settings.tries} tries"
                raise SourceError(
                    f"source: {what} did not arrive after {tries} (last: {error.reason}); "
                    "try again later, what was fetched is kept"
                ) from None
            pause_s = max(pause_between(failures, settings.backoff_s), min(error.retry_after_s or 0, MAX_RETRY_AFTER_S))
            print(f"{what}: {error.reason}; trying again in {pause_s:.1f} s")
            stop.wait(pause_s)


def pause_between(failures: int, backoff_s: float) -> float:
    """Seconds to wait after so many failures in a row: anything up to a bound that doubles each time, 60 s at most."""
    return random.uniform(0, min(MAX_PAUSE_S, backoff_s * 2 ** min(max(failures - 1, 0), 30)))


def retry_after_s(value: str | None) -> float | None:
    """What a ``Retry-After`` header says in seconds; it holds a number of seconds or a date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


# -- one request -------------------------------------------------------------------------------------------------------


def shown_link(url: str) -> str:
    """The link as messages may show it; see ``hide_keys``."""
    return hide_keys(url)


def tls_context(settings: IngestionSettings) -> ssl.SSLContext:
    """Whom to trust: the authority of ``ca_file`` alone, else the public ones.

    Raises:
        SourceError: If ``ca_file`` cannot be read.
    """
    try:
        return ssl.create_default_context(cafile=settings.ca_file or certifi.where())
    except OSError as error:
        raise SourceError(
            f"ingestion.ca_file: {settings.ca_file} cannot be read as PEM ({error.strerror}); "
            "name a file with the authority's certificate"
        ) from None


@contextmanager
def open_link(
    url: str, headers: Mapping[str, str], settings: IngestionSettings, context: ssl.SSLContext
) -> Iterator[http.client.HTTPResponse]:
    """Sends a GET and follows redirects; each hop is https, to a host of the list, at a public address.

    Args:
        url: The https link.
        headers: Sent at every hop.
        settings: ``allowed_hosts`` and ``timeout_s``.
        context: From ``tls_context``.

    Yields:
        The answer that is no redirect, its body not yet read.

    Raises:
        SourceError: If a hop is refused, a certificate does not hold, or there are more than 10 redirects.
        OutsideError: If a server cannot be reached or does not answer.
    """
    shown = shown_link(url)
    for n_hops in range(MAX_REDIRECTS + 1):
        hop = _checked_hop(url, shown, n_hops, settings)
        connection = _PinnedConnection(hop, _checked_addresses(hop, shown, settings), context, settings.timeout_s)
        with closing(connection):
            with _outside_errors(shown, settings):
                connection.request("GET", _target(hop), headers={"User-Agent": "x-ray-classification", **headers})
                answer = connection.getresponse()
            with closing(answer):
                if answer.status not in REDIRECTS:
                    yield answer
                    return
                location = answer.headers.get("Location", "")
        try:
            url = urljoin(url, location)
        except ValueError:
            location = ""
        if not location:
            raise SourceError(f"source: {shown} is redirected to nowhere; ask its owner for a new link")
    raise SourceError(f"source: {shown} is redirected more than {MAX_REDIRECTS} times; ask its owner for a new link")


def read_pieces(answer: http.client.HTTPResponse, shown: str, settings: IngestionSettings) -> Iterator[bytes]:
    """The body of an answer as it comes, in pieces of at most 64 KiB: what has arrived never waits for more.

    Raises:
        OutsideError: If the connection is cut or silent before the announced length is there.
    """
    expected = answer.length
    n_read = 0
    while expected is None or n_read < expected:
        with _outside_errors(shown, settings):
            piece = answer.read1(PIECE if expected is None else min(PIECE, expected - n_read))
        if not piece:
            break
        n_read += len(piece)
        yield piece
    if expected is not None and n_read < expected:
        raise OutsideError("the connection was cut")


def refuse_size(size: int, what: str, settings: IngestionSettings) -> None:
    """Raises SourceError when more bytes come than an archive may unpack to: a server could send without end."""
    if size > settings.max_unpacked_gb * 1e9:
        raise SourceError(
            f"source: {what} is larger than ingestion.max_unpacked_gb = {settings.max_unpacked_gb:g} GB; "
            "raise it if that is right"
        )


class _PinnedConnection(http.client.HTTPSConnection):
    """Connects to an address that was checked, while TLS verifies the name of the host."""

    def __init__(self, hop: SplitResult, addresses: list[str], context: ssl.SSLContext, timeout_s: float) -> None:
        super().__init__(hop.hostname or "", hop.port or 443, timeout=timeout_s, context=context)
        self._addresses = addresses
        self._tls = context

    def connect(self) -> None:
        """Tries the addresses in turn; raises the last one's error."""
        for i, address in enumerate(self._addresses):
            try:
                plain = socket.create_connection((address, self.port), self.timeout)
                break
            except OSError:
                if i == len(self._addresses) - 1:
                    raise
        try:
            self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise


def _checked_hop(url: str, shown: str, n_hops: int, settings: IngestionSettings) -> SplitResult:
    verb = "is redirected to" if n_hops else "names"
    try:
        hop = urlsplit(url)
        host, _ = hop.hostname or "", hop.port
    except ValueError:
        raise SourceError(f"source: {shown} {verb} an address that cannot be read; correct the link") from None
    if hop.scheme != "https":
        raise SourceError(f"source: {shown} {verb} a {hop.scheme or 'bare'} address; only https links are fetched")
    if hop.username or hop.password:
        raise SourceError(f"source: {shown} {verb} an address with a user name in it; use a link without one")
    if not is_allowed(host, settings.allowed_hosts):
        raise SourceError(
            f"source: {shown} {verb} the host {host!r}, which is not in ingestion.allowed_hosts; "
            "add it there if you trust it"
        )
    return hop


def is_allowed(host: str, allowed: tuple[str, ...]) -> bool:
    """Whether a list of hosts names this one; ``*.`` in front stands for any subdomain, not the domain itself."""
    patterns = [pattern.lower() for pattern in allowed]
    return host in patterns or any(p.startswith("*.") and host.endswith(p[1:]) and host != p[1:] for p in patterns)


def _checked_addresses(hop: SplitResult, shown: str, settings: IngestionSettings) -> list[str]:
    """All addresses of a host; none may lead into a private network unless the list names the host itself."""
    host = hop.hostname or ""
    with _outside_errors(shown, settings):
        try:
            found = socket.getaddrinfo(host, hop.port or 443, type=socket.SOCK_STREAM)
        except UnicodeError:
            raise OutsideError("the name of its host cannot be looked up") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if host not in [name.lower() for name in settings.allowed_hosts]:
        for address in addresses:
            if not is_public(address):
                raise SourceError(
                    f"source: {shown} leads to {host!r} at the private address {address}; "
                    "name that very host in ingestion.allowed_hosts if that is right"
                )
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also when an IPv4 address is wrapped in it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else ip.ipv4_mapped or ip.sixtofour
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _target(hop: SplitResult) -> str:
    """Path and query as they are; what a request line cannot hold is escaped."""
    target = (hop.path or "/") + (f"?{hop.query}" if hop.query else "")
    return quote(target, safe=string.punctuation, errors="replace")


@contextmanager
def _outside_errors(shown: str, settings: IngestionSettings) -> Iterator[None]:
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise SourceError(
            f"source: {shown} answers with a certificate that does not hold ({error.verify_message}); "
            "name its authority in ingestion.ca_file if you trust it"
        ) from None
    except TimeoutError:
        raise OutsideError(f"silent for {settings.timeout_s:g} s") from None
    except socket.gaierror:
        raise OutsideError("the name of its host was not found") from None
    except (OSError, http.client.HTTPException) as error:
        # The text of these errors may quote what was sent; their kind says enough.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise OutsideError(f"the connection failed: {reason}") from None


# -- showing how far it is ---------------------------------------------------------------------------------------------


class Meter:
    """How far a fetch is: a line at each quarter or every 10 s, a progress artifact, and a bar on a terminal."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._artifact: Progress | None = None
        self._bar: Any = None
        self._quarter = 0
        self._line_at = self._artifact_at = time.monotonic()

    def show(self, done: int, total: int | None) -> None:
        """Moves to ``done`` of ``total`` bytes; ``None`` where the server does not say."""
        now = time.monotonic()
        if self._artifact is None:
            self._artifact = Progress(f"fetch-{self._what}", f"Fetching {self._what}")
            self._quarter = 4 * done // max(total or 0, 1) if total else 0
            self._bar = _bar(self._what, total)
        if total and (now - self._artifact_at >= 2 or done >= total):
            self._artifact.show(done, total)
            self._artifact_at = now
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
        quarter = 4 * done // total if total else 0
        self._quarter = min(self._quarter, quarter)  # after starting over
        if quarter > self._quarter or now - self._line_at >= 10:
            self._quarter, self._line_at = quarter, now
            print(
                f"fetched {done / 1e6:,.1f} of {total / 1e6:,.1f} MB of {self._what} ({100 * done // total} %)"
                if total
                else f"fetched {done / 1e6:,.1f} MB of {self._what}"
            )

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()


def _bar(what: str, total: int | None) -> Any:
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(total=total, unit="B", unit_scale=True, desc=what, leave=False)
