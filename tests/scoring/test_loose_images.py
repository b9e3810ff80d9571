"""A folder or zip of any structure is read in batches; whatever a file brings ends in pixels or in a reason."""

import io
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dicom_files import draw, make_dicom
from PIL import Image

from tasks.errors import SourceError
from tasks.pixels.content import MAX_FILE_BYTES
from tasks.pixels.decoding import decode
from tasks.pixels.looks import MEAN_CHEST
from tasks.scoring.batches import watch_batches
from tasks.scoring.loose_images import open_loose_images
from tasks.settings import IngestionSettings, PackingSettings, Settings
from tasks.sources.layout import plan_loose_images


def picture(seed: int = 0, form: str = "PNG", size: tuple[int, int] = (30, 40)) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)).save(stream, form)
    return stream.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    return path


def read_all(images: Path, settings: Settings | None = None, n_images: int = 32) -> dict[str, str | bytes]:
    """path -> pixels as bytes, or the reason."""
    said: dict[str, str | bytes] = {}
    with open_loose_images(str(images), settings or Settings()) as found:
        for batch in found.read_batches(n_images):
            rows = iter(batch.pixels)
            said |= {p: r or next(rows).tobytes() for p, r in zip(batch.paths, batch.refused, strict=True)}
            assert next(rows, None) is None
    return said


def refusal(images: str, settings: Settings | None = None) -> str:
    with pytest.raises(SourceError) as caught, open_loose_images(images, settings or Settings()):
        pass
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("images: ")
    return str(caught.value)


CLUTTER = {
    "__MACOSX/a.jpeg": picture(),
    "__MACOSX/deep/._a.jpeg": b"",
    ".DS_Store": b"x",
    "sub/.DS_Store": b"x",
    "sub/._b.png": b"x",
    ".hidden.png": picture(),
    ".cache/a.png": picture(),
    "notes.txt": b"x",
    "table.csv": b"x",
    "inner.zip": b"PK",
    "jpeg": b"x",
    "LICENSE": b"words",
    "Thumbs.db": picture(),
    "sub/x.mp4": b"\0\0\0\x18ftypisom",
}
IMAGES = {
    "b.PNG": picture(1),
    "a.jpeg": picture(2, "JPEG"),
    "train/NORMAL/c.jpg": picture(3, "JPEG"),
    "x/train/NORMAL/c.jpg": picture(4, "JPEG"),
    "very/deep/down/d e.png": picture(5),
    "scan.dcm": b"x",
    "IM0001": picture(6),
    "1.2.840.1": picture(7, "JPEG"),
    "e.tif": picture(8, "TIFF"),
    "f.webp": picture(9, "WEBP"),
    "g.unheard": picture(10, "GIF"),
    "h.jfif": b"",
}
NOT_TAKEN = {
    "g.unheard": "is a GIF, not a JPEG, PNG, TIFF, BMP, WebP or DICOM",
    "h.jfif": "is empty",
    "scan.dcm": "is not a JPEG, PNG, TIFF, BMP, WebP or DICOM (unknown format)",
}


def test_images_of_any_structure_are_listed_in_order_and_clutter_is_counted(tmp_path: Path) -> None:
    for images in (
        write_files(tmp_path / "folder", CLUTTER | IMAGES),
        write_zip(tmp_path / "x.zip", CLUTTER | IMAGES),
    ):
        with open_loose_images(str(images), Settings()) as found:
            assert found.paths == tuple(sorted(IMAGES))
            assert found.n_left_out == len(CLUTTER)
        assert {name: said for name, said in read_all(images).items() if isinstance(said, str)} == NOT_TAKEN


def test_a_flat_folder_is_a_folder_like_any_other(tmp_path: Path) -> None:
    write_files(tmp_path, {"b.png": picture(1), "a.png": picture(2)})
    assert list(read_all(tmp_path)) == ["a.png", "b.png"]


