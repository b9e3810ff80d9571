"""A private Dropbox folder mirrored on this machine, or one zip of it, through the ``dropbox`` package.

List, decide, fetch. Each file is asked for by its revision, so that a part always belongs to the version that was
listed, and is held against Dropbox's content hash before it takes its place.
"""

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tasks.layout import image_id
from tasks.records import DiskError, RunError, SourceError
from tasks.room import is_full
from tasks.settings import IngestionSettings
from tasks.storage import locked, read_json, write_json
from tasks.web_requests import Meter, OutsideError, keep_trying, refuse_size, tls_context

BLOCK = 4 << 20
PIECE = 1 << 16  # what a cut connection can lose at most
N_NAMED = 20


@dataclass(frozen=True)
class RemoteFile:
    """One version of a file in Dropbox: revision, size in bytes, Dropbox's content hash."""

    rev: str
    size: int
    content_hash: str


def fetch_dropbox_folder(address: str, folder: Path, settings: IngestionSettings) -> Path:
    """Mirrors ``dropbox:/path/in/dropbox`` on this machine; fetches only what is new or changed.

    Args:
        address: A folder, or a single ``.zip`` file.
        folder: Where it is kept, in a folder of its own named by the hash of the address.
        settings: ``dropbox_block``, ``n_connections``, timeout, tries and limits. Without a block the token is taken
            from the environment variable ``DROPBOX_TOKEN``.

    Returns:
        The local folder, or the zip; its name is the last part of the address.

    Raises:
        SourceError: If there is no token or Dropbox refuses it, the address is not there or holds nothing, a limit is
            passed, a file is not what its hash says, it cannot be kept, or Dropbox keeps failing.
    """
    path = [part for part in address.removeprefix("dropbox:").split("/") if part]
    root = "".join(f"/{part}" for part in path)
    shown = f"dropbox:{root or '/'}"
    for part in path:
        _refuse_name(part, shown)
    place = folder / hashlib.sha256(shown.lower().encode(errors="surrogatepass")).hexdigest()[:16]
    try:
        place.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{place.name}.lock"), closing(_Account(shown, settings)) as account:
            is_file, remote = account.look(root)
            refuse_size(sum(file.size for file in remote.values()), shown, settings)
            files = place / "files" if is_file else place / "files" / (path[-1] if path else "dropbox")
            _update_mirror(account, remote, place, files, settings)
            return files / next(iter(remote)) if is_file else files
    except OSError as error:
        if is_full(error):  # told by whoever knows what was needed
            raise
        raise SourceError(
            f"source: {shown} cannot be kept in {folder} ({error.strerror or error}); check path and rights or set "
            "storage.raw"
        ) from None


