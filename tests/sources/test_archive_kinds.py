"""Archives as people have them: tars, names of Windows and macOS, one inside another; what is none is named."""

import gzip
import hashlib
import io
import random
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_archives import make_zip, patch_central, refusal, unpack

from tasks.errors import ArchiveError
from tasks.scoring.loose_images import open_loose_images
from tasks.settings import IngestionSettings, Settings, StorageSettings
from tasks.sources.fetching import fetch_source

TREE = {f"train/NORMAL/{i}.png": random.Random(i).randbytes(900) for i in range(3)} | {"test/ü b.png": b"1"}


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w", *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for entry in extra:
            archive.addfile(entry, io.BytesIO(bytes(entry.size)))
    return path


def entry_of(name: str, kind: bytes, target: str = "", size: int = 0) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, target, size
    return entry


def files_below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz"), ("x.tgz", "w:gz"), ("x.zip", "w:gz")])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar_packed_or_not_comes_out_as_it_went_in_whatever_its_name(
    name: str, mode: str, form: int, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / name, mode, format=form) as archive:  # type: ignore[call-overload]
        for below in TREE:
            (tmp_path / "set" / below).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / below).write_bytes(TREE[below])
        archive.add(tmp_path / "set", ".")
    assert unpack(tmp_path / name, tmp_path / "out") == sorted(TREE)
    assert files_below(tmp_path / "out") == TREE
    assert {p.name for p in tmp_path.iterdir()} == {name, "set", "out"}, "nothing is left beside it"


