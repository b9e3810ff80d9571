"""The file behind an https link, such as a Dropbox share: fetched whole, gone on with when cut, never spliced.

Beside the file lies what the server said of it (ETag, date, size). A part is gone on with only where a validator proves
that the server still has the same file (RFC 9110: Range, If-Range); in all doubt it is fetched from the start.
"""

import http.client
import json
import os
import re
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from tasks.records import SourceError
from tasks.room import is_full, room_in
from tasks.settings import IngestionSettings
from tasks.storage import locked, sha256_of_file, write_json
from tasks.web_requests import (
    Meter,
    OutsideError,
    keep_trying,
    open_link,
    read_pieces,
    refuse_size,
    retry_after_s,
    shown_link,
    tls_context,
)

WAYS_OUT = {
    401: "the link is not shared publicly or has expired; ask its owner for a new one",
    403: "the link is not shared publicly or has expired; ask its owner for a new one",
    404: "nothing is there; check the link, or ask its owner for a new one",
    410: "what was there has been removed; ask its owner for a new link",
}
RETRIED = (408, 425, 429)


def fetch_link(url: str, folder: Path, settings: IngestionSettings) -> Path:
    """Brings the file behind an https link to this machine; goes on where an earlier try, even a killed one, stopped.

    Args:
        url: The link; of a Dropbox share only ``dl`` is changed, to 1.
        folder: Where it is kept, in a folder of its own named by the hash of the link.
        settings: Hosts, certificate authority, timeout, tries, and the expected sha256.

    Returns:
        The whole file, its name ending in ``.zip``. One that the server says is unchanged is not fetched again, nor is
        one that has the expected sha256.

    Raises:
        SourceError: If the link or a redirect is refused, the server says no, the file is no zip or not the expected
            one, it cannot be kept, or ``settings.tries`` attempts in a row brought nothing.
        DiskError: If there is no room for it.
    """
    link = direct_link(url)
    key = sha256(link.encode(errors="surrogatepass")).hexdigest()[:16]
    name = _file_name(urlsplit(link).path)
    try:
        (folder / key).mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{key}.lock"):
            return _Fetch(link, folder / key / name, settings).run()
    except OSError as error:
        if is_full(error):  # told by whoever knows what was needed
            raise
        raise SourceError(
            f"source: {shown_link(link)} cannot be kept in {folder} ({error.strerror or error}); "
            "check path and rights or set storage.raw"
        ) from None


