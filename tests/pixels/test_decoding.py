"""Every file becomes the same kind of square grey pixels, or a reason why not."""

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tasks.errors import RunError
from tasks.pixels.content import UndecodableError
from tasks.pixels.decoding import choose_bits, decode, read_header
from tasks.pixels.greys import SIDE_PX, to_float
from tasks.pixels.packed import PackedImages

# How each EXIF orientation has to be stored so that a viewer shows it upright.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: a.T[::-1],
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: a.T[:, ::-1],
}


def encode(image: Image.Image | NDArray[Any], form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, form, **options)
    return stream.getvalue()


def read_size(data: bytes, max_side_px: int = 2_000) -> tuple[int, int]:
    header = read_header(data, max_side_px)
    return header["width_px"], header["height_px"]


def measure_bits(data: bytes) -> int | None:
    bits: int | None = read_header(data)["bits"]
    return bits


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def quadrants(height_px: int = 64, width_px: int = 96) -> NDArray[np.uint8]:
    """Black, dark / light, white: no two turns of it look the same."""
    image = np.zeros((height_px, width_px), np.uint8)
    image[: height_px // 2, width_px // 2 :] = 80
    image[height_px // 2 :, : width_px // 2] = 160
    image[height_px // 2 :, width_px // 2 :] = 255
    return image


def corners(square: NDArray[np.uint8]) -> list[int]:
    n = len(square)
    return [int(square[y, x]) for y in (n // 4, 3 * n // 4) for x in (n // 4, 3 * n // 4)]


def noise(height_px: int = 90, width_px: int = 120) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height_px, width_px), dtype=np.uint8)


def modes() -> dict[str, bytes]:
    grey = quadrants()
    image = Image.fromarray(grey)
    return {
        "grey PNG": encode(image),
        "RGB PNG": encode(image.convert("RGB")),
        "RGBA PNG": encode(image.convert("RGBA")),
        "grey and alpha PNG": encode(image.convert("LA")),
        "palette PNG": encode(image.quantize(16)),
        "16-bit PNG": encode(grey.astype(np.uint16) * 257),
        "grey JPEG": encode(image, "JPEG", quality=95),
        "RGB JPEG": encode(image.convert("RGB"), "JPEG", quality=95),
        "progressive JPEG": encode(image, "JPEG", quality=95, progressive=True),
        "CMYK JPEG": encode(image.convert("RGB").convert("CMYK"), "JPEG", quality=95),
        "TIFF": encode(image, "TIFF"),
        "16-bit TIFF": encode(grey.astype(np.uint16) * 257, "TIFF", compression="tiff_lzw"),
        "16-bit TIFF, big-endian": encode(Image.fromarray(grey.astype(">u2") * 257), "TIFF"),
        "16-bit TIFF, white is zero": encode(65_535 - grey.astype(np.uint16) * 257, "TIFF", tiffinfo={262: 0}),
        "BMP": encode(image, "BMP"),
        "RGB BMP": encode(image.convert("RGB"), "BMP"),
        "WebP": encode(image, "WebP", quality=95),
    }


@pytest.mark.parametrize("name", list(modes()))
def test_a_picture_in_any_mode_becomes_the_same_grey_square(name: str) -> None:
    data = modes()[name]
    square = decode(data)
    assert square.shape == (SIDE_PX, SIDE_PX)
    assert square.dtype == np.uint8
    assert corners(square) == pytest.approx([0, 80, 160, 255], abs=3)
    assert read_size(data) == (96, 64)


def test_a_one_bit_picture_is_black_and_white() -> None:
    assert corners(decode(encode(Image.fromarray(quadrants()).point(lambda v: 255 * (v > 100)).convert("1")))) == [
        0,
        0,
        255,
        255,
    ]


def test_transparent_pixels_are_black() -> None:
    pixels = np.full((32, 32, 4), 255, np.uint8)
    pixels[:16, :, 3] = 0
    assert corners(decode(encode(pixels))) == [0, 0, 255, 255]


@pytest.mark.parametrize("orientation", list(STORED))
@pytest.mark.parametrize(
    "kind", ["grey JPEG", "RGB JPEG", "grey PNG", "RGBA PNG", "16-bit PNG", "grey WEBP", "16-bit TIFF"]
)
def test_the_exif_orientation_is_applied_to_size_and_pixels(kind: str, orientation: int) -> None:
    stored = np.ascontiguousarray(STORED[orientation](quadrants()))
    image = Image.fromarray(stored.astype(np.uint16) * 257 if "16-bit" in kind else stored)
    image = image.convert("RGBA" if "RGBA" in kind else "RGB") if "RGB" in kind else image
    data = encode(image, kind.split()[-1], exif=exif(orientation))
    assert read_size(data) == (96, 64)
    assert corners(decode(data)) == pytest.approx([0, 80, 160, 255], abs=5)


@pytest.mark.parametrize("block", [b"Exif\0\0garbage", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_does_not_cost_the_picture(block: bytes) -> None:
    data = encode(quadrants(), "JPEG", quality=95, exif=block)
    assert read_size(data) == (96, 64)
    assert corners(decode(data)) == pytest.approx([0, 80, 160, 255], abs=3)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 2), (224, 224), (2_000, 1_500)])
@pytest.mark.parametrize("padding", [False, True])
def test_any_size_becomes_the_square(size: tuple[int, int], padding: bool) -> None:
    data = encode(Image.new("L", size, 200))
    square = decode(data, padding=padding)
    assert read_size(data) == size
    assert square.shape == (SIDE_PX, SIDE_PX)
    assert square.max() == 200


def test_stretching_fills_the_square_and_padding_keeps_the_aspect_with_black_around() -> None:
    data = encode(Image.new("L", (400, 200), 200))
    assert decode(data).min() == 200
    padded = decode(data, padding=True)
    assert padded[:50].max() == padded[-50:].max() == 0
    assert padded[62:162].min() == 200


def test_a_square_of_the_right_size_is_left_as_it_is() -> None:
    pixels = noise(SIDE_PX, SIDE_PX)
    assert np.array_equal(decode(encode(pixels)), pixels)


def test_shrinking_averages_instead_of_picking_pixels() -> None:
    checkers = (np.indices((896, 896)).sum(0) % 2 * 255).astype(np.uint8)
    assert decode(encode(checkers)).astype(int) == pytest.approx(np.full((224, 224), 127), abs=2)


def test_a_large_jpeg_that_is_read_at_part_of_its_size_looks_like_the_whole_one() -> None:
    detailed = Image.fromarray(noise(120, 160)).resize((1_600, 1_200), Image.Resampling.BICUBIC)
    data = encode(detailed, "JPEG", quality=95)
    honest = np.asarray(detailed.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR), dtype=int)
    assert np.abs(decode(data).astype(int) - honest).mean() < 1.0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"hello, I am a text file named x.jpeg", "is not a JPEG, PNG, TIFF, BMP, WebP or DICOM (unknown format)"),
        (b"\xff\xd8\xff", "does not decode (unknown format)"),
        (b"\x89PNG\r\n\x1a\n", "does not decode (unknown format)"),
        (b"\n <!DOCTYPE html><title>Sign in", "is an HTML page, as a server sends it in place of a file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer and not the picture itself; fetch"),
        (b"BMW is a maker of cars", "is not a JPEG"),
        (encode(noise(), "GIF"), "is a GIF, not a JPEG, PNG, TIFF, BMP, WebP or DICOM"),
        (encode(noise(), "PDF"), "is a PDF, not"),
        (encode(noise(), "JPEG2000"), "is a JPEG 2000, not"),
        (encode(Image.fromarray(noise()).convert("RGB"), "AVIF"), "is a HEIC or AVIF, not"),
        (
            encode(Image.fromarray(noise()), "TIFF", save_all=True, append_images=[Image.new("L", (5, 5))]),
            "has several",
        ),
        (
            encode(Image.fromarray(noise()), "PNG", save_all=True, append_images=[Image.new("L", (120, 90))]),
            "has several",
        ),
        (encode(noise().astype(np.float32), "TIFF"), "has signed, 32-bit or floating-point pixels, whose range"),
        (encode(noise().astype(np.int32), "TIFF"), "has signed, 32-bit or floating-point pixels, whose range"),
    ],
)
def test_what_is_no_single_picture_that_is_taken_is_called_what_it_is_from_the_header_on(
    data: bytes, reason: str
) -> None:
    for read in (lambda: read_header(data, 1_000), lambda: decode(data)):
        with pytest.raises(UndecodableError) as caught:
            read()
        assert str(caught.value).startswith(reason)


