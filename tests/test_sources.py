"""Each kind of source ends as a folder on this machine; one that cannot be used leaves nothing behind."""

import zipfile
from pathlib import Path
from typing import Any

import pytest

from tasks.addresses import hide_keys
from tasks.records import ArchiveError, SourceError
from tasks.settings import Settings
from tasks.sources import checksums_of_files, fetch_source, source_name
from tasks.storage import sha256_of_file

FOUR = ["train/NORMAL/a.jpeg", "train/PNEUMONIA/b.jpeg", "test/NORMAL/c.jpeg", "test/PNEUMONIA/d.jpeg"]


def settings(tmp_path: Path, source: Path | str, **others: Any) -> Settings:
    storage = {"raw": str(tmp_path / "raw"), "cache": str(tmp_path / "cache")}
    return Settings.model_validate({"source": str(source), "storage": storage, **others})


def make_zip(path: Path, names: list[str], prefix: str = "chest_xray/") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(prefix + name, name)
    return path


def make_folder(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_folder_is_used_where_it_lies(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mine", ["chest_xray/" + name for name in FOUR])
    fetched = fetch_source(settings(tmp_path, folder))
    assert (fetched.kind, fetched.name, fetched.archive_sha256) == ("folder", "mine", None)
    assert Path(fetched.folder) == folder / "chest_xray"
    assert fetched.layout.images == tuple(sorted(FOUR))
    assert not (tmp_path / "raw").exists()


def test_a_zip_is_unpacked_to_its_root_without_clutter(tmp_path: Path) -> None:
    names = [*FOUR, "device_review.csv", ".DS_Store", "readme.txt", "chest_xray/train/NORMAL/a.jpeg"]
    archive = make_zip(tmp_path / "set.zip", names)
    fetched = fetch_source(settings(tmp_path, archive))
    assert (fetched.kind, fetched.name, fetched.archive_sha256) == ("zip", "set", sha256_of_file(archive))
    assert files_below(Path(fetched.folder)) == sorted([*FOUR, "device_review.csv"])
    assert (Path(fetched.folder) / FOUR[0]).read_text() == FOUR[0]
    assert (fetched.layout.n_nested, fetched.layout.n_clutter) == (1, 2)


def test_a_zip_is_unpacked_once_and_tells_the_same_the_second_time(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "set.zip", FOUR)
    first = fetch_source(settings(tmp_path, archive))
    marked = Path(first.folder) / FOUR[0]
    marked.write_text("unpacked before")
    assert fetch_source(settings(tmp_path, archive)) == first
    assert marked.read_text() == "unpacked before"


def test_a_zip_of_which_unpacked_files_are_missing_is_unpacked_again(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "set.zip", FOUR)
    folder = Path(fetch_source(settings(tmp_path, archive)).folder)
    (folder / FOUR[2]).unlink()
    fetch_source(settings(tmp_path, archive))
    assert files_below(folder) == sorted(FOUR)


def test_a_zip_with_other_content_is_unpacked_beside_the_earlier_one(tmp_path: Path) -> None:
    first = fetch_source(settings(tmp_path, make_zip(tmp_path / "set.zip", FOUR)))
    second = fetch_source(settings(tmp_path, make_zip(tmp_path / "set.zip", [*FOUR, "train/NORMAL/e.jpeg"])))
    assert first.folder != second.folder
    assert len(files_below(Path(first.folder))) == 4
    assert len(files_below(Path(second.folder))) == 5


def test_the_expected_checksum_is_compared_before_anything_is_unpacked(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "set.zip", FOUR)
    right = sha256_of_file(archive)
    with pytest.raises(SourceError, match=r"ingestion\.sha256"):
        fetch_source(settings(tmp_path, archive, ingestion={"sha256": "0" * 64}))
    assert not (tmp_path / "raw").exists()
    assert fetch_source(settings(tmp_path, archive, ingestion={"sha256": right})).archive_sha256 == right


def test_a_zip_that_turns_out_damaged_half_way_leaves_nothing(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "set.zip", FOUR)
    archive.write_bytes(archive.read_bytes().replace(b"train/PNEUMONIA/b.jpegPK", b"train/PNEUMONIA/B.jpegPK"))
    with pytest.raises(ArchiveError, match="damaged"):
        fetch_source(settings(tmp_path, archive))
    assert list((tmp_path / "raw").iterdir()) == []


def test_what_an_interrupted_attempt_left_is_not_taken_for_whole(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "set.zip", FOUR)
    left = tmp_path / "raw" / f"set-{sha256_of_file(archive)[:16]}.partial" / "files"
    make_folder(left, ["train/NORMAL/half.jpeg"])
    assert files_below(Path(fetch_source(settings(tmp_path, archive)).folder)) == sorted(FOUR)
    assert not left.exists()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("no/such/place", "does not exist"),
        ("no/such.zip", "does not exist"),
        ("ftp://example.org/a.zip", "not a kind that is known"),
        ("x" * 300, "cannot be read (File name too long)"),
    ],
)
def test_a_source_that_is_not_there_is_named(source: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        fetch_source(settings(tmp_path, source))
    assert f"source: {hide_keys(source)}" in str(caught.value)
    assert sentence in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_zip_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_text("hello")
    with pytest.raises(ArchiveError, match=r"set\.zip is no zip archive"):
        fetch_source(settings(tmp_path, tmp_path / "set.zip"))


@pytest.mark.parametrize("make", [lambda p: (p / "empty").mkdir(), lambda p: make_zip(p / "empty", [])])
def test_an_empty_folder_or_zip_is_refused_by_name(make: Any, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(SourceError, match="empty holds neither"):
        fetch_source(settings(tmp_path, tmp_path / "empty"))


def test_a_file_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mine", FOUR)
    try:
        (folder / "train/NORMAL/\udcff.jpeg").write_text("x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(SourceError, match="not UTF-8"):
        fetch_source(settings(tmp_path, folder))


def test_the_sample_is_drawn_once_for_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = {"n_images": 40, "side_px": 128}
    first = fetch_source(settings(tmp_path, "sample", sample=few))
    assert "drawing 40" in capsys.readouterr().out
    assert (first.kind, len(first.layout.images)) == ("sample", 40)
    assert fetch_source(settings(tmp_path, "sample", sample=few)) == first
    assert "already drawn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("sample", "sample"),
        ("/data/chest_xray_224.zip", "chest_xray_224"),
        ("data/my set/", "my-set"),
        ("s3://bucket/prefix/set.zip", "set"),
        ("https://example.org/a.zip?dl=1", "a-zip-dl-1"),
        ("..", "source"),
        ("/", "source"),
        ("Röntgen", "R-ntgen"),
        ("x" * 300, "x" * 60),
    ],
)
def test_a_source_has_a_short_plain_name(source: str, name: str) -> None:
    assert source_name(source) == name


def test_the_checksums_of_files_depends_on_names_and_contents_and_not_on_their_order(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "2")):
        (tmp_path / name).write_text(text)
    first = checksums_of_files(tmp_path, ["a", "b"])
    assert checksums_of_files(tmp_path, ["b", "a"]) == first
    for name, text in (("a", "2"), ("b", "1")):
        (tmp_path / name).write_text(text)
    assert checksums_of_files(tmp_path, ["a", "b"]) != first
