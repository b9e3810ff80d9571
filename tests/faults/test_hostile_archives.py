"""Whatever an archive, an image or a name brings: a right result or a named refusal, and nothing outside its folder."""

import gzip
import io
import math
import os
import random
import struct
import tarfile
import tempfile
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_table import FaultTable
from hostile import DAMAGES, bounded_memory, damage, ends_well, hostile  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tasks.errors import SourceError
from tasks.pixels.content import MAX_PIXELS, UndecodableError
from tasks.pixels.decoding import decode, read_header
from tasks.pixels.greys import SIDE_PX
from tasks.preparing.ingestion import list_images
from tasks.preparing.packing import decode_files
from tasks.scoring.loose_images import open_loose_images
from tasks.settings import IngestionSettings, Settings, StorageSettings
from tasks.sources.fetching import fetch_source
from tasks.sources.layout import plan_layout

PARTS = st.sampled_from(
    [
        "train",
        "test",
        "val",
        "NORMAL",
        "PNEUMONIA",
        "chest_xray",
        "..",
        ".",
        "",
        "__MACOSX",
        "C:",
        "~",
        "con",
        "a b",
        "ü",
        "n\nl",
        "<script>alert(1)</script>",
        "-rf",
        "x" * 255,
        "\\",
        "%2e%2e",
        "\u202egpj.exe",
        "\x00",
        "index.csv",
    ]
)
FILES = st.sampled_from(
    ["a.jpeg", "b.png", "person1_virus_2.jpeg", "._a.jpeg", ".DS_Store", "index.csv", "in.zip", "x.JPEG", "="]
)
NAMES = st.builds(lambda parts, file: "/".join([*parts, file]), st.lists(PARTS, max_size=5), FILES)
WHOLE = [
    f"{split}/{label}/{i}.png" for split in ("train", "test") for label in ("NORMAL", "PNEUMONIA") for i in range(2)
]


def picture(seed: int = 0, side: int = 16) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


PICTURE = picture()


def pack(names: list[str], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name in names:
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, method
            archive.writestr(info, PICTURE)
    return stream.getvalue()


def take_in(data: bytes, faults: FaultTable) -> bool:
    """Fetches an archive and lists its images; whether it was accepted. Fails on a stray file or an unnamed error."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "set.zip").write_bytes(data)
        where = StorageSettings(raw=str(folder / "raw"), cache=str(folder / "cache"))
        limits = IngestionSettings(max_unpacked_gb=0.01, max_members=100)
        settings = Settings(source=str(folder / "set.zip"), storage=where, ingestion=limits)
        accepted = ends_well(faults, lambda: list_images(fetch_source(settings), limits))
        strays = [p for p in folder.rglob("*") if p.name != "set.zip" and folder / "raw" not in [p, *p.parents]]
        assert strays == []
        assert not list(folder.rglob("*.partial"))
        ends_well(faults, lambda: read_loose(folder / "set.zip", settings))
        return accepted


def read_loose(archive: Path, settings: Settings) -> None:
    """Reads it as X-rays to score or to screen are read: every image becomes pixels, or has its reason."""
    with open_loose_images(str(archive), settings) as images:
        for batch in images.read_batches():
            assert len(batch.paths) == len(batch.refused)
            assert batch.pixels.shape == (batch.refused.count(""), SIDE_PX, SIDE_PX)


def pack_tar(names: list[str], mode: str, kinds: tuple[bytes, ...] = ()) -> bytes:
    """A tar with pictures of these names, then links and other members of these kinds."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(PICTURE)
            archive.addfile(entry, io.BytesIO(PICTURE))
        for i, kind in enumerate(kinds):
            entry = tarfile.TarInfo(f"train/NORMAL/odd{i}.png")
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    return stream.getvalue()


KINDS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE, b"S")


@given(
    root=st.sampled_from(["", "./", "a/b/"]),
    extra=st.lists(NAMES, max_size=4),
    mode=st.sampled_from(["w", "w:gz"]),
    kinds=st.lists(st.sampled_from(KINDS), max_size=1),
)
@hostile
def test_a_tar_with_strange_names_and_members_is_taken_in_or_refused_in_one_line(
    faults: FaultTable, root: str, extra: list[str], mode: str, kinds: list[bytes]
) -> None:
    take_in(pack_tar([root + name for name in [*WHOLE, *extra]], mode, tuple(kinds)), faults)