def test_the_second_picture_that_a_phone_puts_into_a_jpeg_does_not_cost_the_first() -> None:
    image = Image.fromarray(quadrants())
    data = encode(image, "MPO", save_all=True, append_images=[image.point(lambda v: 255 - v)], quality=95)
    assert read_size(data) == (96, 64)
    assert corners(decode(data)) == pytest.approx([0, 80, 160, 255], abs=3)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])  # of a TIFF, the header may lie at the end
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_a_truncated_picture_has_a_size_but_no_pixels(form: str, kept: float) -> None:
    data = encode(noise(), form)
    cut = data[: int(len(data) * kept)]
    if form == "PNG" or kept > 0.5:
        assert read_size(cut) == (120, 90)
    with pytest.raises(UndecodableError) as caught:
        decode(cut)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "BMP", "WebP"])
def test_whatever_bytes_are_changed_a_picture_decodes_or_is_refused_with_a_reason(form: str) -> None:
    data, rng, refused = encode(noise(40, 50), form), np.random.default_rng(1), 0
    for _ in range(200):
        raw = bytearray(data)
        for place in rng.integers(0, len(raw), 3):
            raw[place] = rng.integers(0, 256)
        try:
            assert read_header(bytes(raw), 1_000)["bits"] in (None, *range(17))
            assert decode(bytes(raw), max_side_px=1_000).shape == (SIDE_PX, SIDE_PX)
        except UndecodableError as error:
            assert str(error)
            refused += 1
    assert refused > 0


