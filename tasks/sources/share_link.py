"""The file behind an https link, such as a Dropbox share: fetched whole, resumed when cut off, never mixed.

A record beside the file holds its ETag and size. A part is resumed only if a strong ETag proves that the server still
has the same file (RFC 9110: Range, If-Range); otherwise it is fetched from the start.
"""

import json
import logging
import os
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import certifi
import httpx

from tasks.addresses import hide_keys, without_ending
from tasks.errors import OutsideError, SourceError
from tasks.files import is_full, locked, room_in, sha256_of_file, write_json
from tasks.runs.artifacts import show_bytes
from tasks.settings import IngestionSettings
from tasks.sources.archives import looks_like_archive

PROGRESS = 1_000_000
"""Bytes. A connection that brought as many before it was cut does not count as a failed try."""
RETRIED = (408, 425, 429)
WAYS_OUT = {
    401: "the link is not shared publicly or has expired; ask its owner for a new one",
    403: "the link is not shared publicly or has expired; ask its owner for a new one",
    404: "nothing is there; check the link, or ask its owner for a new one",
    410: "what was there has been removed; ask its owner for a new link",
}
for name in ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy"):
    # These loggers print addresses with their keys. Prefect sets up logging again, which changes levels, but no filter.
    logging.getLogger(name).addFilter(lambda record: False)


def fetch_link(url: str, folder: Path, settings: IngestionSettings) -> Path:
    """Fetches the file behind an https link; resumes what an earlier call, even a killed one, began.

    Args:
        url: The link; of a Dropbox share only ``dl`` is changed, to 1.
        folder: Holds a folder for the file, named by the hash of the link.
        settings: Hosts, certificate authority, timeout, and the expected sha256.

    Returns:
        The whole file, its name ending like an archive's. It is not fetched again if the server says that it is
        unchanged, or if it has the expected sha256.

    Raises:
        SourceError: If the link or a redirect is refused, the server refuses, the file is no archive or not the
            expected one, or it cannot be kept.
        DiskError: If there is no room for it.
        OutsideError: If a retry may help.
    """
    link = direct_link(url)
    whole = folder / sha256(str(link).encode()).hexdigest()[:16] / _file_name(link.path)
    with kept_in(whole.parent, hide_keys(url)), locked(folder / f".{whole.parent.name}.lock"):
        return _Fetch(link, whole, settings).run()


