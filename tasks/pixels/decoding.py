"""File to pixels: the only preprocessing of the product, and the packed arrays that all later stages read.

Screening, training, explaining and scoring get their pixels here and nowhere else. In memory an X-ray is float32
``(height, width, 1)``, 0.0 black to 1.0 white; packed, uint8 ``(n, 224, 224)``.
"""

import io
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

from tasks.pixels.content import HEAD_BYTES, TAKEN, describe_refusal, name_content
from tasks.pixels.dicom import CLASSES, DicomRules, RefusedDicomError, read_dicom_grey, read_dicom_header
from tasks.pixels.greys import SIDE_PX

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
NOT_WHOLE = 1  # the bit of a TIFF's NewSubfileType that says: a smaller version of another picture
_one_large = threading.RLock()

ImageFile.LOAD_TRUNCATED_IMAGES = False
Image.MAX_IMAGE_PIXELS = None  # our own bound has a clearer error
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # broken tags that cost no pixel


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


def read_header(
    data: bytes | BinaryIO, max_side_px: int, dicom_classes: tuple[str, ...] = CLASSES, groups: tuple[str, ...] = ()
) -> dict[str, Any]:
    """``width_px``, ``height_px`` and ``bits`` of a picture; of a DICOM also ``patient``, ``groups`` and ``notes``.

    Args:
        data: The file.
        max_side_px: Longest side that is decoded.
        dicom_classes: SOP classes of DICOM files that are taken.
        groups: Names of values of a DICOM file that are asked for (``dicom_reader.GROUP_TAGS``).

    Raises:
        UndecodableError: As ``read_size`` and ``measure_bits``.
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    if name_content(stream.read(HEAD_BYTES)) == "DICOM":
        stream.seek(0)
        with _named_errors():
            return read_dicom_header(stream.read(), DicomRules(max_side_px, MAX_PIXELS, dicom_classes), groups)
    stream.seek(0)
    width_px, height_px = read_size(stream, max_side_px)
    stream.seek(0)
    return {"width_px": width_px, "height_px": height_px, "bits": measure_bits(stream, max_side_px)}


def read_size(data: bytes | BinaryIO, max_side_px: int) -> tuple[int, int]:
    """Width and height in pixels as a viewer shows them (orientation applied), from the header alone.

    Raises:
        UndecodableError: If it is no single picture of a kind that is taken, or a side is beyond ``max_side_px``.
    """
    with _open(data, max_side_px) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def measure_bits(data: bytes | BinaryIO, max_side_px: int = 20_000) -> int | None:
    """The bits in use of a picture with 16 bits a pixel: those of its largest value, and at least those it declares.

    A declaration (a PNG's ``sBIT``) is no upper bound: the PNG specification wants 12 bits spread over all 16.

    Returns:
        0 (black) to 16; ``None`` for a picture of 8 bits, of which no pixel is decoded.

    Raises:
        UndecodableError: If it does not decode.
    """
    with _open(data, max_side_px) as image, in_turn(2 * image.width * image.height):
        if not _is_deep(image):
            return None
        colour = not image.mode.startswith("I")  # of which Pillow keeps the upper 8 bits
        with _named_errors():
            declared = _declared_bits(image)
            peak = max(int(np.asarray(band).max()) for band in _bands(image))
        return max(peak.bit_length() + (8 if colour and peak else 0), declared)


def may_be_deep(head: bytes) -> bool:
    """Whether a file with these first bytes can have more than 8 bits a pixel, so that it is worth reading whole."""
    kind = name_content(head)
    return kind == "TIFF" or (kind == "PNG" and head[24:25] == b"\x10")


def choose_bits(found: Iterable[int | None]) -> int:
    """The bits in use of a source, 8 to 16 and even as detectors have them; ``found`` has those of its pictures.

    It is one number for all: a range chosen for each picture would take its exposure away.
    """
    most = max((bits for bits in found if bits is not None), default=16) or 16
    return min(max(8, most + most % 2), 16)


def decode(
    data: bytes,
    *,
    side_px: int = SIDE_PX,
    padding: bool = False,
    max_side_px: int = 20_000,
    bits: int = 16,
    dicom_classes: tuple[str, ...] = CLASSES,
) -> NDArray[np.uint8]:
    """Decodes a picture of any kind that is taken to a grey square.

    Takes greyscale and RGB of any size, also with alpha, palette or 16 bit; applies the orientation. The image is
    stretched to the square with antialiasing, as the data at hand was made. With ``padding`` it keeps its aspect ratio,
    and the rest is black.

    Args:
        data: The file's bytes.
        side_px: Side of the square, in pixels.
        padding: Keep the aspect and pad.
        max_side_px: Longest side that is decoded, in pixels; guards memory.
        bits: Bits in use of a picture with 16 bits, as its source has them (``choose_bits``); others ignore it.
        dicom_classes: SOP classes of DICOM files that are taken.

    Returns:
        uint8 ``(side_px, side_px)``, 0 black to 255 white.

    Raises:
        UndecodableError: If the bytes do not decode, are truncated, or are too large.
    """
    if name_content(data[:HEAD_BYTES]) == "DICOM":
        with _named_errors():
            grey = Image.fromarray(read_dicom_grey(data, DicomRules(max_side_px, MAX_PIXELS, dicom_classes)))
    else:
        grey = _read_grey(data, side_px, max_side_px, bits)
    if padding:
        grey = ImageOps.pad(grey, (side_px, side_px), method=Image.Resampling.BILINEAR, color=0)
    else:
        grey = grey.resize((side_px, side_px), Image.Resampling.BILINEAR)
    return np.asarray(grey, dtype=np.uint8)


def _read_grey(data: bytes, side_px: int, max_side_px: int, bits: int) -> Image.Image:
    """The whole picture, upright, in grey (mode ``L``); a JPEG at least twice as large as ``side_px``."""
    with _open(data, max_side_px) as image, in_turn(2 * image.width * image.height), _named_errors():
        # A JPEG decodes at a half or a quarter of its size at no cost; twice the target keeps the resize accurate.
        image.draft("L", (2 * side_px, 2 * side_px))
        return _turn_upright(_to_grey(image, bits), _orientation(image))


def _open(data: bytes | BinaryIO, max_side_px: int) -> ImageFile.ImageFile:
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    head = stream.read(HEAD_BYTES)
    stream.seek(0)
    if (kind := name_content(head)) not in TAKEN or kind == "DICOM":
        raise UndecodableError(describe_refusal(head))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is lower
            image = Image.open(stream, formats=(kind.upper(),))
    except Exception as error:
        raise UndecodableError(f"does not decode ({_reason(error)})") from None
    if image.width * image.height > MAX_PIXELS:
        raise UndecodableError(
            f"has {image.width * image.height / 1e6:,.0f} megapixels, more than {MAX_PIXELS / 1e6:g}"
        )
    if max(image.size) > max_side_px:
        raise UndecodableError(f"is {image.size[0]} x {image.size[1]} px, longer than {max_side_px} px")
    _refuse_frames(image)
    return image


def _refuse_frames(image: ImageFile.ImageFile) -> None:
    """Refuses what is more, or less, than one picture. A JPEG of a phone may carry a second one for its brightness."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if NOT_WHOLE & int(image.tag_v2.get(254, 0)) or 50706 in image.tag_v2:
            raise UndecodableError("is a camera RAW file with a thumbnail; export it as PNG")
        if image.mode == "F" or 3 in image.tag_v2.get(339, ()):
            raise UndecodableError("has floating-point pixels, whose range is unknown; export it with 16 bits")
        with _named_errors(), suppress(EOFError):
            image.seek(1)  # not n_frames, which reads them all
            raise UndecodableError("has several frames; export them as files of their own")
        image.seek(0)
    elif image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
        raise UndecodableError("has several frames; export them as files of their own")


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except (UndecodableError, EOFError):
        raise
    except RefusedDicomError as error:
        raise UndecodableError(str(error)) from None
    except Exception as error:  # Pillow's decoders raise many kinds for broken bytes
        raise UndecodableError(f"does not decode ({_reason(error)})") from None


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether a picture has more than 8 bits a pixel; from the header alone."""
    return image.mode.startswith("I") or (bool(image.tile) and ";16" in str(image.tile[0].args))


def _declared_bits(image: ImageFile.ImageFile) -> int:
    """The bits that a picture says it uses: those of a TIFF, where fewer than 16, and a PNG's ``sBIT``; else 0."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = int(image.tag_v2.get(258, (16,))[0])
        return bits if bits < 16 else 0
    if (stream := image.fp) is None:
        return 0
    place = stream.tell()
    stream.seek(8)
    try:
        while (head := stream.read(8))[4:] not in (b"IDAT", b"IEND", b"PLTE") and len(head) == 8:
            n_bytes = int.from_bytes(head[:4])
            if head[4:] == b"sBIT":
                return max((bits for bits in stream.read(min(n_bytes, 3)) if bits <= 16), default=0)
            stream.seek(n_bytes + 4, io.SEEK_CUR)
    finally:
        stream.seek(place)
    return 0


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where the EXIF block is missing or broken. Decodes nothing."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1  # Pillow turns a TIFF itself
    try:
        # Not image.getexif(): for a PNG it decodes the whole picture when the header has no EXIF block.
        return int(Image.Image.getexif(image).get(0x0112, 1))
    except Exception:
        return 1


def _turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    method = TURNS.get(orientation)
    return image if method is None else image.transpose(method)


def _bands(image: Image.Image) -> Iterator[Image.Image]:
    # In bands: intermediate steps need up to four times the picture's memory.
    for top in range(0, image.height, BAND_PX):
        yield image.crop((0, top, image.width, min(top + BAND_PX, image.height)))


def _to_grey(image: ImageFile.ImageFile, bits: int) -> Image.Image:
    if _is_deep(image) and not image.mode.startswith("I") and bits < 16:
        raise UndecodableError(f"has colours of which {bits} of 16 bits are used; export it in grey or with 8 bits")
    inverted = image.mode.startswith("I") and _is_white_zero(image)
    grey = Image.new("L", image.size)
    for top, band in enumerate(_bands(image)):
        grey.paste(_band_to_grey(band, bits, inverted), (0, top * BAND_PX))
    return grey


def _is_white_zero(image: Image.Image) -> bool:
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(262) == 0


def _band_to_grey(image: Image.Image, bits: int, inverted: bool) -> Image.Image:
    if image.mode.startswith("I"):
        deep = np.asarray(image, dtype=np.float32)
        if deep.min() < 0 or deep.max() > 65_535:
            raise UndecodableError("has values beyond 0 to 65,535; export it with 16 bits")
        deep = 2**bits - 1 - deep if inverted else deep
        # Pillow's own convert("L") would clip at 255.
        return Image.fromarray(np.clip(deep / ((2**bits - 1) / 255) + 0.5, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("L")
    return image.convert("L")


def _reason(error: Exception) -> str:
    text = str(error).split("\n")[0]
    return "unknown format" if "cannot identify image file" in text else text[:120]
