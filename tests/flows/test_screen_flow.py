"""Screening a folder or zip on its own, through a real Prefect engine: a table, masks, one sentence for an error."""

import csv
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from flows.engine.command_line import read_own_flags, run_command
from flows.screen import ScreenFlags
from tasks.files import REPOSITORY
from tasks.networks.shipped import SHIPPED
from tasks.runs.manifest import image_id
from tasks.settings import Settings

pytestmark = pytest.mark.usefixtures("prefect_engine")


@pytest.fixture(scope="module")
def screener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained screener on disk."""
    from tasks.devices.screener import build_screener
    from tasks.networks.files import save_network

    folder = tmp_path_factory.mktemp("screener")
    save_network(build_screener(seed=1, widths=(4, 4)), folder)
    return folder


def encode(image: Image.Image | np.ndarray, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, form, **options)
    return stream.getvalue()


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (60, 80), dtype=np.uint8)


def turned() -> bytes:
    block = Image.Exif()
    block[0x0112] = 6
    return encode(noise(7), "JPEG", exif=block)


SCORED = {
    "x-ray.jpeg": encode(noise(1), "JPEG"),
    "colours.png": encode(noise(2, 60, 80, 3)),
    "black.png": encode(np.zeros((300, 300), np.uint8)),
    "white.png": encode(np.full((300, 300), 255, np.uint8)),
    "deep.png": encode(noise(3).astype(np.uint16) * 257),
    "rgba.png": encode(noise(4, 60, 80, 4)),
    "palette.png": encode(Image.fromarray(noise(5, 60, 80, 3)).quantize(16)),
    "one.png": encode(np.full((1, 1), 90, np.uint8)),
    "large.png": encode(Image.new("L", (8_000, 8_000), 120)),
    "turned.jpeg": turned(),
    "a b.png": encode(noise(10)),
    "größe.png": encode(noise(11)),
    "new\nline.png": encode(noise(12)),
    "return\r.png": encode(noise(12)),
    "com,ma.png": encode(noise(13)),
    "=1+1.png": encode(noise(14)),
    'sub/"quoted".png': encode(noise(15)),
    "sub/train/NORMAL/x.JPG": encode(noise(16), "JPEG"),
}
REFUSED = {
    "cut.jpeg": (encode(noise(20, 200, 200), "JPEG")[:4_000], "does not decode"),
    "empty.jpeg": (b"", "is empty"),
    "text.jpeg": (b"these are words", "is not a JPEG, PNG, TIFF, BMP, WebP or DICOM"),
    "too-long.png": (encode(np.zeros((1, 20_001), np.uint8)), "is 20001 x 1 px"),
}
CLUTTER = {"__MACOSX/._x-ray.jpeg": b"x", ".DS_Store": b"x", "sub/.hidden.png": encode(noise(1)), "read.me": b"x"}
FILES = SCORED | {name: content for name, (content, _) in REFUSED.items()} | CLUTTER


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def run_screen(*flags: object) -> int:
    """The exit code of the command, in this process."""
    from flows.screen import screen

    return run_command(screen, [str(flag) for flag in flags], "test", ScreenFlags)


def screened(images: Path, screener: Path, *flags: str | Path) -> dict[str, dict[str, str]]:
    """The table by path, after a run that ended well."""
    out = images.parent / "made" / f"{images.name}.csv"
    assert run_screen("--images", images, "--out", out, "--screening.screener", screener, *flags) == 0
    with out.open(newline="", encoding="utf-8") as stream:
        return {row["path"]: row for row in csv.DictReader(stream)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("input") / "folder", FILES)


@pytest.fixture(scope="module")
def table(folder: Path, screener: Path, prefect_engine: None) -> dict[str, dict[str, str]]:
    return screened(folder, screener, "--masks", folder.parent / "masks", "--lungs", folder.parent / "lungs")


def test_the_table_has_a_row_for_each_image_in_order_and_four_columns(
    table: dict[str, dict[str, str]], folder: Path
) -> None:
    text = (folder.parent / "made" / "folder.csv").read_text(encoding="utf-8")
    assert text.startswith("path,device_score,has_device,refused\n")
    assert list(table) == sorted(set(FILES) - set(CLUTTER))
    assert [path.name for path in (folder.parent / "made").iterdir()] == ["folder.csv"]


def test_whatever_decodes_gets_a_finite_score_and_a_decision(table: dict[str, dict[str, str]]) -> None:
    for name in SCORED:
        row = table[name]
        assert 0.0 <= float(row["device_score"]) <= 1.0, name
        assert len(row["device_score"]) == len("0.123456"), name
        assert row["has_device"] == (
            "true" if float(row["device_score"]) >= Settings().screening.threshold else "false"
        ), name
        assert row["refused"] == "", name


def test_whatever_does_not_decode_is_refused_with_a_reason_and_gets_no_score(table: dict[str, dict[str, str]]) -> None:
    for name, (_, reason) in REFUSED.items():
        assert table[name]["refused"].startswith(reason), name
        assert (table[name]["device_score"], table[name]["has_device"]) == ("", "")


def test_each_scored_image_has_a_grey_mask_of_devices_and_of_lungs_of_224_px_named_by_its_id(
    table: dict[str, dict[str, str]], folder: Path
) -> None:
    for masks in (folder.parent / "masks", folder.parent / "lungs"):
        assert {path.name for path in masks.iterdir()} == {f"{image_id(name)}.png" for name in SCORED}
        for path in masks.iterdir():
            with Image.open(path) as mask:
                assert (mask.format, mask.mode, mask.size) == ("PNG", "L", (224, 224))


def test_scores_and_masks_are_what_the_network_says_of_the_pixels(
    table: dict[str, dict[str, str]], folder: Path, screener: Path
) -> None:
    from tasks.devices.screener import load_screener, screen_pixels
    from tasks.networks.segmenter import load_segmenter, segment_pixels
    from tasks.pixels.decoding import decode

    said = next(screen_pixels(load_screener(screener), decode(FILES["x-ray.jpeg"])[None]))
    assert float(table["x-ray.jpeg"]["device_score"]) == pytest.approx(float(said.scores[0]), abs=2e-6)
    with Image.open(folder.parent / "masks" / f"{image_id('x-ray.jpeg')}.png") as mask:
        assert np.abs(np.asarray(mask, int) - said.masks[0]).max() <= 1
    lungs = next(segment_pixels(load_segmenter(SHIPPED["segmenter"]), decode(FILES["x-ray.jpeg"])[None]))
    with Image.open(folder.parent / "lungs" / f"{image_id('x-ray.jpeg')}.png") as mask:
        assert np.abs(np.asarray(mask, int) - lungs[0]).max() <= 1


def test_the_same_folder_zipped_gives_the_same_table(
    table: dict[str, dict[str, str]], folder: Path, screener: Path, tmp_path: Path
) -> None:
    screened(write_zip(tmp_path / "x.zip", FILES), screener)
    made = folder.parent / "made" / "folder.csv"
    assert (tmp_path / "made" / "x.zip.csv").read_bytes() == made.read_bytes()


def test_a_score_depends_on_neither_the_number_nor_the_order_of_the_others(screener: Path, tmp_path: Path) -> None:
    many = {f"{i:02}.png": encode(noise(i)) for i in range(37)}
    whole = screened(write_files(tmp_path / "many", many), screener)
    turned_round = {f"{36 - int(name[:2]):02}.png": content for name, content in many.items()}
    reverse = screened(write_files(tmp_path / "reverse", turned_round), screener)
    for name in ("00.png", "05.png", "36.png"):
        alone = screened(write_files(tmp_path / name[:2], {name: many[name]}), screener)
        assert alone[name] == whole[name]
        other = reverse[f"{36 - int(name[:2]):02}.png"]
        assert other["device_score"] == whole[name]["device_score"]


def test_the_threshold_moves_the_decision_and_no_score(
    table: dict[str, dict[str, str]], folder: Path, screener: Path
) -> None:
    scores = sorted({float(table[name]["device_score"]) for name in SCORED})
    threshold = scores[len(scores) // 2]
    edges = ["--screening.exclude-from", "0", "--screening.doubtful_to", "1"]
    moved = screened(folder, screener, "--screening.threshold", str(threshold), *edges)
    assert {name: row["device_score"] for name, row in moved.items()} == {
        name: row["device_score"] for name, row in table.items()
    }
    for name in SCORED:
        assert moved[name]["has_device"] == ("true" if float(table[name]["device_score"]) >= threshold else "false")


def test_the_address_of_the_table_is_the_last_line_and_the_log_counts(
    folder: Path,
    screener: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "new" / "place" / "devices.csv"
    assert run_screen("--images", folder, "--out", out, "--screening.screener", screener) == 0
    assert capfd.readouterr().out.splitlines()[-1] == str(out)
    assert f"screened {len(SCORED) + len(REFUSED)} images: " in caplog.text
    assert f"{len(REFUSED)} were refused, {len(CLUTTER)} other files left out" in caplog.text


def test_strict_ends_with_code_2_when_an_image_was_refused_and_writes_the_table_all_the_same(
    folder: Path, screener: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--images", folder, "--screening.screener", screener]
    assert run_screen(*flags, "--out", tmp_path / "a.csv", "--strict") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: strict: {len(REFUSED)} of {len(SCORED) + len(REFUSED)} images were refused; ")
    assert str(tmp_path / "a.csv") in error
    assert run_screen(*flags, "--out", tmp_path / "b.csv", "--strict", "false") == 0
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    whole = write_files(tmp_path / "whole", {"a.png": encode(noise(1))})
    assert run_screen("--images", whole, "--out", tmp_path / "c.csv", "--strict", *flags[2:]) == 0


def test_odd_files_are_scored_or_refused_and_files_that_differ_in_case_are_two(screener: Path, tmp_path: Path) -> None:
    place = write_files(tmp_path / "odd", {"A.png": encode(noise(1)), "a.png": encode(noise(2))})
    write_files(place, {"dir.jpeg/b.png": encode(noise(3))})
    (place / "loop.png").symlink_to(place / "loop.png")
    (place / "around").symlink_to(place)
    os.mkfifo(place / "pipe.png")
    said = screened(place, screener, "--masks", tmp_path / "masks")
    scored = [path for path, row in said.items() if row["device_score"]]
    assert scored == ["A.png", "a.png", "dir.jpeg/b.png"]
    assert [path for path, row in said.items() if row["refused"]] == ["loop.png", "pipe.png"]
    assert len(list((tmp_path / "masks").iterdir())) == 3


def test_a_table_of_refusals_only_is_a_table(screener: Path, tmp_path: Path) -> None:
    said = screened(write_files(tmp_path / "bad", {"a.png": b"", "b.png": b"x"}), screener)
    assert [row["refused"] for row in said.values()] == [
        "is empty",
        "is not a JPEG, PNG, TIFF, BMP, WebP or DICOM (unknown format)",
    ]


def test_what_cannot_be_done_is_one_sentence_with_code_2_and_nothing_written(
    screener: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = write_files(tmp_path / "images", {"a.png": encode(noise(1))})
    write_files(tmp_path, {"file": b"x", "bad.zip": b"x", "empty/.DS_Store": b"x"})
    write_zip(tmp_path / "hostile.zip", {"../a.png": encode(noise(1))})
    write_zip(tmp_path / "none.zip", {})
    good: dict[str, object] = {
        "--images": images,
        "--out": tmp_path / "new" / "x.csv",
        "--screening.screener": screener,
    }
    before = sorted(tmp_path.rglob("*"))
    cases: list[tuple[dict[str, object], str]] = [
        ({"--images": tmp_path / "nowhere"}, "images: "),
        ({"--images": tmp_path / "file"}, "is not a zip archive"),
        ({"--images": images / "a.png"}, "is neither a folder nor an archive"),
        ({"--images": tmp_path / "bad.zip"}, "images: "),
        ({"--images": tmp_path / "empty"}, "holds no image"),
        ({"--images": tmp_path / "none.zip"}, "holds no image"),
        ({"--images": tmp_path / "hostile.zip"}, "leads out of the folder"),
        ({"--images": "s3://bucket/x"}, "does not exist; give a folder, .zip or .tar.gz file on this machine"),
        ({"--images": ""}, "images: "),
        ({"--out": tmp_path}, "is a folder; name a .csv file in it"),
        ({"--out": tmp_path / "file" / "x.csv"}, f"out: {tmp_path / 'file'} is a file"),
        ({"--out": "s3://bucket/x.csv"}, "out: "),
        ({"--out": images / "a.png"}, "out: "),
        ({"--out": tmp_path / "bad.zip"}, "out: "),
        ({"--out": tmp_path / ("x" * 254)}, "out: "),
        ({"--out": tmp_path / ("x" * 300)}, "out"),
        ({"--masks": tmp_path / "file"}, f"masks: {tmp_path / 'file'} is a file"),
        ({"--masks": images / "masks"}, "lies in the folder of the images"),
        ({"--masks": ""}, "masks: "),
        ({"--lungs": images / "lungs"}, "lungs: "),
        ({"--masks": tmp_path / "m", "--lungs": tmp_path / "m"}, "masks and lungs: both are"),
        ({"--lungs": tmp_path / "m", "--screening.segmenter": tmp_path / "none"}, "screening.segmenter: "),
        ({"--screening.threshold": "2"}, "screening.threshold: "),
        ({"--strict": "maybe"}, "strict: "),
        ({"--no-such": "1"}, "no-such"),
    ]
    for change, sentence in cases:
        capfd.readouterr()
        flags = [str(part) for pair in (good | change).items() for part in pair]
        assert run_screen(*flags) == 2, change
        shown = capfd.readouterr()
        last = shown.err.splitlines()[-1]
        assert last.startswith("error: "), change
        assert sentence in last, change
        assert "Traceback" not in shown.err, change
        assert shown.out == "", change
        assert sorted(tmp_path.rglob("*")) == before, change
    assert run_screen("--out", tmp_path / "x.csv") == 2
    assert capfd.readouterr().err == "error: images: is missing; give --images, see --help\n"


def test_a_screener_that_is_missing_changed_or_none_is_refused_in_one_sentence(
    screener: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tasks.networks.classifier import build_member, join_members
    from tasks.networks.files import save_network
    from tasks.settings import TrainingSettings

    images = write_files(tmp_path / "images", {"a.png": encode(noise(1))})
    model, checksum = (screener / "model.keras").read_bytes(), (screener / "model.sha256").read_bytes()
    write_files(tmp_path / "changed", {"model.keras": model[:-1] + b"x", "model.sha256": checksum})
    write_files(tmp_path / "unsigned", {"model.keras": model})
    write_files(tmp_path / "binary", {"model.keras": model, "model.sha256": b"\xff\xfe\x00"})
    (tmp_path / "classifier").mkdir()
    save_network(join_members([build_member(TrainingSettings(width=4, side_px=32), 1)]), tmp_path / "classifier")
    for name in ("nowhere", "changed", "unsigned", "binary", "classifier", "images/a.png"):
        capfd.readouterr()
        flags = ["--images", images, "--out", tmp_path / "x.csv", "--screening.screener", tmp_path / name]
        assert run_screen(*flags) == 2
        shown = capfd.readouterr().err
        assert shown.splitlines()[-1].startswith("error: screening.screener: "), name
        assert str(tmp_path / name) in shown.splitlines()[-1]
        assert "; name a folder" in shown.splitlines()[-1]
        assert "Traceback" not in shown
        assert not (tmp_path / "x.csv").exists()


def test_a_table_that_was_there_is_replaced_whole_or_not_at_all(screener: Path, tmp_path: Path) -> None:
    images = write_files(tmp_path / "images", {"a.png": encode(noise(1))})
    out = tmp_path / "x.csv"
    out.write_text("older\n")
    assert run_screen("--images", images, "--out", out, "--screening.screener", tmp_path / "nowhere") == 2
    assert out.read_text() == "older\n"
    assert run_screen("--images", images, "--out", out, "--screening.screener", screener) == 0
    assert out.read_text().count("\n") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "x.csv"]


def test_dashes_underscores_and_a_bare_strict_are_understood() -> None:
    flags = ["--images", "a_b", "--strict", "--out", "c-d", "--screening.exclude_from", "0.1"]
    settings, own = read_own_flags(flags, "x", ScreenFlags)
    assert own == {"images": "a_b", "out": "c-d", "masks": None, "lungs": None, "strict": True}
    assert settings.screening.exclude_from == 0.1


def test_the_help_lists_the_flows_own_flags_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_screen("--help")
    shown = capsys.readouterr().out
    for flag in ("--images", "--out", "--masks", "--lungs", "--strict", "--screening.segmenter"):
        assert f"{flag} " in shown


def test_importing_the_flow_loads_neither_tensorflow_nor_matplotlib() -> None:
    code = "import sys, flows.screen; print([m for m in ('tensorflow', 'keras', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_flow_is_deployed_on_demand_with_its_parameters_as_a_form() -> None:
    from flows.screen import screen

    deployments = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    ours = [each for each in deployments if each["entrypoint"] == "flows/screen.py:screen"]
    assert [(each["name"], each["work_pool"]["name"]) for each in ours] == [("on-demand", "cpu")]
    assert set(screen.parameters.properties) == {"images", "out", "masks", "lungs", "strict", "settings"}
    assert screen.parameters.required == ["images", "out"]
    assert "threshold" in json.dumps(screen.parameters.definitions)
