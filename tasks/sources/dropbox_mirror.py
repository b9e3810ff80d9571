"""A private Dropbox folder mirrored on this machine, or one zip of it, through the ``dropbox`` package.

List, decide, fetch. Each file is requested by its revision and checked against Dropbox's content hash before it enters
the mirror.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dropbox  # type: ignore[import-untyped]
import requests
from dropbox import exceptions as refused
from dropbox.content_hash import DropboxContentHasher  # type: ignore[import-untyped]
from dropbox.files import FileMetadata  # type: ignore[import-untyped]
from dropbox.stone_validators import ValidationError  # type: ignore[import-untyped]
from urllib3.util import Retry

from tasks.addresses import is_archive
from tasks.errors import OutsideError, RunError, SourceError
from tasks.files import locked, read_json, room_in, write_json
from tasks.runs.artifacts import show_bytes
from tasks.runs.manifest import image_id
from tasks.settings import IngestionSettings
from tasks.sources.share_link import kept_in, refuse_size, tls_context

LONGEST_PAUSE_S = 60
"""Longest pause between two tries of a request; a server that asks for more fails the fetch, which is then retried."""
N_NAMED = 20
WAYS_OUT = {
    "not_found": "check the address; an app with a folder of its own sees nothing else",
    "malformed_path": "check the address",
    "reset": "it was changed while it was listed; run again",
}


@dataclass(frozen=True)
class RemoteFile:
    """One version of a file in Dropbox: revision, size in bytes, Dropbox's content hash."""

    rev: str
    size: int
    content_hash: str


def fetch_dropbox_folder(address: str, folder: Path, settings: IngestionSettings) -> Path:
    """Mirrors ``dropbox:/path/in/dropbox`` on this machine; fetches only what is new or changed.

    Args:
        address: A folder, or a single archive.
        folder: Holds a folder for the mirror, named by the hash of the address.
        settings: ``dropbox_block``, ``n_connections``, timeout, tries of a request, and limits. Without a block the
            token is read from the environment variable ``DROPBOX_TOKEN``.

    Returns:
        The local folder, or the zip; its name is the last part of the address.

    Raises:
        SourceError: If there is no token or Dropbox refuses it, the address does not exist or holds nothing, a limit is
            exceeded, or the files cannot be kept.
        DiskError: If there is no room for it.
        OutsideError: If Dropbox keeps failing; fetched files are kept.
    """
    path = [part for part in address.removeprefix("dropbox:").split("/") if part]
    root = "".join(f"/{part}" for part in path)
    shown = f"dropbox:{root or '/'}"
    for part in path:
        _refuse_name(part, shown)
    place = folder / hashlib.sha256(shown.lower().encode(errors="surrogatepass")).hexdigest()[:16]
    with kept_in(place, shown), locked(folder / f".{place.name}.lock"), _open_client(settings) as client:
        is_file, remote = _list_files(client, root, shown, settings)
        refuse_size(sum(file.size for file in remote.values()), shown, settings)
        files = place / "files" if is_file else place / "files" / (path[-1] if path else "dropbox")
        new, vanished = plan_mirror(remote, _read_hashes(place / "index.json", files))
        _remove_files(files, vanished, shown)
        with room_in(place, sum(remote[name].size for name in new)):
            get = partial(_ask, shown, client.files_download_to_file)
            _fetch_files(get, {name: remote[name] for name in new}, files, place / "parts", settings)
        write_json(place / "index.json", {n: [file.content_hash, *_stamp(files / n)] for n, file in remote.items()})
        print(f"{shown}: {len(new):,} files fetched, {len(remote) - len(new):,} unchanged and not fetched again")
        return files / next(iter(remote)) if is_file else files