def test_a_name_can_only_rule_an_image_out() -> None:
    names = ["b.png", "a.jpeg", "a.jpeg", "c.gif", "IM0001", "x.840", ".d.png", "a.TXT", "b.csv"]
    assert plan_loose_images(names) == (("IM0001", "a.jpeg", "b.png", "c.gif", "x.840"), 3)
    assert plan_loose_images([]) == ((), 0)


def test_pixels_are_those_that_every_other_stage_sees(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": picture(1)})
    assert read_all(tmp_path) == {"a.png": decode(picture(1)).tobytes()}
    padded = Settings(packing=PackingSettings(padding=True))
    assert read_all(tmp_path, padded) == {"a.png": decode(picture(1), padding=True).tobytes()}


def test_the_bits_in_use_are_those_of_all_deep_files_of_the_source_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dark, bright = (np.linspace(0, top, 30 * 40).reshape(30, 40).astype(np.uint16) for top in (500, 4000))
    for name, pixels in {"dark": dark, "bright": bright}.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "eight.png").write_bytes(picture(1))
    (tmp_path / "cut.png").write_bytes((tmp_path / "dark.png").read_bytes()[:60])
    for images in (tmp_path, write_zip(tmp_path / "x.zip", {p.name: p.read_bytes() for p in tmp_path.glob("*.png")})):
        said = read_all(images)
        assert [max(said[name]) for name in ("dark.png", "bright.png")] == [31, 249], "of 4,095"
        assert said["eight.png"] == decode(picture(1)).tobytes()
        assert "2 files: 12 of 16 bits used" in capsys.readouterr().out


def test_a_dark_image_alone_keeps_the_exposure_that_it_has_in_the_source_trained_on(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 500, 30 * 40).reshape(30, 40).astype(np.uint16)).save(tmp_path / "dark.png")
    for least_bits, most in ((0, 125), (12, 31)):
        with open_loose_images(str(tmp_path), Settings()) as found:
            found.least_bits = least_bits
            (batch,) = found.read_batches()
            assert batch.pixels.max() == most


def test_images_whose_pixels_look_wrong_are_named_in_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chest = np.kron(MEAN_CHEST * 5 + 100, np.ones((32, 32))).astype(np.uint8)
    for name, pixels in {"black": chest * 0, "chest": chest, "inverted": 255 - chest}.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"")
    with open_loose_images(str(tmp_path), Settings()) as found:
        assert sum(len(batch.pixels) for batch in watch_batches(found, "key", "words")) == 3
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warned == [
        "warning: 1 images look flat (nearly one shade), such as black.png",
        "warning: 1 images look inverted (white where X-rays are black) or on their side, such as inverted.png",
    ]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_folder_and_its_zip_give_the_same(tmp_path: Path, method: int) -> None:
    files = IMAGES | {"cut.jpeg": picture(9, "JPEG")[:300], "empty.png": b"", "text.jpg": b"words"}
    folder = write_files(tmp_path / "folder", files)
    assert read_all(write_zip(tmp_path / "x.zip", files, method)) == read_all(folder)


@pytest.mark.parametrize("n_images", [1, 2, 3, 7, 100])
def test_what_is_read_does_not_depend_on_the_batch(tmp_path: Path, n_images: int) -> None:
    files = {f"{i}.png": picture(i) if i % 3 else b"no" for i in range(7)}
    said = read_all(write_files(tmp_path, files), n_images=n_images)
    assert list(said) == sorted(files)
    assert said == {
        name: "is not a JPEG, PNG, TIFF, BMP, WebP or DICOM (unknown format)"
        if content == b"no"
        else decode(content).tobytes()
        for name, content in files.items()
    }


