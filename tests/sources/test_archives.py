"""Zips that are broken, hostile or too large are refused in one sentence, declared or actual."""

import random
import re
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.errors import ArchiveError
from tasks.settings import IngestionSettings
from tasks.sources.archives import open_archive

CENTRAL = b"PK\x01\x02"


def make_zip(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes], packed: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", packed) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def link(name: str, kind: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = (kind | 0o644) << 16
    return info


def patch_central(path: Path, name: str, offset: int, layout: str, value: int) -> Path:
    """Lets the archive lie about a member: changes one field of its entry in the central directory."""
    raw = bytearray(path.read_bytes())
    entry = raw.rfind(CENTRAL, 0, raw.rfind(name.encode()))
    struct.pack_into(layout, raw, entry + offset, value)
    path.write_bytes(raw)
    return path


def unpack(path: Path, out: Path, limits: IngestionSettings | None = None) -> list[str]:
    with open_archive(path, limits or IngestionSettings(), path.parent) as archive:
        archive.unpack(archive.names, "", out, lambda done, total: None)
    return archive.names


def refusal(path: Path, out: Path, limits: IngestionSettings | None = None) -> str:
    with pytest.raises(ArchiveError) as caught:
        unpack(path, out, limits)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_sound_archive_comes_out_as_it_went_in(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", ("b/c.txt", b"c" * 3_000_000), ("a.txt", b""), ("b/", b""))
    told: list[tuple[int, int]] = []
    with open_archive(path, IngestionSettings(max_ratio=10_000), tmp_path) as archive:
        archive.unpack(archive.names, "", tmp_path, lambda *s: told.append(s))
    assert archive.names == ["a.txt", "b/c.txt"]
    assert (tmp_path / "a.txt").read_bytes() == b""
    assert (tmp_path / "b/c.txt").read_bytes() == b"c" * 3_000_000
    assert told[-1] == (3_000_000, 3_000_000)


def test_only_the_members_asked_for_are_written_without_the_prefix(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", ("set/a.txt", b"a"), ("set/b.txt", b"b"), ("a.txt", b"other"))
    with open_archive(path, IngestionSettings(), tmp_path) as archive:
        archive.unpack(["a.txt"], "set/", tmp_path / "out", lambda *s: None)
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "out").iterdir()] == [("a.txt", b"a")]


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../x.jpeg",
        "a/../../x.jpeg",
        "a/..",
        "..",
        "C:/x.jpeg",
        "C:x.jpeg",
        "..\\x.jpeg",
        "a\\..\\..\\x.jpeg",
    ],
)
def test_a_name_that_leads_out_of_the_folder_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", ("a.jpeg", b"1"), (name, b"2"))
    assert "leads out of the folder" in refusal(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", ("a.jpegX.txt", b"1"))
    path.write_bytes(path.read_bytes().replace(b"a.jpegX.txt", b"a.jpeg\x00.txt"))
    assert "leads out of the folder" in refusal(path, tmp_path / "out")


def test_the_folder_itself_may_be_named_as_dropbox_does_and_doubled_slashes_stay_inside(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", ("/", b""), ("a//b.jpeg", b"1"))
    assert unpack(path, tmp_path / "out") == ["a/b.jpeg"]
    assert (tmp_path / "out" / "a" / "b.jpeg").read_bytes() == b"1"


def test_a_folder_entry_that_leads_out_is_refused_too(tmp_path: Path) -> None:
    assert "leads out" in refusal(make_zip(tmp_path / "x.zip", ("../out/", b"")), tmp_path / "out")


def test_names_with_dots_that_stay_inside_are_fine(tmp_path: Path) -> None:
    assert unpack(make_zip(tmp_path / "x.zip", ("a..b/...c.jpeg", b"1")), tmp_path / "out") == ["a..b/...c.jpeg"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_device_files_are_refused(kind: int, tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", (link("a.jpeg", kind), b"/etc/passwd"))
    assert "'a.jpeg', a link or device file" in refusal(path, tmp_path / "out")


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    path = patch_central(make_zip(tmp_path / "x.zip", ("a.jpeg", b"1")), "a.jpeg", 8, "<H", 0x1)
    assert "encrypted" in refusal(path, tmp_path / "out")


@pytest.mark.parametrize("again", ["b/a.jpeg", "./b/a.jpeg", "b//a.jpeg", "b/./a.jpeg", "B/a.JPEG"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_for_one_place_are_refused(again: str, tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", ("b/a.jpeg", b"1"), (again, b"2"))
    assert re.search("'b/a.jpeg'.* (twice|one place)", refusal(path, tmp_path / "out"))


def test_more_members_than_the_limit_are_refused_and_as_many_are_not(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", ("a", b"1"), ("b", b"2"), ("c", b"3"))
    assert "ingestion.max_members = 2" in refusal(path, tmp_path / "out", IngestionSettings(max_members=2))
    assert len(unpack(path, tmp_path / "out", IngestionSettings(max_members=3))) == 3


def test_a_declared_ratio_beyond_the_limit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", ("a.jpeg", b"1"), ("bomb.png", bytes(3_000_000)))
    assert "'bomb.png' unpacks to more than 100 times" in refusal(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_small_file_may_compress_a_thousandfold(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", ("empty_mask.png", bytes(1_000_000)))
    assert unpack(path, tmp_path / "out") == ["empty_mask.png"]


def test_a_declared_size_beyond_the_limit_is_refused_over_all_members(tmp_path: Path) -> None:
    members = [(f"{i}.bin", random.Random(i).randbytes(600_000)) for i in range(3)]
    path = make_zip(tmp_path / "x.zip", *members)
    assert "ingestion.max_unpacked_gb = 0.001 GB" in refusal(
        path, tmp_path / "out", IngestionSettings(max_unpacked_gb=0.001)
    )
    assert not (tmp_path / "out").exists()
    assert len(unpack(path, tmp_path / "out", IngestionSettings(max_unpacked_gb=0.002))) == 3


def test_a_member_that_declares_less_than_it_holds_yields_no_more_than_that_and_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", ("bomb.png", bytes(30_000_000)))
    patch_central(path, "bomb.png", 24, "<I", 1_000)
    assert "'bomb.png', which is damaged or cannot be unpacked" in refusal(path, tmp_path / "out")
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) <= 1_000


def test_a_member_that_declares_more_packed_bytes_than_there_are_cannot_hide_its_ratio(tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(4_000_000)
    path = make_zip(tmp_path / "x.zip", ("bomb.png", bytes(30_000_000)), ("noise.bin", noise))
    patch_central(path, "bomb.png", 20, "<I", 3_000_000)
    assert "declares more packed bytes than it has" in refusal(path, tmp_path / "out")


def test_a_changed_byte_in_a_member_is_damage(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", ("a.jpeg", b"hello hello"), packed=zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"hello hello", b"hellO hello"))
    assert "'a.jpeg', which is damaged or cannot be unpacked (Bad CRC-32" in refusal(path, tmp_path / "out")


def cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


@pytest.mark.parametrize("spoil", [cut, lambda raw: raw[:-1], lambda raw: b"", lambda raw: b"not a zip at all" * 100])
def test_a_file_that_is_no_zip_or_cut_short_is_refused(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", *((f"{i}.jpeg", bytes(500)) for i in range(20)))
    path.write_bytes(spoil(path.read_bytes()))
    assert "not a zip archive or tar, or is cut short" in refusal(path, tmp_path / "out")


def test_an_empty_archive_has_no_members(tmp_path: Path) -> None:
    assert unpack(make_zip(tmp_path / "x.zip"), tmp_path / "out") == []


def test_a_name_too_long_for_the_disk_ends_in_a_sentence(tmp_path: Path) -> None:
    assert "File name too long" in refusal(make_zip(tmp_path / "x.zip", ("x" * 300, b"1")), tmp_path / "out")


def test_a_file_that_is_also_a_folder_ends_in_a_sentence(tmp_path: Path) -> None:
    assert "cannot be unpacked" in refusal(make_zip(tmp_path / "x.zip", ("a", b"1"), ("a/b", b"2")), tmp_path / "out")


@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_whatever_bytes_are_changed_an_archive_is_read_whole_or_refused_in_a_sentence(
    packed: int, tmp_path: Path
) -> None:
    path, rng = tmp_path / "x.zip", random.Random(packed)
    contents = {f"a/{i}.jpeg": rng.randbytes(400) for i in range(4)}
    whole = make_zip(path, *contents.items(), packed=packed).read_bytes()
    refused = 0
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(rng.choice([1, 3])):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw)
        try:
            names = unpack(path, tmp_path / "out")
        except ArchiveError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            # A changed name is another name, but what comes out is what went in.
            assert {(tmp_path / "out" / name).read_bytes() for name in names} <= set(contents.values())
    assert refused > 50