@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a/../../x.png", "..\\x.png", "C:/x.png"])
def test_a_name_in_a_tar_that_leads_out_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    assert "leads out of the folder" in refusal(make_tar(tmp_path / "x.tar", {"a": b"", name: b"1"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"Z"])
def test_links_devices_and_unknown_members_of_a_tar_are_refused(kind: bytes, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", {"a.png": b"1"}, "w", entry_of("b.png", kind, "a.png"))
    assert "'b.png', a link or device file; pack it again without links" in refusal(path, tmp_path / "out")


def test_a_sparse_member_that_would_grow_is_refused(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("b.png")
    entry.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "100000000000"}
    path = make_tar(tmp_path / "x.tar", {"a.png": b"1"}, "w", entry)
    assert "a link or device file" in refusal(path, tmp_path / "out")


def test_a_tar_holds_the_limits_of_a_zip(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", {name: bytes(600_000) for name in "abc"})
    assert "ingestion.max_members = 2" in refusal(path, tmp_path / "out", IngestionSettings(max_members=2))
    assert "max_unpacked_gb = 0.001 GB" in refusal(path, tmp_path / "out", IngestionSettings(max_unpacked_gb=0.001))
    twice = make_tar(tmp_path / "y.tar", {"a/b.png": b"1", "a//B.png": b"2"})
    assert "one place on many machines" in refusal(twice, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_packed_tar_that_unpacks_to_far_more_is_given_up_where_the_limit_is_reached(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tgz", {"a.png": bytes(30_000_000)}, "w:gz")
    assert "what it packs unpacks to more than 100 times its packed size" in refusal(path, tmp_path / "out")
    limits = IngestionSettings(max_ratio=1e6, max_unpacked_gb=0.001)
    assert "ingestion.max_unpacked_gb = 0.001 GB" in refusal(path, tmp_path / "out", limits)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_a_header_of_a_tar_as_long_as_a_film_is_not_read_into_memory(kind: bytes, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", {}, "w", entry_of("x", kind, size=80_000_000))
    assert "not a zip archive or tar, or is cut short" in refusal(path, tmp_path / "out")


def test_a_tar_of_headers_that_follow_each_other_for_ever_ends_in_a_sentence(tmp_path: Path) -> None:
    header = entry_of("x", tarfile.XHDTYPE, size=512).tobuf(tarfile.USTAR_FORMAT) + b"12 path=abc\n".ljust(512, b"\x00")
    (tmp_path / "x.tar").write_bytes(header * 5_000)
    refusal(tmp_path / "x.tar", tmp_path / "out")


@pytest.mark.parametrize(
    "spoil", [lambda raw: raw[:-300], lambda raw: raw[:40], lambda raw: raw[:200] + b"x" + raw[201:]]
)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_that_is_cut_short_or_damaged_is_refused(
    spoil: Callable[[bytes], bytes], mode: str, tmp_path: Path
) -> None:
    path = make_tar(tmp_path / "x.tar", {"a.png": random.Random(0).randbytes(20_000)}, mode)
    raw = path.read_bytes()
    path.write_bytes(spoil(raw) if mode == "w:gz" else spoil(raw[:15_000]))
    refusal(path, tmp_path / "out")


# -- zips of other machines --------------------------------------------------------------------------------------------


def test_names_with_backslashes_are_those_of_windows(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", ("train\\", b""), ("train\\NORMAL\\a.png", b"1"), ("b.png", b"2"))
    assert unpack(path, tmp_path / "out") == ["b.png", "train/NORMAL/a.png"]
    assert files_below(tmp_path / "out") == {"b.png": b"2", "train/NORMAL/a.png": b"1"}


@pytest.mark.parametrize(
    ("stored", "flag", "name"),
    [
        (unicodedata.normalize("NFD", "Müller/ä.png").encode(), False, "Müller/ä.png"),  # Archive Utility
        ("Müller.png".encode(), False, "Müller.png"),
        (unicodedata.normalize("NFD", "Müller.png").encode(), True, "Müller.png"),
        ("Müller.png".encode("cp437"), False, "Müller.png"),
    ],
)
def test_names_with_accents_are_read_as_they_were_meant(stored: bytes, flag: bool, name: str, tmp_path: Path) -> None:
    plain = "x" * len(stored)
    path = make_zip(tmp_path / "x.zip", (plain, b"1"))
    raw = bytearray(path.read_bytes().replace(plain.encode(), stored))
    if flag:
        for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            raw[raw.index(signature) + at + 1] |= 0x08
    path.write_bytes(raw)
    assert unpack(path, tmp_path / "out") == [name]


def test_deflate64_of_windows_explorer_is_named_before_anything_is_written(tmp_path: Path) -> None:
    path = patch_central(make_zip(tmp_path / "x.zip", ("a.jpeg", b"1")), "a.jpeg", 10, "<H", 9)
    said = refusal(path, tmp_path / "out")
    assert "packed with Deflate64, as Windows Explorer does beyond 2 GB; unpack it and name the folder" in said
    assert not (tmp_path / "out").exists()


def test_the_one_archive_in_an_archive_without_pictures_is_unpacked_with_it(tmp_path: Path) -> None:
    for inner in (make_zip(tmp_path / "in.zip", *TREE.items()), make_tar(tmp_path / "in.tar.gz", TREE, "w:gz")):
        clutter = ("__MACOSX/._in.zip", b"1"), (".DS_Store", b"2"), ("README", b"3"), ("set/LICENSE.txt", b"4")
        path = make_zip(tmp_path / "x.zip", (f"set/{inner.name}", inner.read_bytes()), *clutter)
        assert unpack(path, tmp_path / "out") == sorted(TREE)
        assert files_below(tmp_path / "out") == TREE
        assert {p.name for p in tmp_path.iterdir()} <= {"in.zip", "in.tar.gz", "x.zip", "out"}


def test_a_single_inner_archive_is_held_to_the_limits(tmp_path: Path) -> None:
    inner = make_zip(tmp_path / "in.zip", ("a.png", random.Random(0).randbytes(1_500_000)))
    path = make_zip(tmp_path / "x.zip", ("in.zip", inner.read_bytes()))
    assert "max_unpacked_gb" in refusal(path, tmp_path / "out", IngestionSettings(max_unpacked_gb=0.001))
    bomb = make_zip(tmp_path / "in.zip", ("a.png", bytes(30_000_000)))
    path = make_zip(tmp_path / "x.zip", ("in.zip", bomb.read_bytes()))
    assert "'a.png' unpacks to more than 100 times" in refusal(path, tmp_path / "out")


def test_several_archives_in_an_archive_are_named(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", ("train.zip", b"1"), ("test.zip", b"2"))
    assert "holds other archives (train.zip, test.zip); unpack it and name the folder" in refusal(
        path, tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (
            b"Rar!\x1a\x07\x01\x00",
            "a RAR archive, not a zip archive or tar, or is cut short; fetch it again, or unpack it and name",
        ),
        (b"7z\xbc\xaf\x27\x1c\x00\x04", "a 7z archive"),
        (b"BZh91AY&SY", "a file of bzip2"),
        (b"\xfd7zXZ\x00", "a file of xz"),
        (b"\n <!doctype html><title>Sign in</title>", "a HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n", "a PNG"),
    ],
)
def test_what_is_no_zip_is_said_to_be_what_it_is(content: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(content + bytes(2_000))
    assert f"is {kind}" in refusal(tmp_path / "x.zip", tmp_path / "out")


def test_gzip_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tgz").write_bytes(gzip.compress(b"no tar"))
    assert "not a zip archive or tar" in refusal(tmp_path / "x.tgz", tmp_path / "out")


@pytest.mark.parametrize("at", [2, 3])
def test_a_tar_whose_middle_is_damaged_or_whose_end_is_missing_loses_no_file_unsaid(at: int, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", dict.fromkeys("abc", b"1"))
    raw = path.read_bytes()
    path.write_bytes(raw[: at * 1024])
    refusal(path, tmp_path / "out")
    path.write_bytes(raw[: (at - 1) * 1024] + b"?" + raw[(at - 1) * 1024 + 1 :])
    refusal(path, tmp_path / "out")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_whatever_bytes_of_a_tar_are_changed_it_is_read_or_refused_in_a_sentence(mode: str, tmp_path: Path) -> None:
    path, dice = tmp_path / "x.tar", random.Random(3)
    whole = make_tar(path, TREE, mode).read_bytes()
    refused = 0
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(dice.choice([1, 3, 9])):
            raw[dice.randrange(len(raw))] = dice.randrange(256)
        path.write_bytes(raw)
        try:
            # A tar has no checksum of contents, but no file is lost.
            assert len(unpack(path, tmp_path / "out")) == len(TREE)
        except ArchiveError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


# -- as sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.TGZ", "set.zip"])
def test_a_tar_is_a_source_and_a_place_of_loose_images_like_a_zip(name: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).save(stream, "PNG")
    files = {
        f"{split}/{kind}/a.png": stream.getvalue() for split in ("train", "test") for kind in ("NORMAL", "PNEUMONIA")
    }
    path = tmp_path / name
    if name.endswith(".zip"):
        make_zip(path, *files.items())
    else:
        below = {f"set/{name}": content for name, content in files.items()}
        make_tar(path, below, "w" if name == "set.tar" else "w:gz")
    settings = Settings(source=str(path), storage=StorageSettings(raw=str(tmp_path / "raw")))
    fetched = fetch_source(settings)
    assert (fetched.kind, fetched.name) == ("zip" if name == "set.zip" else "tar", "set")
    assert files_below(Path(fetched.folder)) == files
    assert fetched.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with open_loose_images(str(path), settings) as images:
        (batch,) = images.read_batches()
    assert len(batch.paths) == 4 and set(batch.refused) == {""}
    assert batch.pixels.shape == (4, 224, 224)
    assert {p.name for p in (tmp_path / "raw").iterdir()} <= {Path(fetched.folder).parent.name, "sums"}
