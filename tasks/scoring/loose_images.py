"""Loose images: a folder or archive of X-rays of any structure, listed and read in batches; nothing is written to disk.

The same rules apply as for a data set: content decides what a file is, clutter is left out and counted, an archive is
checked before it is read, and ``tasks.pixels`` decodes every file. A file that does not decode is not an error here:
its row gets the reason.
"""

import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.errors import ArchiveError, SourceError
from tasks.pixels.content import (
    HEAD_BYTES,
    MAX_FILE_BYTES,
    UndecodableError,
    is_picture,
    promises_picture,
    refuse_bytes,
)
from tasks.pixels.decoding import choose_bits, decode, in_turn, needs_header, read_header
from tasks.pixels.dicom import describe_dicom
from tasks.pixels.greys import SIDE_PX
from tasks.records import Facts
from tasks.settings import Settings
from tasks.sources.archives import open_archive
from tasks.sources.folders import list_folder
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

    @property
    def read_paths(self) -> list[str]:
        """The paths of the images that were not refused."""
        return [path for path, reason in zip(self.paths, self.refused, strict=True) if not reason]


class LooseImages:
    """The images of a folder or archive, sorted by path.

    Attributes:
        paths: Paths as in the source, relative, with ``/``.
        n_left_out: Files that are not images (clutter, hidden files, others by name and content), and links to a folder
            above them.
        least_bits: Bits of 16 that are in use at least, as another source of these images is known to have them.
    """

    def __init__(
        self,
        candidates: tuple[str, ...],
        n_left_out: int,
        read: Callable[[str, int], bytes],
        count_bytes: Callable[[str], int],
        settings: Settings,
    ):
        """``candidates`` may be images by their names; ``read`` gives the first so many bytes of a file."""
        self._read, self._count_bytes, self._padding = read, count_bytes, settings.packing.padding
        self._taken: Facts = settings.ingestion.model_dump(include={"max_side_px", "dicom_classes"})
        with ThreadPoolExecutor(READERS) as pool:
            kept = list(pool.map(self._has_row, candidates))
        self.paths = tuple(path for path, has_row in zip(candidates, kept, strict=True) if has_row)
        self.n_left_out = n_left_out + kept.count(False)
        self._notes: list[str] = []
        self.least_bits = 0

    def read_batches(self, n_images: int = BATCH_IMAGES) -> Iterator[LooseBatch]:
        """All images in order, ``n_images`` at a time; memory holds two batches, one of them read ahead."""
        with ThreadPoolExecutor(READERS) as pool:
            deep = [bits for bits in pool.map(self._measure_bits, self.paths) if bits is not None]
            self._bits = max(choose_bits(deep), self.least_bits)
            for line in describe_dicom(self._notes):
                print(line)
            if deep:
                print(f"{len(deep):,} files: {self._bits} of 16 bits used")
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
        try:
            with in_turn(self._count_bytes(path)):
                data = self._read(path, MAX_FILE_BYTES)
                return decode(data, padding=self._padding, bits=self._bits, **self._taken)
        except UndecodableError as error:
            return str(error)
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"

    def _has_row(self, path: str) -> bool:
        """Whether a file is a picture, by name or content; one that cannot be read is, so that its row says why."""
        try:
            return is_picture(path, self._read(path, HEAD_BYTES))
        except (UndecodableError, OSError):
            return True

    def _measure_bits(self, path: str) -> int | None:
        """The bits in use of a picture with 16; none for others, and for those that cannot be read.

        Of a DICOM file, which says its bits itself, what is to be known goes into the notes.
        """
        try:
            if not needs_header(self._read(path, HEAD_BYTES)):
                return None
            with in_turn(self._count_bytes(path)):
                header = read_header(self._read(path, MAX_FILE_BYTES), **self._taken)
            if "notes" in header:
                self._notes.append(header["notes"])
            return header.get("bits")
        except (UndecodableError, OSError):
            return None


@contextmanager
def open_loose_images(images: str, settings: Settings) -> Iterator[LooseImages]:
    """Opens a folder or archive of images.

    Args:
        images: The folder or archive, as the user named it.
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
        raise SourceError(f"images: {images!r} does not exist; give a folder, .zip or .tar.gz file on this machine")
    if not is_folder and (not is_file or promises_picture(images)):
        raise SourceError(
            f"images: {images} is neither a folder nor an archive; name the folder that the images are in"
        )
    with _open_folder(path, settings) if is_folder else _open_archive(path, settings) as found:
        if not found.paths:
            others = f" (left out: {found.n_left_out:,} other files or links)" if found.n_left_out else ""
            raise SourceError(
                f"images: {images} holds no image{others}; name a folder or archive with JPEG or PNG files"
            )
        yield found


@contextmanager
def _open_folder(folder: Path, settings: Settings) -> Iterator[LooseImages]:
    names, circles = list_folder(folder, "images")
    paths, n_left_out = plan_loose_images(names)

    def read(path: str, n_bytes: int) -> bytes:
        return _read_file(folder / path, n_bytes)

    yield LooseImages(paths, n_left_out + len(circles), read, lambda path: (folder / path).stat().st_size, settings)


@contextmanager
def _open_archive(path: Path, settings: Settings) -> Iterator[LooseImages]:
    try:
        with open_archive(path, settings.ingestion, Path(settings.storage.raw)) as archive:
            yield LooseImages(*plan_loose_images(archive.names), archive.read, archive.count_bytes, settings)
    except ArchiveError as error:
        raise ArchiveError(f"images: {str(error).removeprefix('source: ')}") from None


def _read_file(path: Path, n_bytes: int) -> bytes:
    """The first so many bytes of a file; refuses a pipe or device, which might never end."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise UndecodableError("is a pipe or device, not a file")
    refuse_bytes(state.st_size)
    with path.open("rb") as stream:
        return stream.read(min(n_bytes, state.st_size + 1))  # one more: a system file may hold more than its size


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