def plan_mirror(remote: Mapping[str, RemoteFile], held: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Names to fetch and names to remove, both sorted, from Dropbox's files and the content hashes of the mirror."""
    new = [name for name, file in remote.items() if held.get(name) != file.content_hash]
    return sorted(new), sorted(held.keys() - remote.keys())


def content_hash(path: Path) -> str:
    """Dropbox's content hash of a file, 64 hex digits."""
    hasher = DropboxContentHasher()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            hasher.update(piece)
    return str(hasher.hexdigest())


def read_token(settings: IngestionSettings) -> str:
    """The token, from the Prefect Secret block that the settings name, else from ``DROPBOX_TOKEN``.

    Raises:
        SourceError: If there is none, or its text cannot be a token.
    """
    ways = "make a Prefect Secret block with the token and name it with ingestion.dropbox_block, or set DROPBOX_TOKEN"
    name, value = settings.dropbox_block, os.environ.get("DROPBOX_TOKEN", "")
    if name:
        from prefect.blocks.system import Secret

        load: Callable[[str], Any] = Secret.load
        try:
            value = load(name).get()
        except ValueError:
            raise SourceError(f"ingestion.dropbox_block: there is no Secret block {name!r}; {ways}") from None
    token = value.strip() if isinstance(value, str) else ""
    if not (token and token.isascii() and token.isprintable() and " " not in token):
        where = f"the Secret block {name!r}" if name else "DROPBOX_TOKEN"
        raise SourceError(f"source: dropbox: needs a token, one line, and {where} holds none; {ways}")
    return token


# -- the mirror --------------------------------------------------------------------------------------------------------


def _fetch_files(
    get: Callable[[str, str], Any],
    wanted: Mapping[str, RemoteFile],
    files: Path,
    parts: Path,
    settings: IngestionSettings,
) -> None:
    """Fetches files, some at a time; a failed one does not stop the others until as many failed as run at a time."""
    shutil.rmtree(parts, ignore_errors=True)  # of a run that was killed
    parts.mkdir()

    def fetch(name: str) -> int:
        part = parts / hashlib.sha256(name.encode()).hexdigest()
        for left in reversed(range(settings.tries)):
            try:
                _get_checked(get, wanted[name], part)
                break
            except OutsideError:
                if not left or not part.exists():  # no content came, after the retries below
                    raise
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, files / name)
        return wanted[name].size

    n_bytes, failed, n_connections = 0, list[OutsideError](), settings.n_connections
    show, total = show_bytes("Dropbox: fetched"), sum(file.size for file in wanted.values())
    with ThreadPoolExecutor(n_connections, "dropbox") as pool:
        waiting: set[Future[int]] = {pool.submit(fetch, name) for name in wanted}
        try:
            while waiting and len(failed) < n_connections:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
                for future in done:
                    try:
                        n_bytes += future.result()
                    except OutsideError as error:
                        failed.append(error)
                show(n_bytes + sum(map(_size, parts.iterdir())), total)
        finally:
            pool.shutdown(cancel_futures=True)
    shutil.rmtree(parts, ignore_errors=True)
    if failed:
        raise max(failed, key=lambda error: error.retry_after_s)


def _get_checked(get: Callable[[str, str], Any], file: RemoteFile, part: Path) -> None:
    get(str(part), f"rev:{file.rev}")
    if content_hash(part) != file.content_hash:
        raise OutsideError("source: a file came from Dropbox that is not what its content hash says; run again")


def _read_hashes(index: Path, files: Path) -> dict[str, str]:
    """Content hashes of the mirror: from the index where size and time match, else from the file."""
    try:
        known = read_json(index)
    except RunError:
        known = {}
    held = {}
    for path in (path for path in files.rglob("*") if path.is_file()):
        name = path.relative_to(files).as_posix()
        recorded = known.get(name, [""])
        held[name] = recorded[0] if recorded[1:] == _stamp(path) else content_hash(path)
    return held


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):  # it was just moved into the mirror
        return path.stat().st_size
    return 0


def _remove_files(files: Path, names: Sequence[str], shown: str) -> None:
    for name in names:
        (files / name).unlink()
        for folder in (files / name).parents:
            if folder == files or any(folder.iterdir()):
                break
            folder.rmdir()
    if names:
        more = f" and {len(names) - N_NAMED:,} more" if len(names) > N_NAMED else ""
        listed = ", ".join(map(image_id, names[:N_NAMED]))  # a file's name may be that of a patient
        print(f"{len(names):,} files are gone from {shown} and removed here: {listed}{more}")


def _refuse_name(name: str, shown: str) -> None:
    if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise SourceError(f"source: {shown} holds the name {name!r}, which leads out of the folder; rename it")


# -- Dropbox -----------------------------------------------------------------------------------------------------------