def with_declared_bits(data: bytes, bits: int) -> bytes:
    """A PNG with the chunk ``sBIT``."""
    chunk = b"sBIT" + bytes([bits])
    return data[:33] + len(chunk[4:]).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4) + data[33:]


def test_the_bits_in_use_are_those_of_the_largest_value_and_at_least_those_declared() -> None:
    dark = encode(quadrants().astype(np.uint16))  # 0 to 255 of 65,535
    assert measure_bits(dark) == 8
    assert measure_bits(with_declared_bits(dark, 12)) == 12
    spread = encode(quadrants().astype(np.uint16) * 257)
    assert measure_bits(with_declared_bits(spread, 12)) == 16, "as the specification of PNG wants it"
    assert [
        measure_bits(encode(np.full((9, 9), top, np.uint16), form)) for form in ("PNG", "TIFF") for top in (0, 4095)
    ] == [
        0,
        12,
        0,
        12,
    ]
    assert measure_bits(encode(quadrants())) is None


def test_the_bits_of_a_source_are_even_and_those_of_its_brightest_picture() -> None:
    assert [choose_bits(found) for found in ([], [0], [3], [9, 4], [11], [12, 16], [13])] == [
        *(16, 16, 8, 10, 12, 16, 14),
    ]


def test_a_picture_with_12_of_16_bits_looks_like_the_one_with_8_and_keeps_its_exposure() -> None:
    deep = ((quadrants().astype(np.uint32) * 4095 + 127) // 255).astype(np.uint16)
    assert corners(decode(encode(deep), bits=12)) == pytest.approx([0, 80, 160, 255], abs=1)
    assert corners(decode(encode(deep // 2), bits=12)) == pytest.approx([0, 40, 80, 127], abs=1)
    white_is_zero = encode(4095 - deep, "TIFF", tiffinfo={262: 0})
    assert corners(decode(white_is_zero, bits=12)) == pytest.approx([0, 80, 160, 255], abs=1)
    assert np.array_equal(decode(encode(quadrants()), bits=12), decode(encode(quadrants()))), "8 bits are 8 bits"


def rgb16(top: int) -> bytes:
    """A PNG with 16 bits for each of three colours, which Pillow does not write: 2 x 1 pixels, black and ``top``."""
    rows = b"\0" + bytes(6) + top.to_bytes(2) * 3
    chunks = [(b"IHDR", b"\0\0\0\2\0\0\0\1\x10\2\0\0\0"), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4) for kind, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_colours_with_16_bits_are_read_where_all_are_used_and_else_refused() -> None:
    assert decode(rgb16(65_535)).max() == 255
    assert (measure_bits(rgb16(65_535)), measure_bits(rgb16(4095))) == (16, 12)
    with pytest.raises(UndecodableError, match="has colours of which 12 of 16 bits are used"):
        decode(rgb16(4095), bits=12)


def test_a_picture_with_a_side_beyond_the_limit_is_refused_and_one_at_the_limit_is_not() -> None:
    data = encode(Image.new("L", (300, 10)))
    assert read_size(data, 300) == (300, 10)
    for read in (lambda: read_size(data, 299), lambda: decode(data, max_side_px=299)):
        with pytest.raises(UndecodableError, match="is 300 x 10 px, longer than 299 px"):
            read()


def test_packed_pixels_become_floats_from_0_to_1_with_a_channel() -> None:
    packed = np.array([[[0, 51], [102, 255]]], np.uint8)
    floats = to_float(packed)
    assert floats.shape == (1, 2, 2, 1)
    assert floats.dtype == np.float32
    assert floats[..., 0].tolist() == [[[0.0, pytest.approx(0.2)], [pytest.approx(0.4), 1.0]]]


def test_packed_images_come_in_the_order_asked_for_from_any_shard(tmp_path: Path) -> None:
    shards = []
    for k in range(2):
        address = tmp_path / f"{k}.npy"
        np.save(address, np.stack([np.full((SIDE_PX, SIDE_PX), 10 * k + row, np.uint8) for row in range(2)]))
        shards.append({"name": address.name})
    index = {"shards": shards, "images": {"a": [0, 0], "b": [0, 1], "c": [1, 0], "d": [1, 1]}}
    (tmp_path / "arrays").mkdir()
    (tmp_path / "arrays" / "index.json").write_text(json.dumps(index))
    images = PackedImages(tmp_path, tmp_path)
    assert images.read(["d", "a", "c", "d"])[:, 0, 0].tolist() == [11, 0, 10, 11]
    assert images.read([]).shape == (0, SIDE_PX, SIDE_PX)
    assert "a" in images
    assert "z" not in images
    with pytest.raises(RunError, match="lacks the image"):
        images.read(["z"])
    (tmp_path / shards[1]["name"]).unlink()
    with pytest.raises(RunError, match=r"1\.npy is gone from the cache"):
        PackedImages(tmp_path, tmp_path)


def test_a_run_folder_without_arrays_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="run the prepare flow"):
        PackedImages(tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["person109_bacteria_519.jpeg", "person3_virus_15.jpeg"])
def test_a_full_size_original_decodes_to_nearly_the_pixels_of_its_small_copy(shared_data: Path, name: str) -> None:
    large = decode((shared_data / "full_resolution" / name).read_bytes())
    with zipfile.ZipFile(shared_data / "chest_xray_224.zip") as archive:
        member = next(n for n in archive.namelist() if n.endswith(f"/{name}") and "__MACOSX" not in n)
        small = decode(archive.read(member))
    assert np.abs(large.astype(int) - small.astype(int)).mean() < 3.0
