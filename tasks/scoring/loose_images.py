"""Loose images: a folder or zip of X-rays of any structure, listed and read in batches; nothing is written to disk.

The same rules apply as for a data set: clutter is left out and counted, an archive is checked before it is read, and
``tasks.pixels`` decodes every file. A file that does not decode is not an error here: its row gets the reason.
"""

import os
import stat
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.errors import ArchiveError, SourceError
from tasks.pixels.decoding import MAX_FILE_BYTES, SIDE_PX, SUFFIXES, UndecodableError, decode, in_turn
from tasks.settings import Settings
from tasks.sources.archives import list_members, open_archive, read_member
from tasks.sources.layout import plan_loose_images

BATCH_IMAGES = 32
READERS = 4


@dataclass(frozen=True)
class LooseBatch:
    """Some images of a source, read.

    Attributes:
        paths: Paths as in the source, relative, with ``/``; bytes that are not UTF-8 as escapes like ``\\\\xe9``.
        refused: For each path why it has no pixels, one short sentence, or ``""``.
        pixels: uint8 ``(n, 224, 224)``, a row for each path that was not refused, in their order.
    """

    paths: tuple[str, ...]
    refused: tuple[str, ...]
    pixels: NDArray[np.uint8]


class LooseImages:
    """The images of a folder or zip, sorted by path.

    Attributes:
        paths: Paths as in the source, relative, with ``/``.
        n_left_out: Files that are not images (clutter, hidden files, other suffixes) and linked folders.
    """

    def __init__(
        self,
        paths: tuple[str, ...],
        n_left_out: int,
        read: Callable[[str], bytes],
        count_bytes: Callable[[str], int],
        settings: Settings,
    ):
        self.paths, self.n_left_out = paths, n_left_out
        self._read, self._count_bytes, self._settings = read, count_bytes, settings

    def read_batches(self, n_images: int = BATCH_IMAGES) -> Iterator[LooseBatch]:
        """All images in order, ``n_images`` at a time; memory holds two batches, one of them read ahead."""
        with ThreadPoolExecutor(READERS) as pool:
            starts = range(0, len(self.paths), n_images)
            ahead: list[Future[NDArray[np.uint8] | str]] = []
            for start in starts:
                paths = self.paths[start : start + n_images]
                batch = ahead or [pool.submit(self._read_pixels, path) for path in paths]
                following = self.paths[start + n_images : start + 2 * n_images]
                ahead = [pool.submit(self._read_pixels, path) for path in following]
                yield _gather(paths, [image.result() for image in batch])

    def _read_pixels(self, path: str) -> NDArray[np.uint8] | str:
        """uint8 ``(224, 224)``, or why there is none."""
        if _in_utf8(path) != path:
            return "has a name that is not UTF-8"
        limit = self._settings.ingestion.max_side_px
        try:
            with in_turn(self._count_bytes(path)):
                data = self._read(path)
                return decode(data, padding=self._settings.packing.padding, max_side_px=limit) if data else "is empty"
        except UndecodableError as error:
            return str(error)
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"


@contextmanager
def open_loose_images(images: str, settings: Settings) -> Iterator[LooseImages]:
    """Opens a folder or zip of images.

    Args:
        images: The folder or zip, as the user named it.
        settings: Limits of archives (``ingestion``), and how files become pixels (``packing.padding``).

    Raises:
        SourceError: If it does not exist, cannot be used, or holds no image.
    """
    path = Path(images)
    try:
        is_folder, is_file, exists = path.is_dir(), path.is_file(), path.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"images: {images!r} cannot be read ({reason}); give another path") from None
    if "://" in images or not images or not exists:
        raise SourceError(f"images: {images!r} does not exist; give a folder or a .zip file on this machine")
    if not is_folder and (not is_file or images.lower().endswith(SUFFIXES)):
        raise SourceError(f"images: {images} is neither a folder nor a zip; name the folder that the images are in")
    with _open_folder(path, settings) if is_folder else _open_zip(path, settings) as found:
        if not found.paths:
            others = f" (left out: {found.n_left_out:,} other files or links)" if found.n_left_out else ""
            raise SourceError(f"images: {images} holds no image{others}; name a folder or zip with .jpeg or .png files")
        yield found


@contextmanager
def _open_folder(folder: Path, settings: Settings) -> Iterator[LooseImages]:
    def refuse(error: OSError) -> None:
        raise SourceError(
            f"images: {error.filename} cannot be read ({error.strerror}); fix its permissions or remove it"
        )

    names: list[str] = []
    n_links = 0
    for parent, folders, files in os.walk(folder, onerror=refuse):
        below = Path(parent).relative_to(folder)
        names += [(below / name).as_posix() for name in files]
        n_links += sum((Path(parent) / name).is_symlink() for name in folders)
    paths, n_left_out = plan_loose_images(names)

    def count_bytes(path: str) -> int:
        return (folder / path).stat().st_size

    yield LooseImages(paths, n_left_out + n_links, lambda path: _read_file(folder / path), count_bytes, settings)


@contextmanager
def _open_zip(path: Path, settings: Settings) -> Iterator[LooseImages]:
    try:
        with open_archive(path) as archive:
            paths, n_left_out = plan_loose_images(list_members(archive, path, settings.ingestion))

            def count_bytes(name: str) -> int:
                return archive.getinfo(name).file_size

            yield LooseImages(paths, n_left_out, _reader(archive), count_bytes, settings)
    except ArchiveError as error:
        raise ArchiveError(f"images: {str(error).removeprefix('source: ')}") from None


def _reader(archive: zipfile.ZipFile) -> Callable[[str], bytes]:
    one_at_a_time = threading.Lock()  # a ZipFile counts its open members without a lock

    def read(name: str) -> bytes:
        with one_at_a_time:
            return read_member(archive, name, MAX_FILE_BYTES)

    return read


def _read_file(path: Path) -> bytes:
    """Reads a file; refuses a pipe or device, which might never end."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise UndecodableError("is a pipe or device, not a file")
    if state.st_size > MAX_FILE_BYTES:
        raise UndecodableError(f"has more than {MAX_FILE_BYTES / 1e6:g} MB")
    with path.open("rb") as stream:
        return stream.read(state.st_size + 1)  # one more: a system file may hold more than its size


def _gather(paths: Sequence[str], results: Sequence[NDArray[np.uint8] | str]) -> LooseBatch:
    pixels = [result for result in results if not isinstance(result, str)]
    return LooseBatch(
        tuple(_in_utf8(path) for path in paths),
        tuple(result if isinstance(result, str) else "" for result in results),
        np.stack(pixels) if pixels else np.empty((0, SIDE_PX, SIDE_PX), np.uint8),
    )


def _in_utf8(path: str) -> str:
    """The path itself; bytes of it that are not UTF-8 written as ``\\\\xe9``."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")
