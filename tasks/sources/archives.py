"""Archives, zip and tar, read without trust: every name and declared size is checked before a byte is written.

What a file is, its content decides. A packed tar (``.tar.gz``) and an archive that is all that an archive holds are
unpacked into a nameless file first, so that whatever is read in the end has an index of members. A member never yields
more than it declares: ``zipfile`` and ``tarfile`` stop there.
"""

import gzip
import lzma
import os
import shutil
import stat
import struct
import tarfile
import tempfile
import threading
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tasks.addresses import is_archive
from tasks.errors import ArchiveError
from tasks.files import FULL, room_in
from tasks.pixels.content import UndecodableError
from tasks.pixels.decoding import MAX_FILE_BYTES
from tasks.settings import IngestionSettings

PIECE = 1 << 16
SMALL = 1 << 20  # below this, a high ratio is harmless: an empty mask compresses a thousandfold
# What zipfile, tarfile and their decompressors raise for a broken archive, besides OSError.
DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError),
    *(ValueError, LookupError, OverflowError, TypeError),
)
KNOWN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
DEFLATE64 = 9
OTHERS = {
    b"rar!": "a RAR archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"bzh": "packed with bzip2",
    b"\xfd7zxz\x00": "packed with xz",
    b"\x28\xb5\x2f\xfd": "packed with Zstandard",
    b"version https://git-lfs": "a pointer of Git LFS, not the file; git lfs pull brings that",
    b"<!doctype": "a web page; fetch the file again, where nobody has to log in",
    b"<html": "a web page; fetch the file again, where nobody has to log in",
    b"\x89png": "a picture; name the folder that it lies in",
    b"\xff\xd8\xff": "a picture; name the folder that it lies in",
}
"""First bytes in lower case -> what a file is that is no archive that can be read, and the way out if it is another."""
LINK = "a link or device file; pack it again without links"
WAY_OUT = "unpack it and name the folder, or pack that as .zip or .tar.gz"


@dataclass(frozen=True)
class Member:
    """A file or folder as an archive declares it.

    Attributes:
        name: Where it unpacks to: with ``/``, accents composed (NFC); a folder ends in ``/``.
        declared: Its name in the archive.
        n_bytes: Unpacked.
        n_packed: In the archive.
        fault: Why it cannot be taken, and the way out; empty if it can.
        entry: What ``zipfile`` or ``tarfile`` know it by.
    """

    name: str
    declared: str
    n_bytes: int
    n_packed: int
    fault: str
    entry: zipfile.ZipInfo | tarfile.TarInfo