@contextmanager
def kept_in(folder: Path, shown: str) -> Iterator[None]:
    """Makes a folder for fetched files; SourceError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if is_full(error):  # room_in reports how much was needed
            raise
        reason = error.strerror or error
        raise SourceError(
            f"source: {shown} cannot be kept in {folder} ({reason}); check path and permissions or set storage.raw"
        ) from None


def direct_link(url: str) -> httpx.URL:
    """The link that downloads: a Dropbox share with ``dl=1``, any other link as it is; without its fragment.

    Raises:
        SourceError: If it cannot be read as a link.
    """
    try:
        link = httpx.URL(url).copy_with(fragment=None)
        is_share = link.host in ("dropbox.com", "www.dropbox.com") or re.match(r"/(s|sh|scl)/", link.path)
    except (httpx.InvalidURL, ValueError):
        raise SourceError("source: the link cannot be read; copy it again") from None
    return link.copy_set_param("dl", "1") if is_share else link


def is_allowed(host: str, allowed: tuple[str, ...]) -> bool:
    """Whether a list of hosts names this one; a leading ``*.`` stands for any subdomain, not the domain itself."""
    patterns = [pattern.lower() for pattern in allowed]
    return host in patterns or any(p.startswith("*.") and host.endswith(p[1:]) and host != p[1:] for p in patterns)


def retry_after_s(value: str | None) -> float:
    """Seconds of a ``Retry-After`` header, a number or a date (RFC 9110, 10.2.3); 0 without a usable one."""
    with suppress(ValueError, TypeError, OverflowError):
        if value and value.strip().isdecimal():
            return float(value)
        return max(0.0, parsedate_to_datetime(value or "").timestamp() - time.time())
    return 0.0


def tls_context(settings: IngestionSettings) -> ssl.SSLContext:
    """The TLS context: trusts the authority of ``ca_file`` alone, else the public ones; SourceError if unreadable."""
    try:
        return ssl.create_default_context(cafile=settings.ca_file or certifi.where())
    except OSError as error:
        raise SourceError(
            f"ingestion.ca_file: {settings.ca_file} cannot be read as PEM ({error.strerror}); "
            "name a file with the authority's certificate"
        ) from None


def refuse_size(size: int, shown: str, settings: IngestionSettings) -> None:
    """Raises SourceError for more bytes than an archive may unpack to: a server could send without end."""
    if size > settings.max_unpacked_gb * 1e9:
        raise SourceError(
            f"source: {shown} is larger than ingestion.max_unpacked_gb = {settings.max_unpacked_gb:g} GB; "
            "raise it if that is right"
        )


class _Fetch:
    """One link and its files: ``x.zip``, ``x.zip.part``, and a JSON record with etag and total of each."""

    def __init__(self, link: httpx.URL, whole: Path, settings: IngestionSettings) -> None:
        self._link, self._whole, self._settings = link, whole, settings
        self._part = whole.with_name(whole.name + ".part")
        self._shown = hide_keys(str(link))

    def run(self) -> Path:
        started = _read_record(self._part)
        if started.get("total") == self._size_of_part():  # killed just before the part was renamed
            with suppress(SourceError):
                self._keep()
        expected = self._settings.sha256
        if expected and self._whole.is_file() and sha256_of_file(self._whole) == expected:
            return self._reuse("has the expected checksum")
        with httpx.Client(
            verify=tls_context(self._settings),
            timeout=self._settings.timeout_s,
            follow_redirects=True,
            max_redirects=10,
            event_hooks={"request": [self._check_hop]},
        ) as client:
            while True:
                before = self._size_of_part()
                try:
                    return self._ask(client)
                except OutsideError as error:
                    if error.retry_after_s or self._size_of_part() < before + PROGRESS:
                        raise

    def _ask(self, client: httpx.Client) -> Path:
        """Sends one request; reports only the type of an httpx error, since its text may quote what was sent."""
        kept, started, offset = self._kept_record(), _read_record(self._part), self._size_of_part()
        etag, total = started.get("etag") or "W/", started.get("total") or 0
        headers = {"Accept-Encoding": "identity"} | ({"If-None-Match": kept["etag"]} if kept.get("etag") else {})
        if not etag.startswith("W/") and 0 < offset < total:
            headers |= {"Range": f"bytes={offset}-", "If-Range": etag}
        try:
            with client.stream("GET", self._link, headers=headers) as answer:
                found = {"etag": answer.headers.get("ETag"), "total": answer.headers.get("Content-Length")}
                found["total"] = int(found["total"]) if found["total"] else None
                if kept.get("etag") and (answer.status_code == 304 or (answer.status_code == 200 and found == kept)):
                    return self._reuse("has not changed")
                span = ("Range" in headers, answer.headers.get("Content-Range"), found["etag"])
                if answer.status_code in (206, 416) and span != (True, f"bytes {offset}-{total - 1}/{total}", etag):
                    self._drop_part()
                    raise self._outside("the server sent another part than the one asked for")
                self._refuse_answer(answer)
                if answer.status_code == 200:
                    if offset:
                        print(f"{self._shown} has changed or cannot be resumed; starting over")
                    self._drop_part()  # its record first: after a kill, a part without a record is not resumed
                    write_json(_beside(self._part), found)
                    started, offset = found, 0
                self._receive(answer, started["total"], offset)
        except httpx.TooManyRedirects:
            raise SourceError(f"source: {self._shown} is redirected too often; ask its owner for a new link") from None
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise SourceError(
                    f"source: {self._shown} answers with an invalid certificate; "
                    "name its authority in ingestion.ca_file if you trust it"
                ) from None
            raise self._outside(type(error).__name__) from None
        return self._keep()

    def _receive(self, answer: httpx.Response, total: int | None, offset: int) -> None:
        """Appends the body to the part, piece by piece, so that a kill loses little."""
        done, show = offset, show_bytes(f"{self._whole.name}: fetched", offset)
        try:
            refuse_size(total or 0, self._shown, self._settings)
            with room_in(self._part.parent, total and total - offset), self._part.open("ab") as out:
                for piece in answer.iter_raw():
                    out.write(piece)
                    out.flush()
                    done += len(piece)
                    refuse_size(done, self._shown, self._settings)
                    show(done, total or done)
        except SourceError:  # too large: the part is useless
            self._drop_part()
            raise
        if done != (total or done):
            raise self._outside(f"{done:,} of {total:,} bytes came")

    def _keep(self) -> Path:
        """Makes the part the whole file, if it is a zip with the expected checksum."""
        expected, refused = self._settings.sha256, None
        if not looks_like_archive(self._part):
            refused = f"source: {self._shown} holds no zip or tar archive, or one cut short; check the link"
        elif expected and (found := sha256_of_file(self._part)) != expected:
            refused = (
                f"ingestion.sha256: {self._shown} has {found}, not the expected {expected}; "
                "ask its owner whether the file was replaced, or correct the setting"
            )
        if refused:
            self._drop_part()
            raise SourceError(refused)
        _beside(self._whole).unlink(missing_ok=True)
        os.replace(self._part, self._whole)
        os.replace(_beside(self._part), _beside(self._whole))
        print(f"fetched {self._shown}: {self._whole.stat().st_size / 1e6:,.1f} MB")
        return self._whole

    def _reuse(self, reason: str) -> Path:
        print(f"{self._shown} {reason}: not fetched again")
        self._drop_part()
        return self._whole

    def _kept_record(self) -> dict[str, Any]:
        """The record of the whole file; empty if the file is damaged or not the expected one."""
        record = _read_record(self._whole)
        is_whole = self._whole.is_file() and record.get("total") in (None, self._whole.stat().st_size)
        return record if is_whole and not self._settings.sha256 else {}

    def _size_of_part(self) -> int:
        return self._part.stat().st_size if self._part.is_file() else 0

    def _drop_part(self) -> None:
        _beside(self._part).unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)

    def _outside(self, reason: str, wait_s: float = 0.0) -> OutsideError:
        message = f"source: {self._shown} did not arrive ({reason}); try again later, what was fetched is kept"
        return OutsideError(message, wait_s)

    def _check_hop(self, request: httpx.Request) -> None:
        """Refuses a link or redirect to a host or scheme that is not allowed, before anything is sent there."""
        url, refused = request.url, None
        if url.scheme != "https":
            refused = f"a {url.scheme} address; only https links are fetched"
        elif url.userinfo:
            refused = "an address with a user name in it; use a link without one"
        elif not is_allowed(url.host, self._settings.allowed_hosts):
            refused = f"the host {url.host!r}, which is not in ingestion.allowed_hosts; add it there if you trust it"
        if refused:
            raise SourceError(f"source: {self._shown} leads to {refused}")

    def _refuse_answer(self, answer: httpx.Response) -> None:
        """Raises for an answer that does not bring the file."""
        status, headers, refused = answer.status_code, answer.headers, None
        if status in RETRIED or status >= 500:
            raise self._outside(f"it answered {status}", retry_after_s(headers.get("Retry-After")))
        if status not in (200, 206):
            refused = f"answered {status}: {WAYS_OUT.get(status, 'check the link, or ask its owner for a new one')}"
        elif "html" in headers.get("Content-Type", "").lower():
            refused = (
                "is answered with a web page instead of a file; open the link in a browser where nobody is logged in, "
                "and ask its owner for one that downloads"
            )
        elif headers.get("Content-Encoding", "identity").lower() != "identity":
            refused = "is sent in a compressed form; ask for a link to the plain file"
        if refused:
            raise SourceError(f"source: {self._shown} {refused}")


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_record(path: Path) -> dict[str, Any]:
    """``etag`` and ``total`` bytes of a file, from the server; empty if there is no readable record."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        record = json.loads(_beside(path).read_text())
        return {name: record[name] for name in ("etag", "total")}
    return {}


def _file_name(path: str) -> str:
    last = path.rstrip("/").split("/")[-1]
    ending = last[len(without_ending(last)) :] or ".zip"
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in without_ending(last)).strip("-.")
    return (name[:80] or "archive") + ending
