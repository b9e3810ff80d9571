"""Zip archives, read without trust: every name and declared size is checked before a byte is written.

A member never yields more than it declares: ``zipfile`` stops there, and the checksum then fails.
"""

import lzma
import shutil
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tasks.errors import ArchiveError
from tasks.files import FULL
from tasks.pixels.decoding import MAX_FILE_BYTES, UndecodableError
from tasks.settings import IngestionSettings

PIECE = 1 << 20
SMALL = 1 << 20  # below this, a high ratio is harmless: an empty mask compresses a thousandfold
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
        raise ArchiveError(f"source: {path} is not a zip archive or is cut short; fetch it again") from None
    with archive:
        yield archive


def list_members(archive: zipfile.ZipFile, path: Path, limits: IngestionSettings) -> list[str]:
    """Names of all files of an archive, after all of its declarations were checked.

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
    names: dict[str, str] = {}
    for member in members:
        name = member.filename
        if name == "/":
            continue  # the folder itself, as Dropbox writes it into the archive of a shared folder
        _refuse_member(member, path, limits)
        if member.is_dir():
            continue
        # Compared by where they unpack to: a//b and ./a/b are a/b; A and a are one place on many machines.
        place = unicodedata.normalize("NFC", str(PurePosixPath(name))).casefold()
        if other := names.get(place):
            reason = "twice" if other == name else f"and {other!r}, one place on many machines"
            raise ArchiveError(f"source: {path} holds {name!r} {reason}; rename one and pack it again")
        names[place] = name
    if sum(member.file_size for member in members) > limits.max_unpacked_gb * 1e9:
        raise ArchiveError(
            f"source: {path} unpacks to more than ingestion.max_unpacked_gb = {limits.max_unpacked_gb:g} GB; "
            "raise it if that is right"
        )
    return sorted(names.values())


def _refuse_member(member: zipfile.ZipInfo, path: Path, limits: IngestionSettings) -> None:
    name, original = member.filename, member.orig_filename
    leads_out = name.startswith("/") or ".." in PurePosixPath(name).parts or name[1:2] == ":"
    if leads_out or not name or "\\" in original or "\x00" in original:
        raise _leads_out(path, original)
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ArchiveError(f"source: {path} holds {name!r}, a link or device file; pack it again without links")
    if member.flag_bits & 0x1:
        raise ArchiveError(f"source: {path} holds {name!r}, which is encrypted; pack it again without a password")
    if member.file_size > max(SMALL, limits.max_ratio * max(member.compress_size, 1)):
        raise ArchiveError(
            f"source: {path}: {name!r} unpacks to more than {limits.max_ratio:g} times its packed size; "
            "raise ingestion.max_ratio if that is right"
        )


def _leads_out(path: Path | str | None, name: str) -> ArchiveError:
    return ArchiveError(f"source: {path} holds the name {name!r}, which leads out of the folder; pack it again")


def unpack_members(
    archive: zipfile.ZipFile,
    names: Sequence[str],
    prefix: str,
    folder: Path,
    progress: Callable[[int, int], None],
) -> None:
    """Writes members that ``list_members`` checked into a folder, with ``prefix`` removed from their names.

    Args:
        progress: Called with the bytes written so far and the bytes to be written.

    Raises:
        ArchiveError: If a name leads out of the folder without the prefix, or a member is damaged.
        OSError: If no room is left.
    """
    for name in names:
        if name.startswith("/"):  # x//y is harmless, but /y is not
            raise _leads_out(archive.filename, prefix + name)
    members = {name: archive.getinfo(prefix + name) for name in names}
    written, to_write = 0, sum(member.file_size for member in members.values())
    for name, member in members.items():
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as stream, (folder / name).open("wb") as out:
                shutil.copyfileobj(stream, out, PIECE)
        except (*DAMAGE, OSError) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            if isinstance(error, OSError) and error.errno is not None:  # bzip2 raises one without for damaged data
                raise ArchiveError(
                    f"source: {archive.filename}: {name[:80]!r} cannot be unpacked into {folder} ({error.strerror}); "
                    "make room there or pack the archive again"
                ) from None
            raise ArchiveError(
                f"source: {archive.filename}: {member.filename!r} is damaged ({_short(error)}); fetch the archive again"
            ) from None
        written += member.file_size
        progress(written, to_write)


def read_member(archive: zipfile.ZipFile, name: str, n_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Reads the first so many bytes of a member of an archive that ``list_members`` checked into memory.

    Raises:
        UndecodableError: If the member is damaged or declares more than ``MAX_FILE_BYTES``.
    """
    member = archive.getinfo(name)
    if member.file_size > MAX_FILE_BYTES:
        raise UndecodableError(f"has {member.file_size / 1e6:,.0f} MB, more than {MAX_FILE_BYTES / 1e6:g}")
    try:
        with archive.open(member) as stream:
            return stream.read(n_bytes) if n_bytes < member.file_size else stream.read()
    except (*DAMAGE, OSError) as error:
        raise UndecodableError(f"is damaged in the archive ({_short(error)})") from None


def _short(error: Exception) -> str:
    return str(error).split("\n")[0][:80] or type(error).__name__