@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from([*DAMAGES, "headers"]), mode=st.sampled_from(["w", "w:gz"]))
@hostile
def test_a_damaged_tar_is_taken_in_or_refused_in_one_line(faults: FaultTable, seed: int, kind: str, mode: str) -> None:
    data = pack_tar(WHOLE, "w")
    if kind == "headers":  # sizes, kinds and checksums that fit a header which lies
        dice, lying = random.Random(seed), bytearray(data)
        at = dice.randrange(len(WHOLE)) * 1024 if len(PICTURE) <= 512 else 0
        lying[at + dice.choice([100, 124, 156, 257, 345])] = dice.randrange(256)
        lying[at + 124 : at + 136] = dice.choice(
            [b"77777777777\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"00000000010\0"]
        )
        lying[at + 148 : at + 156] = b" " * 8
        lying[at + 148 : at + 156] = b"%06o\0 " % sum(lying[at : at + 512])
        data = bytes(lying)
    else:
        data = damage(data, kind, seed)
    take_in(gzip.compress(data) if mode == "w:gz" else data, faults)


@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(DAMAGES), inner=st.sampled_from(["in.zip", "in.tar.gz"]))
@hostile
def test_an_archive_in_an_archive_that_is_damaged_is_taken_in_or_refused_in_one_line(
    faults: FaultTable, seed: int, kind: str, inner: str
) -> None:
    whole = pack(WHOLE) if inner == "in.zip" else pack_tar(WHOLE, "w:gz")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(inner, damage(whole, kind, seed))
    take_in(stream.getvalue(), faults)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@given(root=st.sampled_from(["", "x/", "a/b/"]), extra=st.lists(NAMES, max_size=4))
@hostile
def test_an_archive_with_strange_names_is_taken_in_or_refused_in_one_line(
    faults: FaultTable, root: str, extra: list[str]
) -> None:
    take_in(pack([root + name for name in [*WHOLE, *extra]]), faults)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("place", ["/{}/set/train/NORMAL/out.png", "/../../../../..{}/set/train/NORMAL/out.png"])
def test_a_name_that_is_absolute_only_below_the_root_of_the_data_set_writes_nothing_there(
    faults: FaultTable, tmp_path: Path, place: str, listed: bool
) -> None:
    outside = tmp_path / "outside"
    (outside / "set" / "train" / "NORMAL").mkdir(parents=True)
    kept = outside / "set" / "train" / "NORMAL" / "out.png"
    kept.write_bytes(b"mine")
    hostile_name = "x" + place.format(outside)
    archive = io.BytesIO(pack([*(f"x/{name}" for name in WHOLE), hostile_name]))
    if listed:
        with zipfile.ZipFile(archive, "a") as more:
            table = "".join(f"{name},{i % 2},p{i}\n" for i, name in enumerate([hostile_name[2:], *WHOLE]))
            more.writestr("x/index.csv", "path,label,patient_id\n" + table)
    assert take_in(archive.getvalue(), faults) == (listed and ".." not in place)  # x//y is x/y
    assert kept.read_bytes() == b"mine"
    assert list(outside.rglob("*.*")) == [kept]


@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["cut", "flip", "insert", "headers"]))
@hostile
def test_a_damaged_archive_is_taken_in_or_refused_in_one_line(faults: FaultTable, seed: int, kind: str) -> None:
    dice = random.Random(seed)
    data = bytearray(pack(WHOLE))
    if kind == "cut":
        data = data[: dice.randrange(len(data))]
    elif kind == "insert":
        at = dice.randrange(len(data))
        data[at:at] = dice.randbytes(dice.randrange(1, 50))
    else:
        # The central directory lies at the end: that is where sizes, offsets and flags can be made to lie.
        start = len(data) * 2 // 3 if kind == "headers" else 0
        for _ in range(dice.randrange(1, 12)):
            data[dice.randrange(start, len(data))] = dice.randrange(256)
    take_in(bytes(data), faults)


@given(names=st.lists(NAMES, max_size=12))
@hostile
def test_a_layout_keeps_only_names_of_the_source_or_is_refused(faults: FaultTable, names: list[str]) -> None:
    faults.n_cases += 1
    try:
        layout = plan_layout(names, "here")
    except SourceError:
        return
    assert {layout.root + image for image in layout.images} <= set(names)
    others = (layout.n_nested, layout.n_clutter, layout.n_unused, layout.n_ignored)
    assert min(others) >= 0 and sum(others) == len(layout.left_out)
    assert len(set(names)) == len(layout.images) + len(layout.tables) + sum(others)


