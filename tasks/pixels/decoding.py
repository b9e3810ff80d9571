"""File to pixels: the only preprocessing of the product, and the packed arrays that all later stages read.

Screening, training, explaining and scoring get their pixels here and nowhere else. In memory an X-ray is float32
``(height, width, 1)``, 0.0 black to 1.0 white; packed, uint8 ``(n, 224, 224)``.
"""

import io
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from tasks.pixels.content import HEAD_BYTES, TAKEN, UndecodableError, describe_refusal, name_content, refuse_size
from tasks.pixels.dicom import CLASSES, read_dicom
from tasks.pixels.greys import SIDE_PX

LARGE_BYTES = 40_000_000
BAND_PX = 256
ORIENTATION, PHOTOMETRIC = 0x0112, 0x0106  # tags of EXIF and TIFF
_one_large = threading.RLock()

ImageFile.LOAD_TRUNCATED_IMAGES = False
Image.MAX_IMAGE_PIXELS = None  # our own bound has a clearer error
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # broken tags that cost no pixel


@contextmanager
def in_turn(n_bytes: int) -> Iterator[None]:
    """Wraps code that holds so many bytes in memory: of large files and pictures, one thread reads one at a time."""
    if n_bytes < LARGE_BYTES:
        yield
        return
    with _one_large:
        yield


def read_header(
    data: bytes | BinaryIO,
    max_side_px: int = 20_000,
    dicom_classes: tuple[str, ...] = CLASSES,
    groups: tuple[str, ...] = (),
) -> dict[str, Any]:
    """``width_px`` and ``height_px`` as a viewer shows them, and ``bits``; of a DICOM also ``patient``, ``groups`` and
    ``notes`` (``dicom_reader.read_header``), but no ``bits``.

    ``bits`` are those in use of a picture with 16 bits a pixel, 0 (black) to 16: those of its largest value, and at
    least those it declares. A declaration (a PNG's ``sBIT``) is no upper bound: the PNG specification wants 12 bits
    spread over all 16. They are ``None`` for a picture of 8 bits, of which no pixel is decoded.

    Raises:
        UndecodableError: If it is no single picture of a kind that is taken, or a side is beyond ``max_side_px``; also
            if a picture with 16 bits does not decode.
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    head = stream.read(HEAD_BYTES)
    stream.seek(0)
    if name_content(head) == "DICOM":
        return read_dicom(stream.read(), max_side_px, dicom_classes, groups)
    with _open(stream, head, max_side_px) as image:
        width, height = image.size[::-1] if _orientation(image) >= 5 else image.size
        return {"width_px": width, "height_px": height, "bits": _measure_bits(image, head)}


def needs_header(head: bytes) -> bool:
    """Whether ``read_header`` may find more than a size in a file with these first bytes."""
    kind = name_content(head)
    return kind in ("TIFF", "DICOM") or (kind == "PNG" and head[24:25] == b"\x10")


def choose_bits(found: Iterable[int]) -> int:
    """The bits in use of a source, 8 to 16 and even as detectors have them; ``found`` has those of its deep pictures.

    It is one number for all: a range chosen for each picture would take its exposure away.
    """
    most = max(found, default=16) or 16
    return min(max(8, most + most % 2), 16)


def decode(
    data: bytes,
    *,
    padding: bool = False,
    max_side_px: int = 20_000,
    bits: int = 16,
    dicom_classes: tuple[str, ...] = CLASSES,
) -> NDArray[np.uint8]:
    """Decodes a picture of any kind that is taken to a grey square.

    Takes greyscale and RGB of any size, also with alpha, palette or 16 bit, of which those of the source are in use
    (``choose_bits``); applies the orientation. The image is stretched to the square with antialiasing, as the data at
    hand was made. With ``padding`` it keeps its aspect ratio, and the rest is black.

    Returns:
        uint8 ``(224, 224)``, 0 black to 255 white.

    Raises:
        UndecodableError: If the bytes do not decode, are truncated, or are too large.
    """
    if name_content(data[:HEAD_BYTES]) == "DICOM":
        grey = Image.fromarray(read_dicom(data, max_side_px, dicom_classes)["grey"])
    else:
        grey = _read_grey(data, max_side_px, bits)
    if padding:
        grey = ImageOps.pad(grey, (SIDE_PX, SIDE_PX), method=Image.Resampling.BILINEAR, color=0)
    return np.asarray(grey.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR), dtype=np.uint8)


def _read_grey(data: bytes, max_side_px: int, bits: int) -> Image.Image:
    """The whole picture, upright, in grey (mode ``L``); a JPEG at least twice as large as needed."""
    image = _open(io.BytesIO(data), data[:HEAD_BYTES], max_side_px)
    with image, in_turn(2 * image.width * image.height), _named_errors():
        # A JPEG decodes at a half or a quarter of its size at no cost; twice the target keeps the resize accurate.
        image.draft("L", (2 * SIDE_PX, 2 * SIDE_PX))
        grey = _to_grey(image, bits)
        grey.getexif()[ORIENTATION] = _orientation(image)
        ImageOps.exif_transpose(grey, in_place=True)
        return grey


def _open(stream: BinaryIO, head: bytes, max_side_px: int) -> ImageFile.ImageFile:
    if (kind := name_content(head)) not in TAKEN:
        raise UndecodableError(describe_refusal(head))
    with _named_errors():
        image = Image.open(stream, formats=(kind.upper(),))
    refuse_size(*image.size, max_side_px)
    if image.mode in ("I", "F"):
        raise UndecodableError("has signed, 32-bit or floating-point pixels, whose range is unknown; export 16 bits")
    # A JPEG of a phone (MPO) may carry a second picture for its brightness.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise UndecodableError("has several frames; export them as files of their own")
    return image


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except UndecodableError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for broken bytes
        text = str(error).split("\n")[0]
        reason = "unknown format" if "cannot identify image file" in text else text[:120]
        raise UndecodableError(f"does not decode ({reason})") from None


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether a picture has more than 8 bits a pixel; from the header alone."""
    return image.mode.startswith("I") or (bool(image.tile) and ";16" in str(image.tile[0].args))


