"""File to pixels: the only preprocessing of the product, and the packed arrays that all later stages read.

Screening, training, explaining and scoring get their pixels here and nowhere else. In memory an X-ray is float32
``(height, width, 1)``, 0.0 black to 1.0 white; packed, uint8 ``(n, 224, 224)``.
"""

import io
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from tasks.records import RunError
from tasks.storage import BROKEN, read_index, read_record, sha256_of_file

SIDE_PX = 224
FORMATS = ("JPEG", "PNG")
SUFFIXES = (".jpeg", ".jpg", ".png")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what brings the picture upright."""

MAX_PIXELS = 64_000_000  # 8,000 x 8,000; guards memory, 8 bytes a pixel at most. A large detector has 20 megapixels
MAX_FILE_BYTES = 200_000_000  # guards memory: Pillow needs twice as much for what stands before the pixels
LARGE_BYTES = 40_000_000
BAND_PX = 256
_one_large = threading.RLock()

ImageFile.LOAD_TRUNCATED_IMAGES = False
Image.MAX_IMAGE_PIXELS = None  # our own bound says what it is


class UndecodableError(ValueError):
    """Bytes that are no picture we can decode; the message says why."""


@contextmanager
def in_turn(n_bytes: int) -> Iterator[None]:
    """Around what holds so many bytes in memory: of large files and pictures one at a time, whoever reads them."""
    if n_bytes < LARGE_BYTES:
        yield
        return
    with _one_large:
        yield


def read_size(data: bytes | BinaryIO, max_side_px: int) -> tuple[int, int]:
    """Width and height in pixels as a viewer shows them (EXIF orientation applied), from the header alone.

    Raises:
        UndecodableError: If the header is no JPEG or PNG header, or a side is beyond ``max_side_px``.
    """
    with _open(data, max_side_px) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def decode(
    data: bytes, *, side_px: int = SIDE_PX, padding: bool = False, max_side_px: int = 20_000
) -> NDArray[np.uint8]:
    """Decodes a JPEG or PNG to a grey square.

    Greyscale and RGB of any size, also with alpha, palette or 16 bit; the EXIF orientation is applied. The image is
    stretched to the square with antialiasing, as the data at hand was made; with ``padding`` it keeps its aspect and
    the rest is black.

    Args:
        data: The file's bytes.
        side_px: Side of the square, in pixels.
        padding: Keep the aspect and pad.
        max_side_px: Longest side that is still decoded, in pixels; guards memory.

    Returns:
        uint8 ``(side_px, side_px)``, 0 black to 255 white.

    Raises:
        UndecodableError: If the bytes do not decode, are truncated, or are too large.
    """
    with _open(data, max_side_px) as image, in_turn(2 * image.width * image.height):
        try:
            # A JPEG decodes at a half or a quarter of its size for free; twice the target keeps the resize honest.
            image.draft("L", (2 * side_px, 2 * side_px))
            grey = _turn_upright(_to_grey(image), _orientation(image))
        except UndecodableError:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds for broken bytes
            raise UndecodableError(f"does not decode ({_reason(error)})") from None
    if padding:
        grey = ImageOps.pad(grey, (side_px, side_px), method=Image.Resampling.BILINEAR, color=0)
    else:
        grey = grey.resize((side_px, side_px), Image.Resampling.BILINEAR)
    return np.asarray(grey, dtype=np.uint8)


def to_float(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Packed uint8 ``(n, side, side)`` to X-rays in memory: float32 ``(n, side, side, 1)``, 0.0 to 1.0."""
    return packed[..., None].astype(np.float32) / np.float32(255.0)