def direct_link(url: str) -> str:
    """The link that downloads: of a Dropbox share the same with ``dl=1``, every other link as it is, without fragment.

    Raises:
        SourceError: If it cannot be read as a link.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise SourceError("source: the link cannot be read; copy it again") from None
    query = parts.query
    host = parts.netloc.rpartition("@")[2].partition(":")[0].lower()
    if host in ("dropbox.com", "www.dropbox.com") or re.match(r"/(s|sh|scl)/", parts.path):
        fields = [field for field in query.split("&") if field]
        is_dl = [field.partition("=")[0] == "dl" for field in fields]
        fields = ["dl=1" if dl else field for field, dl in zip(fields, is_dl, strict=True)]
        query = "&".join(fields if any(is_dl) else [*fields, "dl=1"])
    return urlunsplit((parts.scheme, parts.netloc, parts.path, query, ""))


@dataclass(frozen=True)
class Version:
    """What a server says of a file: enough to know it again.

    Attributes:
        etag: The ``ETag`` header.
        modified: The ``Last-Modified`` header.
        total: Size in bytes.
        validator: What proves, byte for byte, that a part belongs to this version (for ``If-Range``).
    """

    etag: str | None
    modified: str | None
    total: int | None
    validator: str | None

    def is_same(self, other: "Version") -> bool:
        """Whether both are the same file as far as the server tells; unknown is not the same."""
        if self.total is None or self.total != other.total:
            return False
        if self.etag or other.etag:
            return _opaque(self.etag) == _opaque(other.etag)
        return self.modified is not None and self.modified == other.modified


def version_of(answer: http.client.HTTPResponse) -> Version:
    """Reads the version off a 200 answer."""
    etag, modified = answer.headers.get("ETag"), answer.headers.get("Last-Modified")
    if etag:
        validator = None if etag.startswith("W/") else etag
    else:
        validator = modified if _is_strong_date(modified, answer.headers.get("Date")) else None
    return Version(etag, modified, answer.length, validator)


class _Fetch:
    """One link and the files it is kept in: ``x.zip``, ``x.zip.part``, and a JSON with the version of each."""

    def __init__(self, link: str, whole: Path, settings: IngestionSettings) -> None:
        self._link = link
        self._shown = shown_link(link)
        self._settings = settings
        self._context = tls_context(settings)
        self._whole = whole
        self._part = whole.with_name(whole.name + ".part")
        self._most = self._size_of_part()  # what an attempt that starts over has to pass to count as progress
        self._meter = Meter(whole.name)

    def run(self) -> Path:
        started = _read_version(self._part)
        if started and started.validator and started.total == self._size_of_part():
            # Killed between the last byte and the renaming; whether it is still current is asked below.
            with suppress(SourceError):
                self._keep(started)
        if self._settings.sha256 and self._whole.is_file() and sha256_of_file(self._whole) == self._settings.sha256:
            return self._reuse("has the expected checksum")
        try:
            return keep_trying(self._attempt, self._shown, self._settings)
        finally:
            self._meter.close()

    def _attempt(self) -> Path:
        while True:
            done = self._ask()
            if done is not None:
                return done
            print(f"{self._shown}: what the server has now does not fit the part at hand; starting over")
            self._drop_part()

    def _ask(self) -> Path | None:
        """One request; ``None`` when the part at hand cannot be gone on with."""
        kept, started, offset = self._kept_version(), _read_version(self._part), self._size_of_part()
        headers = {}
        if kept and kept.etag:
            headers["If-None-Match"] = kept.etag
        elif kept and kept.modified:
            headers["If-Modified-Since"] = kept.modified
        if started and started.validator and started.total and 0 < offset < started.total:
            headers |= {"Range": f"bytes={offset}-", "If-Range": started.validator}
        elif offset:
            self._drop_part()
        with open_link(self._link, headers, self._settings, self._context) as answer:
            if answer.status == 304 and kept:
                return self._reuse("has not changed")
            if answer.status == 416 and "Range" in headers:
                return None
            self._refuse_answer(answer)
            if answer.status == 206:
                if started is None or "Range" not in headers:
                    raise OutsideError("answered with a part that was not asked for")
                if not _fits(answer, started, offset):
                    return None
                self._receive(answer, started, offset)
                return self._keep(started)
            version = version_of(answer)
            if kept and kept.is_same(version):
                return self._reuse("has not changed")
            if "Range" in headers:
                print(f"{self._shown} has changed or cannot be gone on with; starting over")
            self._receive(answer, version, 0)
            if version.total is None and not answer.chunked and not zipfile.is_zipfile(self._part):
                raise OutsideError("the connection was cut")  # nothing else tells the end of such an answer
            return self._keep(version)

    def _receive(self, answer: http.client.HTTPResponse, version: Version, offset: int) -> None:
        done = offset
        if not offset:
            # The old version's record goes first and the new one's comes after the file is empty: a process killed in
            # between leaves a part without a record, which is never gone on with.
            self._drop_part()
        try:
            refuse_size(version.total or 0, self._shown, self._settings)
            needed = None if version.total is None else version.total - offset
            with room_in(self._part.parent, needed), self._part.open("ab") as out:
                if not offset:
                    write_json(_record(self._part), asdict(version))
                self._meter.show(done, version.total)
                for piece in read_pieces(answer, self._shown, self._settings):
                    out.write(piece)
                    done += len(piece)
                    refuse_size(done, self._shown, self._settings)
                    self._meter.show(done, version.total)
                out.flush()
                os.fsync(out.fileno())
            if version.total is not None and done != version.total:
                raise OutsideError(f"{done:,} of {version.total:,} bytes came")
        except OutsideError as error:
            error.progressed = done > (offset or self._most)
            raise
        except SourceError:  # too large: a part that will never be wanted
            self._drop_part()
            raise
        finally:
            self._most = max(self._most, done)

    def _keep(self, version: Version) -> Path:
        """Makes the part the whole file, if it is what was asked for."""
        if not zipfile.is_zipfile(self._part):
            self._drop_part()
            raise SourceError(f"source: {self._shown} holds no zip archive, or one cut short; check the link")
        expected = self._settings.sha256
        if expected and (found := sha256_of_file(self._part)) != expected:
            self._drop_part()
            raise SourceError(
                f"ingestion.sha256: {self._shown} has {found}, not the expected {expected}; "
                "ask its owner whether the file was replaced, or correct the setting"
            )
        _record(self._whole).unlink(missing_ok=True)
        os.replace(self._part, self._whole)
        write_json(_record(self._whole), asdict(version))
        _record(self._part).unlink(missing_ok=True)
        print(f"fetched {self._shown}: {self._whole.stat().st_size / 1e6:,.1f} MB")
        return self._whole

    def _reuse(self, reason: str) -> Path:
        print(f"{self._shown} {reason}: not fetched again")
        self._drop_part()
        return self._whole

    def _kept_version(self) -> Version | None:
        """The version of the whole file from an earlier run, unless it is not the one that is expected now."""
        version = _read_version(self._whole)
        if version is None or self._settings.sha256 or not self._whole.is_file():
            return None
        size = self._whole.stat().st_size
        return version if version.total in (None, size) else None

    def _size_of_part(self) -> int:
        return self._part.stat().st_size if self._part.is_file() else 0

    def _drop_part(self) -> None:
        _record(self._part).unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)

    def _refuse_answer(self, answer: http.client.HTTPResponse) -> None:
        """Raises for an answer that does not bring the file."""
        if answer.status not in (200, 206):
            self._refuse_status(answer)
        if answer.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            raise SourceError(
                f"source: {self._shown} is answered with a web page instead of a file; open the link in a browser "
                "where nobody is logged in, and ask its owner for one that downloads"
            )
        if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise SourceError(f"source: {self._shown} is sent in a compressed form; ask for a link to the plain file")

    def _refuse_status(self, answer: http.client.HTTPResponse) -> None:
        status = answer.status
        if status in RETRIED or status >= 500:
            raise OutsideError(f"answered {status}", retry_after_s(answer.headers.get("Retry-After")))
        way_out = WAYS_OUT.get(status, "check the link, or ask its owner for a new one")
        raise SourceError(f"source: {self._shown} answered {status}: {way_out}")


def _fits(answer: http.client.HTTPResponse, started: Version, offset: int) -> bool:
    """Whether a 206 goes on exactly where the part ends, in the same version of the file.

    An answer that does not repeat the validator is not believed: a server that ignores If-Range looks just like that.
    """
    span = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", answer.headers.get("Content-Range", ""))
    if span is None:
        return False
    first, last, total = (int(number) for number in span.groups())
    if (first, total) != (offset, started.total) or not first <= last < total:
        return False
    if answer.length not in (None, last - first + 1):
        return False
    return started.validator == (answer.headers.get("ETag") if started.etag else answer.headers.get("Last-Modified"))


def _is_strong_date(modified: str | None, date: str | None) -> bool:
    """Whether a date can prove that a file is the same: a minute old, so that no second change shares it (RFC 7232)."""
    try:
        return (parsedate_to_datetime(date or "") - parsedate_to_datetime(modified or "")).total_seconds() >= 60
    except (ValueError, TypeError):
        return False


def _opaque(etag: str | None) -> str | None:
    return etag.removeprefix("W/") if etag else None


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_version(path: Path) -> Version | None:
    """The version recorded beside a file; ``None`` where there is none that can be read."""
    try:
        return Version(**json.loads(_record(path).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _file_name(path: str) -> str:
    last = unquote(path.rstrip("/").split("/")[-1]).removesuffix(".zip")
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in last).strip("-.")[:80]
    return (name or "archive") + ".zip"