def test_no_more_than_two_batches_are_read_ahead(tmp_path: Path) -> None:
    write_files(tmp_path, {f"{i:02}.png": picture(i) for i in range(40)})
    with open_loose_images(str(tmp_path), Settings()) as found:
        batches = found.read_batches(4)
        assert next(batches).paths == ("00.png", "01.png", "02.png", "03.png")
        for path in tmp_path.iterdir():
            path.unlink()
        late = [reason for batch in batches for reason in batch.refused]
    assert "cannot be read (No such file or directory)" in late[4:]
    assert all(late[4:]), "from the third batch on nothing had been read when the files went"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.png", b"", "is empty"),
        ("text.jpeg", b"just words", "is not a JPEG, PNG, TIFF, BMP, WebP or DICOM (unknown format)"),
        ("gif.png", picture(0, "GIF"), "is a GIF, not a JPEG, PNG, TIFF, BMP, WebP or DICOM"),
        ("cut.jpeg", picture(0, "JPEG", (200, 200))[:3000], "does not decode"),
        ("cut.png", picture(0, "PNG", (200, 200))[:3000], "does not decode"),
        ("wide.png", picture(0, "PNG", (1, 20_001)), "is 20001 x 1 px, longer than 20000 px"),
    ],
)
def test_a_file_that_is_no_picture_is_refused_by_name_with_a_reason(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    for images in (
        write_files(tmp_path / "folder", {name: content, "ok.png": picture()}),
        write_zip(tmp_path / "x.zip", {name: content, "ok.png": picture()}),
    ):
        said = read_all(images)
        assert str(said[name]).startswith(reason)
        assert len(said["ok.png"]) == 224 * 224


def test_the_longest_side_is_a_setting(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": picture(0, size=(70, 90))})
    said = read_all(tmp_path, Settings(ingestion=IngestionSettings(max_side_px=80)))
    assert said == {"a.png": "is 90 x 70 px, longer than 80 px"}


def test_a_picture_of_8000_by_8000_px_is_read(tmp_path: Path) -> None:
    Image.new("L", (8_000, 8_000), 77).save(tmp_path / "large.png")
    assert read_all(tmp_path) == {"large.png": bytes([77]) * 224 * 224}


def test_a_directory_named_like_an_image_is_a_directory(tmp_path: Path) -> None:
    write_files(tmp_path, {"x.jpeg/y.png": picture()})
    assert list(read_all(tmp_path)) == ["x.jpeg/y.png"]


def test_links_to_files_and_folders_are_read_and_those_that_lead_back_are_counted(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "folder", {"sub/a.png": picture()})
    (folder / "linked").symlink_to(write_files(tmp_path / "elsewhere", {"b.png": picture()}))
    (folder / "link.png").symlink_to(folder / "sub" / "a.png")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "up.png").symlink_to(folder)
    with open_loose_images(str(folder), Settings()) as found:
        assert found.paths == ("link.png", "linked/b.png", "sub/a.png")
        assert found.n_left_out == 2


@pytest.fixture()
def odd_files(tmp_path: Path) -> Path:
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "ok.png").write_bytes(picture())
    return tmp_path


def test_loops_pipes_devices_and_dead_links_are_refused_without_waiting(odd_files: Path) -> None:
    said = read_all(odd_files)
    assert len(said.pop("ok.png")) == 224 * 224
    assert said == {
        "gone.png": "cannot be read (No such file or directory)",
        "loop.png": "cannot be read (Too many levels of symbolic links)",
        "pipe.png": "is a pipe or device, not a file",
        "zero.png": "is a pipe or device, not a file",
    }


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that nobody can read")
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mem.png").symlink_to("/proc/self/mem")
    assert read_all(tmp_path) == {"mem.png": "cannot be read (Input/output error)"}