@given(seed=st.integers(0, 2**32 - 1), form=st.sampled_from(["PNG", "JPEG"]))
@hostile
def test_a_damaged_image_decodes_to_a_square_or_is_refused(faults: FaultTable, seed: int, form: str) -> None:
    faults.n_cases += 1
    dice = random.Random(seed)
    stream = io.BytesIO()
    Image.open(io.BytesIO(picture(seed % 1000, 40))).save(stream, form)
    data = bytearray(stream.getvalue())
    for _ in range(dice.randrange(8)):
        data[dice.randrange(len(data))] = dice.randrange(256)
    data = data[: dice.randrange(1, len(data) + 1)] if dice.random() < 0.3 else data
    try:
        read_header(bytes(data), 5_000)
        square = decode(bytes(data), max_side_px=5_000)
    except UndecodableError as error:
        assert "\n" not in str(error)
        return
    assert square.shape == (SIDE_PX, SIDE_PX)
    assert square.dtype == np.uint8


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def write_behind_a_chunk(path: Path, png: bytes, n_bytes: int) -> None:
    """A PNG with so many zeros between its header and its pixels; they take no room on the disk."""
    header = len(b"\x89PNG\r\n\x1a\n") + len(chunk(b"IHDR", bytes(13)))
    checksum = zlib.crc32(b"prVt")
    for _ in range(n_bytes // 1_000_000):
        checksum = zlib.crc32(bytes(1_000_000), checksum)
    with path.open("wb") as stream:
        stream.write(png[:header] + struct.pack(">I", n_bytes) + b"prVt")
        stream.seek(n_bytes, os.SEEK_CUR)
        stream.write(struct.pack(">I", checksum) + png[header:])


def wide_picture(width: int, height: int, depth: int, colour: int, n_bytes: int) -> bytes:
    """A black PNG, packed row by row: some kilobytes that want hundreds of megabytes."""
    packer, row = zlib.compressobj(), bytes(1 + width * n_bytes)
    pixels = b"".join([packer.compress(row) for _ in range(height)] + [packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.slow
def test_of_pictures_with_much_before_or_behind_their_pixels_one_is_in_memory_at_a_time(
    faults: FaultTable, tmp_path: Path
) -> None:
    for i, name in enumerate(WHOLE):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < 3:
            write_behind_a_chunk(path, picture(i), 60_000_000)
            continue
        with path.open("wb") as stream:
            stream.write(picture(i))
            stream.truncate(150_000_000 if i < 5 else 201_000_000)
    settings = Settings(source=str(tmp_path / "set"))
    found: list[Any] = []
    tracemalloc.start()
    limits = IngestionSettings(max_side_px=5_000)
    assert ends_well(faults, lambda: found.append(list_images(fetch_source(settings), limits)[0]))
    (manifest,) = found
    said = manifest.set_index("path")["excluded"]
    assert [said[name] for name in WHOLE] == [""] * 5 + ["undecodable: has more than 200 MB"] * 3
    files = manifest[manifest["excluded"] == ""].set_index("sha256")["path"].to_dict()
    with ThreadPoolExecutor(4) as pool:
        parts = [{sha256: path} for sha256, path in files.items()]
        packed = pool.map(lambda part: decode_files(tmp_path / "set", part, padding=False, max_side_px=5_000), parts)
        assert [len(pixels) for pixels, _ in packed] == [1] * 5
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert highest < 250_000_000, "three of them, or two of which one is the largest, would take more"


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_device_in_a_folder_is_refused_by_name_without_waiting(
    faults: FaultTable, tmp_path: Path, kind: str
) -> None:
    for i, name in enumerate(WHOLE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(i))
    odd = tmp_path / "train" / "NORMAL" / "odd.png"
    os.mkfifo(odd) if kind == "pipe" else odd.symlink_to("/dev/zero")
    settings = Settings(source=str(tmp_path))
    assert not ends_well(faults, lambda: fetch_source(settings))
    with pytest.raises(SourceError, match=r"odd\.png cannot be read \(it is a pipe or device, not a file\)"):
        fetch_source(settings)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "colour", "n_bytes"), [(16, 0, 2), (8, 6, 4), (16, 6, 8)])
def test_the_largest_picture_that_is_decoded_stays_below_the_limit_of_memory(
    faults: FaultTable, depth: int, colour: int, n_bytes: int
) -> None:
    faults.n_cases += 2
    side = math.isqrt(MAX_PIXELS)
    assert decode(wide_picture(side, side, depth, colour, n_bytes)).max() == 0
    with pytest.raises(UndecodableError, match="megapixels"):
        decode(wide_picture(side + 20, side + 20, depth, colour, n_bytes))


def test_what_is_whole_is_taken_in(faults: FaultTable) -> None:
    assert take_in(pack(WHOLE), faults)
    assert take_in(pack(WHOLE, zipfile.ZIP_STORED), faults)
    assert take_in(pack([f"set/{name}" for name in WHOLE]), faults)
    assert take_in(pack_tar(WHOLE, "w"), faults)
    assert take_in(pack_tar([f"./set/{name}" for name in WHOLE], "w:gz"), faults)


@pytest.mark.parametrize(
    "name", ["train/NORMAL/a b.png", "train/NORMAL/ü.png", "train/NORMAL/n\nl.png", "train/NORMAL/<b>.png"]
)
def test_a_name_that_is_only_unusual_is_kept(faults: FaultTable, name: str) -> None:
    assert plan_layout([*WHOLE, name], "here").images.count(name) == 1
    assert take_in(pack([*WHOLE, name]), faults)
