"""Archives, zip and tar, read without trust: every name and declared size is checked before a byte is written.

What a file is, its content decides. A packed tar (``.tar.gz``) and the one archive in an archive without pictures are
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
from tasks.pixels.content import MAX_FILE_BYTES, UndecodableError, name_content, refuse_bytes, suggests_picture
from tasks.settings import IngestionSettings

PIECE = 1 << 16
SMALL = 1 << 20  # below this, a high ratio is harmless: an empty mask compresses a thousandfold
# What zipfile, tarfile and their decompressors raise for a broken archive, besides OSError.
DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError),
    *(ValueError, LookupError, OverflowError, TypeError),
)
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
DEFLATE64 = 9
OTHERS = {b"Rar!": "RAR archive", b"7z\xbc\xaf": "7z archive", b"BZh": "file of bzip2", b"\xfd7zXZ": "file of xz"}
LINK = "a link or device file; pack it again without links"


@dataclass(frozen=True)
class Member:
    """A file or folder as an archive declares it.

    Attributes:
        name: Where it unpacks to; a folder ends in ``/``.
        n_bytes: Unpacked.
        n_packed: In the archive.
        fault: Why it cannot be taken, and the way out; empty if it can.
        entry: What ``zipfile`` or ``tarfile`` know it by.
    """

    name: str
    n_bytes: int
    n_packed: int
    fault: str
    entry: zipfile.ZipInfo | tarfile.TarInfo


@contextmanager
def open_archive(path: Path, limits: IngestionSettings, scratch: Path) -> Iterator["Archive"]:
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
        yield Archive(path, limits, scratch, held)


class Archive:
    """An open archive whose members were checked (see ``open_archive``).

    Attributes:
        path: The file.
        stream: The file, open.
        names: Of all files, sorted; with ``/``, accents composed (NFC).
    """

    def __init__(self, path: Path, limits: IngestionSettings, scratch: Path, held: ExitStack) -> None:
        self.path, self._limits, self._scratch, self._held = path, limits, scratch, held
        self._one_at_a_time = threading.Lock()  # a ZipFile counts its open members without a lock; a tar has one place
        try:
            self.stream = held.enter_context(path.open("rb"))
            self.stream.read(1)
        except OSError as error:
            raise ArchiveError(f"source: {path} cannot be read ({error.strerror}); give another path") from None
        self._files, self._pick = self._list(self.stream)
        shown = [name for name in self._files if not name.startswith((".", "__MACOSX")) and "/." not in name]
        inner = [name for name in shown if is_archive(name)]
        if inner and not any(map(suggests_picture, shown)):
            if len(inner) > 1:
                raise self._error(f"holds other archives ({', '.join(inner[:3])}); unpack it and name the folder")
            self._files, self._pick = self._list(self._spool(self._pick, self._files[inner[0]].entry))
        self.names = sorted(self._files)

    def count_bytes(self, name: str) -> int:
        """Bytes of a file, unpacked."""
        return self._files[name].n_bytes

    def unpack(self, names: Sequence[str], prefix: str, folder: Path, progress: Callable[[int, int], None]) -> None:
        """Writes files into a folder, with ``prefix`` (a folder) removed from their names.

        Args:
            progress: Called with the bytes written so far and the bytes to be written.

        Raises:
            ArchiveError: If a member is damaged or cannot be written.
            OSError: If no room is left.
        """
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
                raise self._error(
                    f"holds {name[:80]!r}, which is damaged or cannot be unpacked ({_short(error)}); fetch or pack "
                    "the archive again"
                ) from None
            written += member.n_bytes
            progress(written, to_write)

    def read(self, name: str, n_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Reads the first so many bytes of a file into memory; several threads may.

        Raises:
            UndecodableError: If the member is damaged or declares more than ``MAX_FILE_BYTES``.
        """
        member, data = self._files[name], bytearray()
        refuse_bytes(member.n_bytes)
        try:
            with self._one_at_a_time, self._pick(member.entry) as stream:
                while piece := stream.read(min(PIECE, n_bytes - len(data))):
                    data += piece
        except (*DAMAGE, OSError) as error:
            raise UndecodableError(f"is damaged in the archive ({_short(error)})") from None
        return bytes(data)

    def _list(self, stream: IO[bytes]) -> tuple[dict[str, Member], Callable[[Any], Any]]:
        """The files of a zip, a tar or a packed tar by name, and how one is opened."""
        head = _read_head(stream)
        if head.startswith(b"\x1f\x8b"):
            stream = self._spool(gzip.open, stream)
            head = _read_head(stream)
        try:
            if _is_tar(head):
                tar = self._held.enter_context(tarfile.TarFile(fileobj=_Cautious(stream), encoding="utf-8"))  # type: ignore[arg-type]
                return self._check(_members_of_tar(tar, stream), stream), tar.extractfile
            archive = self._held.enter_context(zipfile.ZipFile(stream))
            return self._check(map(_of_zip, archive.infolist()), stream), archive.open
        except (*DAMAGE, OSError):
            kind = next((kind for start, kind in OTHERS.items() if head.startswith(start)), name_content(head))
            what = f"is a {kind}, not" if kind else "is not"
            raise self._error(
                f"{what} a zip archive or tar, or is cut short; fetch it again, or unpack it and name the folder"
            ) from None

    def _spool(self, open_packed: Callable[[Any], Any], packed: Any) -> IO[bytes]:
        """Writes what a stream or member unpacks to into a nameless file, as long as it stays within the limits."""
        n_bytes, n_packed = 0, self.path.stat().st_size
        with room_in(self._scratch):
            self._scratch.mkdir(parents=True, exist_ok=True)
            plain = self._held.enter_context(tempfile.TemporaryFile(dir=self._scratch))  # noqa: SIM115
            try:
                with open_packed(packed) as stream:
                    while piece := stream.read(PIECE):
                        n_bytes += len(piece)
                        self._refuse_bytes("what it packs", n_bytes, n_packed, n_bytes)
                        plain.write(piece)
            except (*DAMAGE, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise self._error(f"is damaged or cut short ({_short(error)}); fetch it again") from None
        return plain

    def _check(self, members: Iterable[Member], stream: IO[bytes]) -> dict[str, Member]:
        files, places, n_bytes, n_packed = dict[str, Member](), dict[str, str](), 0, 0
        for n, member in enumerate(members, start=1):
            if n > self._limits.max_members:
                raise self._error(
                    f"has more members than ingestion.max_members = {self._limits.max_members:,}; raise it if that is "
                    "right"
                )
            name, n_bytes, n_packed = member.name, n_bytes + member.n_bytes, n_packed + member.n_packed
            if name in ("//", "./"):
                continue  # the folder itself, as Dropbox and tar write it
            if name[0] == "/" or name == "." or ".." in name.split("/") or name[1:2] == ":" or "\x00" in name:
                raise self._error(f"holds the name {name!r}, which leads out of the folder; pack it again")
            if member.fault:
                raise self._error(f"holds {name!r}, {member.fault}")
            self._refuse_bytes(repr(name), member.n_bytes, member.n_packed, n_bytes)
            if name.endswith("/"):
                continue
            if other := places.get(name.casefold()):  # A and a are one place on many machines
                reason = "twice" if other == name else f"and {other!r}, one place on many machines"
                raise self._error(f"holds {name!r} {reason}; rename one and pack it again")
            places[name.casefold()], files[name] = name, member
        if n_packed > stream.seek(0, os.SEEK_END):
            raise self._error("declares more packed bytes than it has; fetch it again")
        return files

    def _refuse_bytes(self, what: str, n_bytes: int, n_packed: int, n_all: int) -> None:
        if n_all > self._limits.max_unpacked_gb * 1e9:
            reason = (
                f"it unpacks to more than ingestion.max_unpacked_gb = {self._limits.max_unpacked_gb:g} GB; raise it"
            )
        elif n_bytes > max(SMALL, self._limits.max_ratio * max(n_packed, 1)):
            times = f"{self._limits.max_ratio:g} times its packed size"
            reason = f"{what} unpacks to more than {times}; raise ingestion.max_ratio"
        else:
            return
        raise self._error(f"is refused: {reason} if that is right")

    def _error(self, sentence: str) -> ArchiveError:
        return ArchiveError(f"source: {self.path} {sentence}")


def _of_zip(entry: zipfile.ZipInfo) -> Member:
    name, fault = entry.orig_filename, ""
    if not entry.flag_bits & 0x800:  # zipfile takes such a name for cp437; Archive Utility writes UTF-8 all the same
        with suppress(UnicodeError):
            name = name.encode("cp437").decode()
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        fault = LINK
    elif entry.flag_bits & 0x1:
        fault = "which is encrypted; pack it again without a password"
    elif entry.compress_type not in METHODS:
        is_64 = entry.compress_type == DEFLATE64
        method = "Deflate64, as Windows Explorer does beyond 2 GB" if is_64 else "a method that is not known"
        fault = f"packed with {method}; unpack it and name the folder, or pack that as .tar.gz"
    return Member(_place(name), entry.file_size, entry.compress_size, fault, entry)


def _members_of_tar(tar: tarfile.TarFile, stream: IO[bytes]) -> Iterator[Member]:
    """Stricter than tarfile's data filter: no link at all; owner, mode and time are not taken over."""
    for entry in tar:
        if entry.size < 0:
            raise tarfile.HeaderError("a negative size")
        entry.pax_headers = {}  # up to 64 kB each
        fault = "" if (entry.isreg() and not entry.issparse()) or entry.isdir() else LINK
        if entry.name != entry.name.encode(errors="replace").decode():
            fault = "a name that is not UTF-8; rename it and pack it again"
        yield Member(_place(entry.name, entry.isdir()), entry.size, entry.size, fault, entry)
    stream.seek(tar.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
        raise tarfile.HeaderError("no end")


def _place(name: str, is_folder: bool = False) -> str:
    """Where a name unpacks to: ``.\\a//b`` is ``a/b``, accents are composed (not by macOS); a folder ends in ``/``."""
    name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    return str(PurePosixPath(name)) + "/" * (is_folder or name.endswith("/"))


def looks_like_archive(path: Path) -> bool:
    """Whether a file begins, or as a zip ends, like an archive that can be read."""
    with path.open("rb") as stream:
        head = _read_head(stream)
    return head.startswith(b"\x1f\x8b") or _is_tar(head) or zipfile.is_zipfile(path)


def _read_head(stream: IO[bytes]) -> bytes:
    stream.seek(0)
    head = stream.read(tarfile.BLOCKSIZE)
    stream.seek(0)
    return head


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


class _Cautious:
    """A file for tarfile, which would read a header of any size into memory; members are read in small pieces."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.seek, self.tell = stream, stream.seek, stream.tell

    def read(self, n_bytes: int) -> bytes:
        if not 0 <= n_bytes <= PIECE:
            raise tarfile.HeaderError("a header that is far too long")
        return self._stream.read(n_bytes)


def _short(error: Exception) -> str:
    return str(error).split("\n")[0][:80] or type(error).__name__