def plan_mirror(remote: Mapping[str, RemoteFile], held: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Decides what a mirror lacks and what it has too much.

    Args:
        remote: What Dropbox has, by name.
        held: Content hashes of what is here, by name.

    Returns:
        Names to fetch and names to remove, both sorted.
    """
    new = [name for name, file in remote.items() if held.get(name) != file.content_hash]
    return sorted(new), sorted(held.keys() - remote.keys())


def content_hash(path: Path) -> str:
    """Dropbox's content hash, 64 hex digits: the sha256 of the sha256 of each block of 4 MiB.

    See https://www.dropbox.com/developers/reference/content-hash.
    """
    overall = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            overall.update(hashlib.sha256(block).digest())
    return overall.hexdigest()


def read_token(settings: IngestionSettings) -> str:
    """The token, from the Prefect Secret block that the settings name, else from ``DROPBOX_TOKEN``.

    Raises:
        SourceError: If there is none, or what is there cannot be one.
    """
    ways = "make a Prefect Secret block with the token and name it with ingestion.dropbox_block, or set DROPBOX_TOKEN"
    name = settings.dropbox_block
    if name:
        from prefect.blocks.system import Secret

        load: Callable[[str], Any] = Secret.load
        try:
            value = load(name).get()
        except ValueError:
            raise SourceError(f"ingestion.dropbox_block: there is no Secret block {name!r}; {ways}") from None
    else:
        value = os.environ.get("DROPBOX_TOKEN", "")
    token = value.strip() if isinstance(value, str) else ""
    where = f"the Secret block {name!r}" if name else "DROPBOX_TOKEN"
    if not token:
        raise SourceError(f"source: dropbox: needs a token and {where} holds none; {ways}")
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise SourceError(f"source: {where} holds what cannot be a Dropbox token; copy the token again, in one line")
    return token


# -- the mirror --------------------------------------------------------------------------------------------------------


def _update_mirror(
    account: "_Account", remote: Mapping[str, RemoteFile], place: Path, files: Path, settings: IngestionSettings
) -> None:
    """Brings ``files`` to the state of ``remote``; the index and the parts lie in ``place``."""
    index, parts = place / "index.json", place / "parts"
    parts.mkdir(exist_ok=True)
    held = _read_hashes(index, files, remote)
    new, vanished = plan_mirror(remote, held)
    _remove_files(files, vanished)
    if vanished:
        more = f" and {len(vanished) - N_NAMED:,} more" if len(vanished) > N_NAMED else ""
        listed = ", ".join(map(image_id, vanished[:N_NAMED]))  # a file's name may be that of a patient
        print(f"{len(vanished):,} files are gone from {account.shown} and removed here: {listed}{more}")
    try:
        for name in _fetch_files(account, {name: remote[name] for name in new}, files, parts, settings):
            held[name] = remote[name].content_hash
    finally:
        with suppress(DiskError):  # what failed before it is told; files that it lacks are read the next time
            write_json(index, {name: [held[name], *_stamp(files / name)] for name in remote if held.get(name)})
    shutil.rmtree(parts, ignore_errors=True)
    n_same = len(remote) - len(new)
    print(f"{account.shown}: {len(new):,} files fetched, {n_same:,} unchanged and not fetched again")


def _fetch_files(
    account: "_Account", wanted: Mapping[str, RemoteFile], files: Path, parts: Path, settings: IngestionSettings
) -> Iterator[str]:
    """Fetches files a few at a time; yields the name of each when it is in its place."""
    total = sum(file.size for file in wanted.values())
    n_bytes = dict.fromkeys(wanted, 0)  # how much of each is here; one thread writes each
    stop = threading.Event()

    def fetch(name: str) -> str:
        file = wanted[name]
        # Named by the content it will have: a part that a killed run left is gone on with for that content only.
        part = parts / f"{file.content_hash}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"

        def show(done: int) -> None:
            n_bytes[name] = done
            if stop.is_set():
                raise SourceError(f"source: {account.shown} is not fetched further, because another file failed")

        # Without its name, which may be that of a patient.
        keep_trying(lambda: account.download(name, file, part, show), f"{account.shown}: a file", settings, stop)
        target = files / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, target)
        return name

    meter = Meter(account.shown.rsplit("/", 1)[-1] or "dropbox")
    with ThreadPoolExecutor(settings.n_connections, "dropbox") as pool:
        waiting = {pool.submit(fetch, name) for name in wanted}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                meter.show(sum(n_bytes.values()), total)
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            meter.close()


def _read_hashes(index: Path, files: Path, remote: Mapping[str, RemoteFile]) -> dict[str, str]:
    """Content hashes of what is here: from the index where size and time still fit, else from the file.

    A file that cannot be what Dropbox has, by its size, is not read: its hash is empty.
    """
    try:
        known = read_json(index)
    except RunError:
        known = {}
    held = {}
    for path in (path for path in files.rglob("*") if path.is_file()):
        name = path.relative_to(files).as_posix()
        recorded, stamp = known.get(name, [""]), _stamp(path)
        if recorded[1:] == stamp:
            held[name] = recorded[0]
        else:
            held[name] = content_hash(path) if name in remote and remote[name].size == stamp[0] else ""
    return held


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _remove_files(files: Path, names: Sequence[str]) -> None:
    for name in names:
        (files / name).unlink()
        for folder in (files / name).parents:
            if folder == files or any(folder.iterdir()):
                break
            folder.rmdir()


def _refuse_name(name: str, shown: str) -> None:
    if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise SourceError(f"source: {shown} holds the name {name!r}, which leads out of the folder; rename it")


# -- Dropbox -----------------------------------------------------------------------------------------------------------


class _Account:
    """The part of Dropbox that a token opens; every failure is said in words that hold no token."""

    def __init__(self, shown: str, settings: IngestionSettings) -> None:
        import dropbox  # type: ignore[import-untyped]

        tls_context(settings)  # says in our words that a ca_file is bad
        session = dropbox.create_session(max_connections=settings.n_connections, ca_certs=settings.ca_file)
        session.trust_env = False  # no .netrc and no proxy variable
        session.max_redirects = 0
        self.shown = shown
        self._settings = settings
        self._client = dropbox.Dropbox(
            read_token(settings),
            max_retries_on_error=0,  # keep_trying counts the tries
            max_retries_on_rate_limit=0,
            session=session,
            timeout=settings.timeout_s,
        )

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def look(self, root: str) -> tuple[bool, dict[str, RemoteFile]]:
        """Whether the address is a file, and what is there: the files below a folder by their names relative to it."""
        from dropbox.files import FileMetadata  # type: ignore[import-untyped]

        base = root
        if root:
            found = self._ask(self._client.files_get_metadata, root)
            if isinstance(found, FileMetadata):
                if not found.name.lower().endswith(".zip"):
                    raise SourceError(f"source: {self.shown} is a file, but no .zip; name a folder or a .zip file")
                _refuse_name(found.name, self.shown)
                return True, {found.name: _remote_file(found)}
            base = found.path_lower or root.lower()
        # A later page may replace or delete what an earlier one listed: the last word on a path counts.
        entries: dict[str, Any] = {}
        page = self._ask(
            self._client.files_list_folder, root, recursive=True, limit=2000, include_non_downloadable_files=False
        )
        limit = self._settings.max_members
        while True:
            entries |= {entry.path_lower: entry for entry in page.entries if entry.path_lower}
            files = {path: entry for path, entry in entries.items() if isinstance(entry, FileMetadata)}
            if len(files) > limit:
                raise SourceError(
                    f"source: {self.shown} holds more files than ingestion.max_members = {limit:,}; "
                    "raise it if that is right"
                )
            if not page.has_more:
                break
            page = self._ask(self._client.files_list_folder_continue, page.cursor)
        if not files:
            raise SourceError(f"source: {self.shown} holds no files; check the address")
        return False, {self._name_of(path, base, entries): _remote_file(entry) for path, entry in files.items()}

    def download(self, name: str, file: RemoteFile, part: Path, show: Callable[[int], None]) -> None:
        """One attempt at a file; goes on where its part ends.

        Raises:
            OutsideError: If another attempt may bring more.
            SourceError: If Dropbox refuses, or what came is not what the content hash says.
        """
        offset = part.stat().st_size if part.is_file() else 0
        if offset > file.size:
            part.unlink()
            offset = 0
        went_on = offset > 0
        done = offset
        if offset < file.size or not offset:
            try:
                with self._explained():
                    wish = {"Range": f"bytes={offset}-"} if offset else None
                    _, answer = self._client.files_download(f"rev:{file.rev}", extra_headers=wish)
                    with closing(answer):
                        span = answer.headers.get("Content-Range", "")
                        went_on = answer.status_code == 206 and span.startswith(f"bytes {offset}-")
                        done = offset if went_on else 0
                        with part.open("ab" if went_on else "wb") as out:
                            for piece in answer.iter_content(PIECE):
                                out.write(piece)
                                done += len(piece)
                                show(done)
                                if done > file.size:
                                    break
            except OutsideError as error:
                error.progressed = done > offset
                raise
        if done < file.size:
            raise OutsideError("the connection was cut", progressed=done > offset)
        if content_hash(part) != file.content_hash:
            part.unlink()
            if went_on:
                raise OutsideError("the pieces do not fit together, starting over")
            raise SourceError(f"source: {self.shown}: {name} is not what its content hash says; run again")

    def _ask(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return keep_trying(lambda: self._explained()(call)(*args, **options), self.shown, self._settings)

    def _name_of(self, path: str, base: str, entries: Mapping[str, Any]) -> str:
        """The name of a file relative to ``base``.

        Folders are spelled as their own entries spell them: Dropbox does not promise the case of all but the last part
        of a path, and a mirror must not split a folder in two for that.
        """
        parts = path[len(base) :].strip("/").split("/")
        names = []
        for i, part in enumerate(parts):
            entry = entries.get("/".join([base, *parts[: i + 1]]))
            names.append(entry.name if entry is not None else part)
            _refuse_name(names[-1], self.shown)
        return "/".join(names)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns the failures of the package into ours, without their texts, which may quote what was sent."""
        from dropbox import exceptions as refused
        from dropbox.stone_validators import ValidationError  # type: ignore[import-untyped]
        from requests import RequestException

        try:
            yield
        except refused.RateLimitError as error:
            raise OutsideError("answered 429", float(error.backoff or 0)) from None
        except refused.InternalServerError as error:
            raise OutsideError(f"answered {error.status_code}") from None
        except refused.AuthError as error:
            scope = error.error is not None and error.error.is_missing_scope()
            raise SourceError(
                f"source: the token for {self.shown} lacks a permission; it needs files.metadata.read and "
                "files.content.read, then make a new one"
                if scope
                else f"source: the token for {self.shown} is not accepted or has expired; make a new one"
            ) from None
        except refused.ApiError as error:
            self._refuse(error.error)
        except refused.HttpError as error:
            raise SourceError(
                f"source: {self.shown} answered {error.status_code}; check the address and token"
            ) from None
        except RequestException as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise SourceError(
                    f"source: {self.shown} answers with a certificate that does not hold; "
                    "name its authority in ingestion.ca_file if you trust it"
                ) from None
            raise OutsideError(f"the connection failed: {type(error).__name__}") from None
        except (AssertionError, KeyError, TypeError, ValueError, ValidationError) as error:
            raise OutsideError(f"the answer is not one of Dropbox ({type(error).__name__})") from None

    def _refuse(self, error: Any) -> NoReturn:
        tag = getattr(error, "_tag", None) or "unknown"
        if tag == "path":
            tag = getattr(error.get_path(), "_tag", tag)
        way_out = {
            "not_found": "check the address; an app with a folder of its own sees nothing else",
            "malformed_path": "check the address",
            "not_folder": "name a folder or a .zip file",
            "reset": "it was changed while it was listed; run again",
        }.get(tag, "look at it in Dropbox, and run again")
        raise SourceError(f"source: {self.shown} is refused by Dropbox ({tag}): {way_out}") from None


def _remote_file(entry: Any) -> RemoteFile:
    return RemoteFile(entry.rev, entry.size, entry.content_hash or "")
