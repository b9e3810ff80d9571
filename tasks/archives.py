"""Zip archives, read without trust: every name is judged before a byte is written, bytes are counted as they come."""

import hashlib
import lzma
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tasks.images import UndecodableError
from tasks.records import ArchiveError
from tasks.room import FULL
from tasks.settings import IngestionSettings

PIECE = 1 << 20
SMALL = 1 << 20  # below this, a high ratio harms nobody: an empty mask compresses a thousandfold
# What zipfile raises for a broken archive; NotImplementedError stands for a compression it does not know.
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, ValueError)


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a zip.

    Raises:
        ArchiveError: If the file is no zip or is cut short.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (*DAMAGE, OSError):
        raise ArchiveError(f"source: {path} is no zip archive or is cut short; fetch it again") from None
    with archive:
        yield archive


def checksum_of(archive: zipfile.ZipFile) -> str:
    """The sha256 of the file that an archive was opened from, whatever lies under its name by now."""
    assert archive.fp is not None
    archive.fp.seek(0)
    return hashlib.file_digest(archive.fp, "sha256").hexdigest()  # type: ignore[arg-type]


def list_members(archive: zipfile.ZipFile, path: Path, limits: IngestionSettings) -> list[str]:
    """Names of all files of an archive, after all of its declarations were found harmless.

    Raises:
        ArchiveError: On a member that is absolute, leaves the folder, is a link, is encrypted, or appears twice, and
            on an archive that declares more than the limits.
    """
    members = archive.infolist()
    if len(members) > limits.max_members:
        raise ArchiveError(
            f"source: {path} has {len(members):,} members, more than ingestion.max_members = {limits.max_members:,}; "
            "raise it if that is right"
        )
    if sum(member.compress_size for member in members) > path.stat().st_size:
        raise ArchiveError(f"source: {path} declares more packed bytes than it has; fetch it again")
    # By the place they unpack to: a//b and ./a/b are a/b; and A and a are one place on many machines.
    names: dict[str, str] = {}
    for member in members:
        name = member.filename
        if name == "/":
            continue  # the folder itself, as Dropbox writes it into the archive of a shared folder
        _refuse_name(name, member.orig_filename, path)
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ArchiveError(f"source: {path} holds {name!r}, a link or device file; pack it again without links")
        if member.flag_bits & 0x1:
            raise ArchiveError(f"source: {path} holds {name!r}, which is encrypted; pack it again without a password")
        if member.is_dir():
            continue
        place = unicodedata.normalize("NFC", str(PurePosixPath(name))).casefold()
        if place in names:
            other = names[place]
            reason = "twice" if other == name else f"and {other!r}, one place on many machines"
            raise ArchiveError(f"source: {path} holds {name!r} {reason}; rename one and pack it again")
        names[place] = name
        _refuse_size(member.filename, member.file_size, member.compress_size, path, limits)
    _refuse_total(sum(member.file_size for member in members), path, limits)
    return sorted(names.values())


def unpack_members(
    archive: zipfile.ZipFile,
    path: Path,
    names: Sequence[str],
    prefix: str,
    folder: Path,
    limits: IngestionSettings,
    progress: Callable[[int, int], None],
) -> None:
    """Writes members into a folder, without ``prefix`` in front; counts what really comes out.

    Args:
        progress: Called with the bytes written so far and the bytes to be written.

    Raises:
        ArchiveError: If a name leads out of the folder without the prefix, or a member is damaged, or yields more than
            it declares or the limits allow.
        OSError: If no room is left.
    """
    for name in names:
        if name.startswith("/"):  # x//y, harmless as a whole, without the x/ in front
            raise _leads_out(path, prefix + name)
    to_write = sum(archive.getinfo(prefix + name).file_size for name in names)
    written = 0
    for name in names:
        member = archive.getinfo(prefix + name)
        target = folder / name
        size = 0
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as stream, target.open("wb") as out:
                while piece := stream.read(PIECE):
                    size += len(piece)
                    written += len(piece)
                    _refuse_size(member.filename, size, member.compress_size, path, limits)
                    _refuse_total(written, path, limits)
                    out.write(piece)
        except OSError as error:  # bzip2 raises it without a number for damaged data
            if error.errno in FULL:
                raise
            if error.errno is None:
                raise _damaged(path, member.filename, error) from None
            raise ArchiveError(
                f"source: {path}: {member.filename[:80]!r} cannot be unpacked into {folder} ({error.strerror}); "
                "make room there or pack the archive again"
            ) from None
        except DAMAGE as error:
            raise _damaged(path, member.filename, error) from None
        progress(written, to_write)


def read_member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    """The content of a member of an archive that ``list_members`` found harmless, read into memory.

    A member never yields more than it declares: ``zipfile`` stops there, and its checksum then tells the lie.

    Raises:
        UndecodableError: If the member is damaged or declares more than ``max_bytes``.
    """
    member = archive.getinfo(name)
    if member.file_size > max_bytes:
        raise UndecodableError(f"has {member.file_size / 1e6:,.0f} MB, more than {max_bytes / 1e6:g}")
    try:
        return archive.read(member)
    except (*DAMAGE, OSError) as error:
        raise UndecodableError(f"is damaged in the archive ({_short(error)})") from None


def _damaged(path: Path, name: str, error: Exception) -> ArchiveError:
    return ArchiveError(f"source: {path}: {name!r} is damaged ({_short(error)}); fetch the archive again")


def _short(error: Exception) -> str:
    return str(error).split("\n")[0][:80] or type(error).__name__


def _refuse_name(name: str, original: str, path: Path) -> None:
    parts = PurePosixPath(name).parts
    hostile = (
        name.startswith("/")
        or "\\" in original
        or "\x00" in original
        or ".." in parts
        or (len(name) > 1 and name[1] == ":")
    )
    if hostile or not name:
        raise _leads_out(path, original)


def _leads_out(path: Path, name: str) -> ArchiveError:
    return ArchiveError(f"source: {path} holds the name {name!r}, which leads out of the folder; pack it again")


def _refuse_size(name: str, size: int, packed: int, path: Path, limits: IngestionSettings) -> None:
    if size > SMALL and size > limits.max_ratio * max(packed, 1):
        raise ArchiveError(
            f"source: {path}: {name!r} unpacks to more than {limits.max_ratio:g} times its packed size; "
            "raise ingestion.max_ratio if that is right"
        )


def _refuse_total(size: int, path: Path, limits: IngestionSettings) -> None:
    if size > limits.max_unpacked_gb * 1e9:
        raise ArchiveError(
            f"source: {path} unpacks to more than ingestion.max_unpacked_gb = {limits.max_unpacked_gb:g} GB; "
            "raise it if that is right"
        )