def _open_client(settings: IngestionSettings) -> Any:
    """The Dropbox client of the token.

    urllib3 retries, below the package: the package's own retries wait as long as a server asks, and do not cover
    connections that break.
    """
    tls_context(settings)  # raises our own error for a bad ca_file
    session = dropbox.create_session(max_connections=settings.n_connections, ca_certs=settings.ca_file)
    session.trust_env = False  # ignores .netrc; with it, requests would ignore the proxies too
    session.proxies = requests.utils.get_environ_proxies("https://api.dropboxapi.com")
    session.max_redirects = 0
    session.get_adapter("https://").max_retries = Retry(
        settings.tries - 1,
        other=0,  # an invalid certificate, a closed port
        allowed_methods=None,
        status_forcelist=(429, 500, 502, 503, 504),
        backoff_factor=settings.backoff_s,
        backoff_max=LONGEST_PAUSE_S,
        retry_after_max=LONGEST_PAUSE_S,
        raise_on_status=False,
    )
    own = {"max_retries_on_error": 0, "max_retries_on_rate_limit": 0}
    return dropbox.Dropbox(read_token(settings), session=session, timeout=settings.timeout_s, **own)


def _list_files(client: Any, root: str, shown: str, settings: IngestionSettings) -> tuple[bool, dict[str, RemoteFile]]:
    """Whether the address is a file, and its files: those below a folder by relative name."""
    base = root
    if root:
        found = _ask(shown, client.files_get_metadata, root)
        if isinstance(found, FileMetadata):
            if not is_archive(found.name):
                raise SourceError(f"source: {shown} is a file, but not a .zip or .tar.gz; name a folder or such a file")
            _refuse_name(found.name, shown)
            return True, {found.name: _remote_file(found)}
        base = found.path_lower or root.lower()
    # A later page may replace or delete what an earlier one listed: the last entry of a path counts.
    entries: dict[str, Any] = {}
    page = _ask(shown, client.files_list_folder, root, recursive=True, include_non_downloadable_files=False)
    while True:
        entries |= {entry.path_lower: entry for entry in page.entries if entry.path_lower}
        files = {path: entry for path, entry in entries.items() if isinstance(entry, FileMetadata)}
        if len(files) > settings.max_members:
            limit = f"ingestion.max_members = {settings.max_members:,}"
            raise SourceError(f"source: {shown} holds more files than {limit}; raise it if that is right")
        if not page.has_more:
            break
        page = _ask(shown, client.files_list_folder_continue, page.cursor)
    if not files:
        raise SourceError(f"source: {shown} holds no files; check the address")
    return False, {_name_of(path, base, entries, shown): _remote_file(entry) for path, entry in files.items()}


def _remote_file(entry: Any) -> RemoteFile:
    return RemoteFile(entry.rev, entry.size, entry.content_hash or "")


def _name_of(path: str, base: str, entries: Mapping[str, Any], shown: str) -> str:
    """The name of a file relative to ``base``, its folders spelled as their own entries spell them.

    Dropbox guarantees the case of the last part of a path only, and a mirror must not split a folder in two for that.
    """
    names = []
    for part in path[len(base) :].strip("/").split("/"):
        base = f"{base}/{part}"
        names.append(entries[base].name if base in entries else part)
        _refuse_name(names[-1], shown)
    return "/".join(names)


def _ask(shown: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls the package; turns its errors into ours, without its own text, which may quote what was sent."""
    later, wait_s = "", 0.0
    try:
        return call(*args, **options)
    except refused.RateLimitError as error:
        later, wait_s = "it answered 429", float(error.backoff or 0)
    except refused.InternalServerError as error:
        later = f"it answered {error.status_code}"
    except refused.AuthError:
        needed = "it needs the permissions files.metadata.read and files.content.read"
        raise SourceError(
            f"source: the token for {shown} is not accepted or has expired; make a new one, {needed}"
        ) from None
    except refused.ApiError as error:
        tag = getattr(error.error, "_tag", None) or "unknown"
        tag = getattr(error.error.get_path(), "_tag", tag) if tag == "path" else tag
        way_out = WAYS_OUT.get(tag, "check it in Dropbox and run again")
        raise SourceError(f"source: {shown} is refused by Dropbox ({tag}): {way_out}") from None
    except refused.HttpError as error:
        raise SourceError(f"source: {shown} answered {error.status_code}; check the address and token") from None
    except requests.RequestException as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise SourceError(
                f"source: {shown} answers with an invalid certificate; "
                "name its authority in ingestion.ca_file if you trust it"
            ) from None
        later = type(error).__name__
    except (AssertionError, KeyError, TypeError, ValueError, ValidationError) as error:
        later = f"the answer is not one of Dropbox: {type(error).__name__}"
    raise OutsideError(f"source: {shown} did not arrive ({later}); try again later, what was fetched is kept", wait_s)
