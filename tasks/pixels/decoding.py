"""File to pixels: the only preprocessing of the product, and the packed arrays that all later stages read.

Screening, training, explaining and scoring get their pixels here and nowhere else. In memory an X-ray is float32
``(height, width, 1)``, 0.0 black to 1.0 white; packed, uint8 ``(n, 224, 224)``.
"""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

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
"""EXIF orientation -> the operation that turns the picture upright."""

MAX_PIXELS = 64_000_000  # 8,000 x 8,000; guards memory, 8 bytes a pixel at most. A large detector has 20 megapixels
MAX_FILE_BYTES = 200_000_000  # guards memory: Pillow needs twice as much for data before the pixels
LARGE_BYTES = 40_000_000
BAND_PX = 256
_one_large = threading.RLock()

ImageFile.LOAD_TRUNCATED_IMAGES = False
Image.MAX_IMAGE_PIXELS = None  # our own bound has a clearer error


class UndecodableError(ValueError):
    """Bytes that cannot be decoded; the message says why."""


@contextmanager
def in_turn(n_bytes: int) -> Iterator[None]:
    """Wraps code that holds so many bytes in memory: of large files and pictures, one thread reads one at a time."""
    if n_bytes < LARGE_BYTES:
        yield
        return
    with _one_large:
        yield


def read_size(data: bytes | BinaryIO, max_side_px: int) -> tuple[int, int]:
    """Width and height in pixels as a viewer shows them (EXIF orientation applied), from the header alone.

    Raises:
        UndecodableError: If the header is not a JPEG or PNG header, or a side is beyond ``max_side_px``.
    """
    with _open(data, max_side_px) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def decode(
    data: bytes, *, side_px: int = SIDE_PX, padding: bool = False, max_side_px: int = 20_000
) -> NDArray[np.uint8]:
    """Decodes a JPEG or PNG to a grey square.

    Takes greyscale and RGB of any size, also with alpha, palette or 16 bit; applies the EXIF orientation. The image is
    stretched to the square with antialiasing, as the data at hand was made. With ``padding`` it keeps its aspect ratio,
    and the rest is black.

    Args:
        data: The file's bytes.
        side_px: Side of the square, in pixels.
        padding: Keep the aspect and pad.
        max_side_px: Longest side that is decoded, in pixels; guards memory.

    Returns:
        uint8 ``(side_px, side_px)``, 0 black to 255 white.

    Raises:
        UndecodableError: If the bytes do not decode, are truncated, or are too large.
    """
    with _open(data, max_side_px) as image, in_turn(2 * image.width * image.height):
        try:
            # A JPEG decodes at a half or a quarter of its size at no cost; twice the target keeps the resize accurate.
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
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is lower
            image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS)
    except Exception as error:
        raise UndecodableError(f"is not a JPEG or PNG ({_reason(error)})") from None
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
        # Not image.getexif(): for a PNG it decodes the whole picture when the header has no EXIF block.
        return int(Image.Image.getexif(image).get(0x0112, 1))
    except Exception:
        return 1


def _turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    method = TURNS.get(orientation)
    return image if method is None else image.transpose(method)


def _to_grey(image: Image.Image) -> Image.Image:
    # In bands: intermediate steps need up to four times the picture's memory.
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