class Archive:
    """An open archive whose members were checked (see ``open_archive``).

    Attributes:
        path: The file.
        stream: The file, open; also where what is read lies within it.
        names: Of all files, sorted.
    """

    def __init__(self, path: Path, stream: IO[bytes], files: dict[str, Member], pick: Callable[[Any], Any]) -> None:
        self.path, self.stream, self.names = path, stream, sorted(files)
        self._files, self._pick = files, pick
        self._one_at_a_time = threading.Lock()  # a ZipFile counts its open members without a lock; a tar has one place

    def count_bytes(self, name: str) -> int:
        """Bytes of a file, unpacked."""
        return self._files[name].n_bytes

    def unpack(self, names: Sequence[str], prefix: str, folder: Path, progress: Callable[[int, int], None]) -> None:
        """Writes files into a folder, with ``prefix`` removed from their names.

        Args:
            progress: Called with the bytes written so far and the bytes to be written.

        Raises:
            ArchiveError: If a name leads out of the folder without the prefix, or a member is damaged.
            OSError: If no room is left.
        """
        for name in names:
            if name.startswith("/"):  # x//y is harmless, but /y is not
                raise _leads_out(self.path, prefix + name)
        members = {name: self._files[prefix + name] for name in names}
        written, to_write = 0, sum(member.n_bytes for member in members.values())
        for name, member in members.items():
            try:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with self._pick(member.entry) as stream, (folder / name).open("wb") as out:
                    shutil.copyfileobj(stream, out, PIECE)
            except (*DAMAGE, OSError) as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                if isinstance(error, OSError) and error.errno is not None:  # bzip2 raises one without for damaged data
                    raise ArchiveError(
                        f"source: {self.path}: {name[:80]!r} cannot be unpacked into {folder} ({error.strerror}); "
                        "make room there or pack the archive again"
                    ) from None
                raise ArchiveError(
                    f"source: {self.path}: {member.declared!r} is damaged ({_short(error)}); fetch the archive again"
                ) from None
            written += member.n_bytes
            progress(written, to_write)

    def read(self, name: str, n_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Reads the first so many bytes of a file into memory; several threads may.

        Raises:
            UndecodableError: If the member is damaged or declares more than ``MAX_FILE_BYTES``.
        """
        member, data = self._files[name], bytearray()
        if member.n_bytes > MAX_FILE_BYTES:
            raise UndecodableError(f"has {member.n_bytes / 1e6:,.0f} MB, more than {MAX_FILE_BYTES / 1e6:g}")
        try:
            with self._one_at_a_time, self._pick(member.entry) as stream:
                while piece := stream.read(min(PIECE, n_bytes - len(data))):
                    data += piece
        except (*DAMAGE, OSError) as error:
            raise UndecodableError(f"is damaged in the archive ({_short(error)})") from None
        return bytes(data)


@contextmanager
def open_archive(path: Path, limits: IngestionSettings, scratch: Path) -> Iterator[Archive]:
    """Opens a zip, a tar, a tar packed with gzip, or the one archive that such a one holds; checks all it declares.

    Args:
        path: The file, whatever its ending.
        limits: On members, bytes and ratio.
        scratch: Folder for what has to be unpacked before it can be listed; nothing is left there.

    Raises:
        ArchiveError: If the file is no archive or cut short; on a member that is absolute, leaves the folder, is a
            link, is encrypted, or appears twice; and on an archive that declares more than the limits.
        DiskError: If there is no room in ``scratch``.
    """
    with ExitStack() as held:
        try:
            stream = held.enter_context(path.open("rb"))
        except OSError as error:
            raise ArchiveError(f"source: {path} cannot be read ({error.strerror}); give another path") from None
        opening = _Opening(path, limits, scratch, held)
        files, pick = opening.list_files(stream)
        shown = [name for name in files if not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))]
        if shown and all(map(is_archive, shown)):
            if len(shown) > 1:
                raise ArchiveError(
                    f"source: {path} holds other archives ({', '.join(shown[:3])}); unpack it and name the folder"
                )
            files, pick = opening.list_files(opening.spool(lambda: pick(files[shown[0]].entry)))
        yield Archive(path, stream, files, pick)


@dataclass(frozen=True)
class _Opening:
    """The steps from a file to the checked list of its members."""

    path: Path
    limits: IngestionSettings
    scratch: Path
    held: ExitStack

    def list_files(self, stream: IO[bytes]) -> tuple[dict[str, Member], Callable[[Any], Any]]:
        """The files by name, and how one is opened."""
        stream.seek(0)
        if stream.read(2) == b"\x1f\x8b":
            stream.seek(0)
            packed: Any = gzip.GzipFile(fileobj=stream)
            stream = self.spool(lambda: packed)
        stream.seek(0)
        head = stream.read(tarfile.BLOCKSIZE)
        stream.seek(0)
        try:
            if head[:2] != b"PK" and _is_tar(head):
                tar = self.held.enter_context(tarfile.TarFile(fileobj=_Cautious(stream), encoding="utf-8"))  # type: ignore[arg-type]
                return self._check(_members_of_tar(tar, stream), stream), tar.extractfile
            archive = self.held.enter_context(zipfile.ZipFile(stream))
            return self._check(map(_of_zip, archive.infolist()), stream), archive.open
        except (*DAMAGE, OSError) as error:
            raise ArchiveError(f"source: {self.path} {_say_other(head, error)}") from None

    def spool(self, open_packed: Callable[[], IO[bytes]]) -> IO[bytes]:
        """Writes what a stream unpacks to into a nameless file, as long as it stays within the limits."""
        n_bytes, n_packed = 0, self.path.stat().st_size
        with room_in(self.scratch):
            self.scratch.mkdir(parents=True, exist_ok=True)
            plain = self.held.enter_context(tempfile.TemporaryFile(dir=self.scratch))  # noqa: SIM115
            try:
                with open_packed() as packed:
                    while piece := packed.read(PIECE):
                        n_bytes += len(piece)
                        self._refuse_size(n_bytes)
                        self._refuse_ratio("what it packs", n_bytes, n_packed)
                        plain.write(piece)
            except (*DAMAGE, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise ArchiveError(
                    f"source: {self.path} is damaged or cut short ({_short(error)}); fetch it again"
                ) from None
        return plain

    def _check(self, members: Iterable[Member], stream: IO[bytes]) -> dict[str, Member]:
        files, places, n_bytes, n_packed = dict[str, Member](), dict[str, str](), 0, 0
        for n, member in enumerate(members, start=1):
            if n > self.limits.max_members:
                raise ArchiveError(
                    f"source: {self.path} has more members than ingestion.max_members = "
                    f"{self.limits.max_members:,}; raise it if that is right"
                )
            name, n_bytes, n_packed = member.name, n_bytes + member.n_bytes, n_packed + member.n_packed
            if member.declared in ("/", ".", "./"):
                continue  # the folder itself, as Dropbox and tar write it
            leads_out = name.startswith("/") or ".." in name.split("/") or name[1:2] == ":"
            if leads_out or not name or "\x00" in member.declared:
                raise _leads_out(self.path, member.declared)
            if member.fault:
                raise ArchiveError(f"source: {self.path} holds {member.declared!r}, {member.fault}")
            self._refuse_size(n_bytes)
            self._refuse_ratio(repr(member.declared), member.n_bytes, member.n_packed)
            if name.endswith("/"):
                continue
            # Compared by where they unpack to: a//b and ./a/b are a/b; A and a are one place on many machines.
            place = str(PurePosixPath(name)).casefold()
            if other := places.get(place):
                reason = "twice" if other == member.declared else f"and {other!r}, one place on many machines"
                raise ArchiveError(
                    f"source: {self.path} holds {member.declared!r} {reason}; rename one and pack it again"
                )
            places[place], files[name] = member.declared, member
        if n_packed > stream.seek(0, os.SEEK_END):
            raise ArchiveError(f"source: {self.path} declares more packed bytes than it has; fetch it again")
        return files

    def _refuse_size(self, n_bytes: int) -> None:
        if n_bytes > self.limits.max_unpacked_gb * 1e9:
            raise ArchiveError(
                f"source: {self.path} unpacks to more than ingestion.max_unpacked_gb = "
                f"{self.limits.max_unpacked_gb:g} GB; raise it if that is right"
            )

    def _refuse_ratio(self, what: str, n_bytes: int, n_packed: int) -> None:
        if n_bytes > max(SMALL, self.limits.max_ratio * max(n_packed, 1)):
            raise ArchiveError(
                f"source: {self.path}: {what} unpacks to more than {self.limits.max_ratio:g} times its packed size; "
                "raise ingestion.max_ratio if that is right"
            )


def _of_zip(entry: zipfile.ZipInfo) -> Member:
    name, fault = entry.filename, ""
    if not entry.flag_bits & 0x800:  # zipfile takes such a name for cp437; Archive Utility writes UTF-8 all the same
        with suppress(UnicodeError):
            name = name.encode("cp437").decode()
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        fault = LINK
    elif entry.flag_bits & 0x1:
        fault = "which is encrypted; pack it again without a password"
    elif entry.compress_type not in KNOWN:
        is_64 = entry.compress_type == DEFLATE64
        method = "with Deflate64, as Windows Explorer does beyond 2 GB" if is_64 else "by a method that is not known"
        fault = f"packed {method}; {WAY_OUT}"
    return Member(_in_one_form(name), entry.orig_filename, entry.file_size, entry.compress_size, fault, entry)


def _members_of_tar(tar: tarfile.TarFile, stream: IO[bytes]) -> Iterator[Member]:
    yield from map(_of_tar, tar)
    stream.seek(tar.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
        raise tarfile.HeaderError("no end")


def _of_tar(entry: tarfile.TarInfo) -> Member:
    """Stricter than tarfile's data filter: no link at all; owner, mode and time are not taken over."""
    if entry.size < 0:
        raise tarfile.HeaderError("a negative size")
    entry.pax_headers = {}  # up to 64 kB each
    name, fault = entry.name, "" if (entry.isreg() and not entry.issparse()) or entry.isdir() else LINK
    if name != name.encode(errors="replace").decode():
        fault = "a name that is not UTF-8; rename it and pack it again"
    name = _in_one_form(f"{name}/" if entry.isdir() else name)
    return Member(name, entry.name, entry.size, entry.size, fault, entry)


def _in_one_form(name: str) -> str:
    """With ``/`` for the ``\\`` of Windows, without ``./`` at the start, accents composed (macOS takes them apart)."""
    name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    while name.startswith("./"):
        name = name[2:]
    return name


def looks_like_archive(path: Path) -> bool:
    """Whether a file begins, or as a zip ends, like an archive that can be read."""
    with path.open("rb") as stream:
        head = stream.read(tarfile.BLOCKSIZE)
    return head[:2] == b"\x1f\x8b" or _is_tar(head) or zipfile.is_zipfile(path)


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except (tarfile.TarError, *DAMAGE):
        return False
    return True


class _Cautious:
    """A file for tarfile, which would read a header of any size into memory; members are read in small pieces."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.seek, self.tell = stream, stream.seek, stream.tell

    def read(self, n_bytes: int) -> bytes:
        if not 0 <= n_bytes <= PIECE:
            raise tarfile.HeaderError("a header that is far too long")
        return self._stream.read(n_bytes)


def _say_other(head: bytes, error: Exception) -> str:
    """What a file is that is no archive, as far as its first bytes tell."""
    start = head.lstrip().lower()
    kind = next((kind for first, kind in OTHERS.items() if start.startswith(first)), "")
    if "multiple disks" in str(error):
        kind = "one part of a zip in several parts"
    if not kind:
        return "is not a zip archive or tar, or is cut short; fetch it again"
    return f"is {kind}" if ";" in kind else f"is {kind}; {WAY_OUT}"


def _leads_out(path: Path, name: str) -> ArchiveError:
    return ArchiveError(f"source: {path} holds the name {name!r}, which leads out of the folder; pack it again")


def _short(error: Exception) -> str:
    return str(error).split("\n")[0][:80] or type(error).__name__