def _open(data: bytes | BinaryIO, max_side_px: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is below
            image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS)
    except Exception as error:
        raise UndecodableError(f"is no JPEG or PNG ({_reason(error)})") from None
    if image.width * image.height > MAX_PIXELS:
        raise UndecodableError(
            f"has {image.width * image.height / 1e6:,.0f} megapixels, more than {MAX_PIXELS / 1e6:g}"
        )
    if max(image.size) > max_side_px:
        raise UndecodableError(f"is {image.size[0]} x {image.size[1]} px, longer than {max_side_px} px")
    return image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where the EXIF block is missing or broken. Decodes nothing."""
    try:
        # Not image.getexif(): a PNG's own decodes the whole picture when the header brings no EXIF block.
        return int(Image.Image.getexif(image).get(0x0112, 1))
    except Exception:
        return 1


def _turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    method = TURNS.get(orientation)
    return image if method is None else image.transpose(method)


def _to_grey(image: Image.Image) -> Image.Image:
    # In bands: the steps between need up to four times the picture's memory.
    grey = Image.new("L", image.size)
    for top in range(0, image.height, BAND_PX):
        band = image.crop((0, top, image.width, min(top + BAND_PX, image.height)))
        grey.paste(_band_to_grey(band), (0, top))
    return grey


def _band_to_grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        deep = np.asarray(image, dtype=np.float32)
        # 16-bit PNG uses the full range; Pillow's own convert("L") would clip at 255.
        return Image.fromarray(np.clip(deep / 257.0 + 0.5, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("L")
    return image.convert("L")


def _reason(error: Exception) -> str:
    text = str(error).split("\n")[0]
    return "unknown format" if "cannot identify image file" in text else text[:120]


class PackedImages:
    """The packed pixels of a run: shards that stay on disk until rows of them are asked for.

    ``arrays/index.json`` holds the names of the shards in the cache and, for each image id, its shard and row.
    """

    def __init__(self, run: Path, cache: Path) -> None:
        self._index = run / "arrays" / "index.json"
        if not self._index.exists():
            raise RunError(f"{self._index} is missing: run the prepare flow on this run folder first")
        names, self._rows = read_index(self._index)
        self._paths = [cache / name for name in names]
        for path in self._paths:
            if not path.exists():
                raise RunError(f"{path} is gone from the cache: run the prepare flow again")
        self._shards: dict[int, NDArray[np.uint8]] = {}

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._rows

    def read(self, image_ids: Sequence[str]) -> NDArray[np.uint8]:
        """uint8 ``(len(image_ids), 224, 224)`` in the order asked for.

        Raises:
            RunError: If an image was not packed, or its shard is damaged.
        """
        if missing := [image_id for image_id in image_ids if image_id not in self._rows]:
            raise RunError(f"{self._index} lacks the image {missing[0]}: run the prepare flow on this run folder again")
        pixels = np.empty((len(image_ids), SIDE_PX, SIDE_PX), np.uint8)
        for i, image_id in enumerate(image_ids):
            number, row = self._rows[image_id]
            if number not in self._shards:
                self._shards[number] = open_shard(self._paths[number])
            shard = self._shards[number]
            if row >= len(shard):
                raise RunError(f"{self._paths[number]} is damaged: remove it and run the prepare flow again")
            pixels[i] = shard[row]
        return pixels


def open_shard(path: Path) -> NDArray[np.uint8]:
    """The packed pixels of a shard, uint8 ``(n, 224, 224)``, memory-mapped.

    Raises:
        RunError: If it is no such file, or its content is not what was packed (the list beside it has the sha256).
    """
    try:
        state = path.stat()
        whole = _is_as_packed(path, state.st_size, state.st_mtime_ns)
        shard = np.lib.format.open_memmap(path, mode="r")  # no other kind of file, as numpy.load would
        whole &= shard.dtype == np.uint8 and shard.ndim == 3 and shard.shape[1:] == (SIDE_PX, SIDE_PX)
    except BROKEN:
        whole = False
    if not whole:
        raise RunError(f"{path} is damaged: remove it and run the prepare flow again")
    return shard


@lru_cache(maxsize=4096)
def _is_as_packed(path: Path, n_bytes: int, mtime_ns: int) -> bool:
    listing = path.with_suffix(".json")
    said = read_record(listing).get("sha256") if listing.exists() else None
    return said is None or said == sha256_of_file(path)