def test_a_file_beyond_the_bound_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    with (tmp_path / "sparse.png").open("wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    assert read_all(tmp_path) == {"sparse.png": "has more than 200 MB"}


def test_names_with_any_sign_are_kept_as_they_are(tmp_path: Path) -> None:
    names = [
        "a b.png",
        "ü.png",
        "u\u0308.png",
        "n\nl.png",
        "c,d.png",
        "=1+1.png",
        '"q".png',
        "A.png",
        "a.png",
        "-r.png",
    ]
    said = read_all(write_files(tmp_path, {name: picture() for name in names}))
    assert list(said) == sorted(names)
    assert all(len(pixels) == 224 * 224 for pixels in said.values())


def test_a_name_that_is_not_utf_8_is_refused_with_its_bytes_spelt_out(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(picture())
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    assert read_all(tmp_path) == {"caf\\xe9.png": "has a name that is not UTF-8"}


def test_a_damaged_member_of_a_zip_is_refused_and_the_others_are_read(tmp_path: Path) -> None:
    files = {"a.png": picture(1), "b.png": picture(2), "c.png": picture(3)}
    path = write_zip(tmp_path / "x.zip", files, zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[raw.index(picture(2)) + 200] ^= 255
    path.write_bytes(raw)
    said = read_all(path)
    assert str(said["b.png"]).startswith("is damaged in the archive (Bad CRC-32")
    assert [len(said["a.png"]), len(said["c.png"])] == [224 * 224] * 2


@pytest.mark.parametrize("name", ["../out.png", "/etc/out.png", "a/../../out.png", "..\\out.png", "C:/out.png"])
def test_a_zip_with_a_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "x.zip", {"a.png": picture(), name: picture()})
    assert "leads out of the folder" in refusal(str(path))


def test_a_zip_beyond_the_limits_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"a.png": picture(), "zeros.png": bytes(3_000_000)})
    assert "ingestion.max_ratio" in refusal(str(path))
    few = Settings(ingestion=IngestionSettings(max_members=1))
    assert "ingestion.max_members" in refusal(str(path), few)
    small = Settings(ingestion=IngestionSettings(max_unpacked_gb=0.001, max_ratio=1e6))
    assert "ingestion.max_unpacked_gb" in refusal(str(path), small)


def test_a_zip_with_two_names_for_one_place_is_refused(tmp_path: Path) -> None:
    assert "one place on many machines" in refusal(
        str(write_zip(tmp_path / "x.zip", {"A.png": picture(), "a.png": picture()}))
    )


def test_reading_a_zip_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", IMAGES)
    assert len(read_all(path)) == len(IMAGES)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_folder_or_archive_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_files(tmp_path, {"clutter/.DS_Store": b"x", "x.jpeg": picture(), "text.zip": b"words", "nothing": b""})
    os.mkfifo(tmp_path / "pipe")
    for place, reason in {
        "nowhere": "does not exist",
        "empty": "holds no image; ",
        "clutter": "holds no image (left out: 1 other",
        "x.jpeg": "is neither a folder nor an archive",
        "pipe": "is neither a folder nor an archive",
        "text.zip": "is not a zip archive",
        "nothing": "is not a zip archive",
        "x" * 300: "cannot be read (File name too long)",
        "a\x00b": "does not exist",
    }.items():
        assert reason in refusal(str(tmp_path / place)), place
    for address in ("", "s3://bucket/x", "https://example.org/x.zip"):
        assert "does not exist" in refusal(address)
    assert "holds no image; " in refusal(str(write_zip(tmp_path / "none.zip", {})))


def test_an_error_of_the_reader_of_batches_is_not_taken_for_one_of_the_archive(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", IMAGES)
    with pytest.raises(KeyError), open_loose_images(str(path), Settings()) as found:
        next(found.read_batches(1))
        raise KeyError("mine")


def test_dicom_files_are_scored_as_they_are_shown_and_what_is_to_be_known_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = draw()
    state = make_dicom(drawn, SOPClassUID="1.2.840.10008.5.1.4.1.1.11.1")
    files = {f"1.2.840.{i}": make_dicom(drawn, syntax, WindowCenter=[128, 9], WindowWidth=[256, 9])
             for i, syntax in enumerate(("raw", "lossless", "jpeg_ls"))}  # fmt: skip
    lateral = make_dicom(drawn, ViewPosition="LL")
    write_files(tmp_path, files | {"DICOMDIR": state, "state.dcm": state, "side.dcm": lateral})
    found = read_all(tmp_path)
    assert "lateral view" in str(found.pop("side.dcm"))
    assert found == {name: decode(files["1.2.840.0"]).tobytes() for name in files}
    said = capsys.readouterr().out
    assert "3 DICOM files; presentation states beside them" in said
    assert "3 of them: several windows: the first is taken" in said