def _measure_bits(image: ImageFile.ImageFile, head: bytes) -> int | None:
    if not _is_deep(image):
        return None
    colour = not image.mode.startswith("I")  # of which Pillow keeps the upper 8 bits
    declared = re.search(rb"sBIT([\x01-\x10])", head.partition(b"IDAT")[0]) if image.format == "PNG" else None
    with in_turn(2 * image.width * image.height), _named_errors():
        peak = max(int(np.asarray(band).max()) for band in _bands(image))
    return max(peak.bit_length() + (8 if colour and peak else 0), declared[1][0] if declared else 0)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where the EXIF block is missing or broken. Decodes nothing."""
    try:
        # Not image.getexif(): for a PNG it decodes the whole picture when the header has no EXIF block.
        found = int(Image.Image.getexif(image).get(ORIENTATION, 1))
    except Exception:
        return 1
    return found if found <= 8 and image.format != "TIFF" else 1  # Pillow turns a TIFF itself


def _bands(image: Image.Image) -> Iterator[Image.Image]:
    # In bands: intermediate steps need up to four times the picture's memory.
    for top in range(0, image.height, BAND_PX):
        yield image.crop((0, top, image.width, min(top + BAND_PX, image.height)))


def _to_grey(image: ImageFile.ImageFile, bits: int) -> Image.Image:
    if _is_deep(image) and not image.mode.startswith("I") and bits < 16:
        raise UndecodableError(f"has colours of which {bits} of 16 bits are used; export it in grey or with 8 bits")
    white_is_zero = image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0
    grey = Image.new("L", image.size)
    for top, band in enumerate(_bands(image)):
        grey.paste(_band_to_grey(band, bits), (0, top * BAND_PX))
    return ImageOps.invert(grey) if white_is_zero else grey


def _band_to_grey(image: Image.Image, bits: int) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own convert("L") would clip at 255.
        deep = np.asarray(image, dtype=np.float32) / ((2**bits - 1) / 255)
        return Image.fromarray(np.clip(deep + 0.5, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("L")
    return image.convert("L")
