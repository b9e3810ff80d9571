"""Scoring a folder or zip with the network of a run, through a real Prefect engine: a table, refusals, one sentence."""

import csv
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from flows.engine.command_line import read_own_flags, run_command
from flows.score import ScoreFlags
from tasks.files import REPOSITORY, write_json
from tasks.networks.familiarity import fit_familiarity, load_familiarity, save_familiarity
from tasks.networks.lung_fields import fit_bounds, measure_fields, save_bounds
from tasks.networks.shipped import find_network
from tasks.pixels.decoding import decode

pytestmark = pytest.mark.usefixtures("prefect_engine")

N_FAMILIAR, N_SCORED = 100, 12
STRANGE = "does not look like a chest X-ray of the kind this network was trained on (distance "


def encode(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (224, 224), dtype=np.uint8)


UNLIKE = {
    "noise.png": encode(noise(1)),
    "black.png": encode(np.zeros((300, 300), np.uint8)),
    "sub/com,ma.png": encode(noise(2, 80, 60, 3)),
}
UNREADABLE = {
    "cut.png": (encode(noise(20, 200, 200))[:4_000], "does not decode"),
    "empty.jpeg": (b"", "is empty"),
    "text.jpeg": (b"these are words", "is not a JPEG, PNG, TIFF, BMP, WebP or DICOM"),
}
CLUTTER = {"__MACOSX/._x-ray.jpeg": b"x", ".DS_Store": b"x", "read.me": b"x"}


@pytest.fixture(scope="module")
def chests(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Files of drawn chest X-rays, in an order by chance."""
    from tasks.drawings.sample import write_sample

    folder = tmp_path_factory.mktemp("drawn")
    write_sample(folder / "set", folder / "truth", n_images=N_FAMILIAR + 3 * N_SCORED, side_px=96, seed=3)
    files = {path.read_bytes() for path in folder.glob("set/**/*.jpeg") if not path.name.startswith(".")}
    return [sorted(files)[i] for i in np.random.default_rng(1).permutation(len(files))]


@pytest.fixture(scope="module")
def scored(chests: list[bytes]) -> dict[str, bytes]:
    """Chest X-rays that neither network nor check has seen."""
    return {f"a/{i:02}.jpeg": content for i, content in enumerate(chests[N_FAMILIAR : N_FAMILIAR + N_SCORED])}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, chests: list[bytes], scored: dict[str, bytes]) -> Path:
    """A run folder with all that scoring reads: a small untrained network that says pneumonia of half of the images."""
    from tasks.networks.classifier import build_member, join_members, predict
    from tasks.networks.files import save_network
    from tasks.networks.segmenter import load_segmenter, segment_pixels
    from tasks.settings import TrainingSettings

    folder = tmp_path_factory.mktemp("run")
    model = join_members([build_member(TrainingSettings(side_px=32, width=4), seed=1)])
    save_network(model, folder)
    known = np.stack([decode(content) for content in chests[:N_FAMILIAR]])
    save_familiarity(fit_familiarity([known], [7, N_FAMILIAR]), folder)
    segmenter = find_network("segmenter", None)
    lungs = np.concatenate(list(segment_pixels(load_segmenter(segmenter.folder), known)))
    save_bounds(fit_bounds(measure_fields(lungs), segmenter.sha256), folder)
    said = predict(model, np.stack([decode(content) for content in scored.values()]))
    write_json(folder / "metrics.json", {"threshold": round(float(np.sort(said)[N_SCORED // 2]), 6)})
    return folder


@pytest.fixture(scope="module")
def screener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained screener on disk."""
    from tasks.devices.screener import build_screener
    from tasks.networks.files import save_network

    folder = tmp_path_factory.mktemp("screener")
    save_network(build_screener(seed=1, widths=(4, 4)), folder)
    return folder


@pytest.fixture(scope="module")
def files(scored: dict[str, bytes]) -> dict[str, bytes]:
    return scored | UNLIKE | {name: content for name, (content, _) in UNREADABLE.items()} | CLUTTER


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> Path:
    return write_files(tmp_path_factory.mktemp("input") / "folder", files)


@pytest.fixture(scope="module")
def table(folder: Path, run: Path, screener: Path) -> dict[str, dict[str, str]]:
    return read_scores(run, folder, screener)


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def run_score(*flags: object) -> int:
    """The exit code of the command, in this process."""
    from flows.score import score

    return run_command(score, [str(flag) for flag in flags], "test", ScoreFlags)


def read_scores(run: Path, images: Path, screener: Path, *flags: object) -> dict[str, dict[str, str]]:
    """The table by path, after a command that ended well."""
    out = images.parent / "made" / f"{images.name}.csv"
    given = ["--run-dir", run, "--images", images, "--out", out, "--screening.screener", screener]
    assert run_score(*given, *flags) == 0
    with out.open(newline="", encoding="utf-8") as stream:
        return {row["path"]: row for row in csv.DictReader(stream)}


def test_the_table_has_a_row_for_each_image_in_order_and_five_columns(
    table: dict[str, dict[str, str]], folder: Path, files: dict[str, bytes]
) -> None:
    text = (folder.parent / "made" / "folder.csv").read_text(encoding="utf-8")
    assert text.startswith("path,probability,decision,device_score,refused\n")
    assert list(table) == sorted(set(files) - set(CLUTTER))
    assert [path.name for path in (folder.parent / "made").iterdir()] == ["folder.csv"]


def test_a_chest_x_ray_gets_numbers_of_six_digits_and_a_decision_from_the_threshold_on(
    table: dict[str, dict[str, str]], run: Path, scored: dict[str, bytes]
) -> None:
    threshold = json.loads((run / "metrics.json").read_text())["threshold"]
    for name in scored:
        row = table[name]
        assert len(row["probability"]) == len(row["device_score"]) == len("0.123456"), name
        assert row["decision"] == ("1" if float(row["probability"]) >= threshold else "0"), name
        assert row["refused"] == "", name
    assert {table[name]["decision"] for name in scored} == {"0", "1"}


def test_probability_and_device_score_are_what_the_networks_say_of_the_pixels(
    table: dict[str, dict[str, str]], run: Path, screener: Path, scored: dict[str, bytes]
) -> None:
    from tasks.devices.screener import load_screener, score_pixels
    from tasks.networks.classifier import predict
    from tasks.networks.files import load_network

    read = scored | UNLIKE
    pixels = np.stack([decode(content) for content in read.values()])
    said = predict(load_network(run), pixels), score_pixels(load_screener(screener), pixels)
    for i, name in enumerate(read):
        assert float(table[name]["probability"]) == pytest.approx(said[0][i], abs=2e-6), name
        assert float(table[name]["device_score"]) == pytest.approx(said[1][i], abs=2e-6), name


def test_an_image_that_looks_unlike_the_training_images_keeps_its_numbers_and_loses_its_decision(
    table: dict[str, dict[str, str]], run: Path
) -> None:
    bound = load_familiarity(run).bound
    for name in UNLIKE:
        row = table[name]
        assert row["refused"].startswith(STRANGE), name
        distance, shown = (float(part) for part in row["refused"].removeprefix(STRANGE).split(")")[0].split(", bound "))
        assert distance > bound >= shown, name
        assert row["decision"] == "", name
        assert 0 <= float(row["probability"]) <= 1 and 0 <= float(row["device_score"]) <= 1, name


def test_a_chest_without_its_upper_half_keeps_its_numbers_and_loses_its_decision_for_its_lungs(
    run: Path, screener: Path, scored: dict[str, bytes], tmp_path: Path
) -> None:
    half = encode(decode(scored["a/00.jpeg"])[112:])
    row = read_scores(run, write_files(tmp_path / "images", {"a.png": half}), screener)["a.png"]
    assert "shows no two lungs like those of the training images (" in row["refused"]
    assert row["decision"] == "" and 0 <= float(row["probability"]) <= 1 and 0 <= float(row["device_score"]) <= 1


def test_a_file_that_cannot_be_read_has_a_reason_and_no_number(table: dict[str, dict[str, str]]) -> None:
    for name, (_, reason) in UNREADABLE.items():
        assert table[name]["refused"].startswith(reason), name
        assert [table[name][column] for column in ("probability", "decision", "device_score")] == ["", "", ""], name


def test_the_same_folder_zipped_gives_the_same_table(
    table: dict[str, dict[str, str]], files: dict[str, bytes], folder: Path, run: Path, screener: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    read_scores(run, tmp_path / "x.zip", screener)
    assert (tmp_path / "made" / "x.zip.csv").read_bytes() == (folder.parent / "made" / "folder.csv").read_bytes()


@pytest.mark.slow
def test_a_row_depends_on_neither_the_number_nor_the_order_of_the_others(
    table: dict[str, dict[str, str]], scored: dict[str, bytes], run: Path, screener: Path, tmp_path: Path
) -> None:
    for name in ("a/00.jpeg", "a/07.jpeg"):
        alone = read_scores(run, write_files(tmp_path / name[2:4], {"x.jpeg": scored[name]}), screener)
        assert alone["x.jpeg"] | {"path": name} == table[name]
    many = {f"{i:02}.png": encode(noise(i)) for i in range(37)} | {"last.jpeg": scored["a/03.jpeg"]}
    crowd = read_scores(run, write_files(tmp_path / "many", many), screener)
    assert crowd["last.jpeg"] | {"path": "a/03.jpeg"} == table["a/03.jpeg"]


@pytest.mark.parametrize("threshold", [0, 1])
def test_the_threshold_of_the_run_moves_decisions_and_nothing_else(
    threshold: int, table: dict[str, dict[str, str]], folder: Path, run: Path, screener: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(run, tmp_path / "run")
    write_json(moved / "metrics.json", {"threshold": threshold})
    again = read_scores(moved, shutil.copytree(folder, tmp_path / "images"), screener)
    for name, row in again.items():
        decided = str(1 - threshold) if row["probability"] and not row["refused"] else ""
        assert row == table[name] | {"decision": decided}


def test_pixels_are_made_as_those_of_the_run_were(
    run: Path, screener: Path, scored: dict[str, bytes], tmp_path: Path
) -> None:
    from tasks.networks.classifier import predict
    from tasks.networks.files import load_network

    padded = shutil.copytree(run, tmp_path / "run")
    write_json(padded / "stages" / "pack.json", {"facts": {}, "parts": {"inputs": {"padding": True}}})
    wide = io.BytesIO()
    Image.open(io.BytesIO(scored["a/00.jpeg"])).resize((200, 90)).save(wide, "PNG")
    images = write_files(tmp_path / "images", {"a.png": wide.getvalue()})
    said = [float(read_scores(each, images, screener)["a.png"]["probability"]) for each in (padded, run)]
    expected = [predict(load_network(run), decode(wide.getvalue(), padding=how)[None])[0] for how in (True, False)]
    assert said == pytest.approx(expected, abs=2e-6)
    assert said[0] != said[1]


def test_a_finished_run_gives_its_images_the_probabilities_of_its_predictions(
    finished_run: Path, screener: Path, tmp_path: Path
) -> None:
    from tasks.pixels.packed import PackedImages
    from tasks.runs.manifest import image_id

    known = pd.read_csv(finished_run / "predictions.csv").set_index("path")["probability"]
    packed = PackedImages(finished_run, finished_run.parent / "cache")
    files = {f"{path}.png": encode(packed.read([image_id(path)])[0]) for path in known.index}
    said = read_scores(finished_run, write_files(tmp_path / "images", files), screener)
    assert len(said) == len(known) > 0
    for path, probability in known.items():
        assert float(said[f"{path}.png"]["probability"]) == pytest.approx(probability, abs=1e-5), path
    assert sum(bool(row["refused"]) for row in said.values()) <= 1


def test_nothing_in_the_run_folder_changes_and_the_address_of_the_table_is_the_last_line(
    run: Path,
    screener: Path,
    folder: Path,
    scored: dict[str, bytes],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    out = tmp_path / "new" / "place" / "scores.csv"
    flags = ["--run-dir", run, "--images", folder, "--out", out, "--screening.screener", screener]
    assert run_score(*flags) == 0
    assert capfd.readouterr().out.splitlines()[-1] == str(out)
    n_read = len(scored) + len(UNLIKE)
    assert f"scored {n_read + len(UNREADABLE)} images: " in caplog.text
    assert f"{len(UNLIKE) + len(UNREADABLE)} were refused, {len(UNLIKE)} of them as unlike" in caplog.text
    assert f"{len(CLUTTER)} other files left out" in caplog.text
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_strict_ends_with_code_2_when_an_image_was_refused_and_writes_the_table_all_the_same(
    run: Path, screener: Path, scored: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = {
        "unlike": {"a.jpeg": scored["a/00.jpeg"], "b.png": UNLIKE["noise.png"]},
        "unreadable": {"a.jpeg": scored["a/00.jpeg"], "b.png": b""},
        "fine": {"a.jpeg": scored["a/00.jpeg"]},
    }
    for name, code in (("unlike", 2), ("unreadable", 2), ("fine", 0)):
        place, out = write_files(tmp_path / name, images[name]), tmp_path / f"{name}.csv"
        flags = ["--run-dir", run, "--images", place, "--out", out, "--screening.screener", screener, "--strict"]
        capfd.readouterr()
        assert run_score(*flags) == code, name
        assert out.read_text().count("\n") == 1 + len(images[name])
        error = capfd.readouterr().err
        assert ("error: strict: 1 of 2 images were refused; " in error) == (code == 2), name


@pytest.mark.parametrize("name", ["model.keras", "model.sha256", "metrics.json", "familiar.npz"])
def test_a_file_that_the_run_lacks_or_that_was_changed_is_one_sentence_with_code_2_and_nothing_written(
    name: str, run: Path, screener: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "a.csv"
    for content in (None, b"x"):
        broken = shutil.copytree(run, tmp_path / str(content))
        (broken / name).unlink()
        if content:
            (broken / name).write_bytes(content)
        flags = ["--run-dir", broken, "--images", folder, "--out", out, "--screening.screener", screener]
        expect_refusal(capfd, flags, str(broken), name if content else f"{name} is missing: run the train flow")
        assert not out.parent.exists()


def test_a_run_folder_or_a_place_that_cannot_be_used_is_one_sentence_with_code_2(
    run: Path, screener: Path, scored: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = write_files(tmp_path / "images", {"a.jpeg": scored["a/00.jpeg"]})
    write_files(tmp_path, {"file": b"x", "empty/.DS_Store": b"x"})
    good: dict[str, object] = {
        "--run-dir": run,
        "--images": images,
        "--out": tmp_path / "new" / "x.csv",
        "--screening.screener": screener,
    }
    before = sorted(tmp_path.rglob("*"))
    metrics = (run / "metrics.json").read_bytes()
    cases: list[tuple[dict[str, object], str]] = [
        ({"--run-dir": tmp_path / "nowhere"}, "nowhere does not exist; name the folder of a finished run"),
        ({"--run-dir": tmp_path / "file"}, "file is a file; name a folder"),
        ({"--run-dir": tmp_path / "empty"}, "is missing: run the train flow on this run folder first"),
        ({"--images": tmp_path / "nowhere"}, "does not exist; give a folder, .zip or .tar.gz file on this machine"),
        ({"--images": tmp_path / "empty"}, "holds no image"),
        ({"--out": tmp_path}, "is a folder; name a .csv file in it"),
        ({"--out": images / "a.jpeg"}, "is named like an image or archive"),
        ({"--out": run / "metrics.json"}, "metrics.json is a file of the run; name another one"),
        ({"--screening.screener": tmp_path / "nowhere"}, "screening.screener: "),
        ({"--strict": "maybe"}, "strict: "),
    ]
    for change, sentence in cases:
        expect_refusal(capfd, [part for pair in (good | change).items() for part in pair], sentence)
        assert sorted(tmp_path.rglob("*")) == before, change
    assert (run / "metrics.json").read_bytes() == metrics
    expect_refusal(capfd, ["--images", images, "--out", "x.csv"], "run_dir: no run folder is named; give --run-dir DIR")
    expect_refusal(capfd, ["--run-dir", run, "--images", images], "out: is missing; give --out, see --help")


def expect_refusal(capfd: pytest.CaptureFixture[str], flags: list[object], *parts: str) -> None:
    """The command ends with code 2 and one sentence that holds the parts, and prints neither result nor traceback."""
    capfd.readouterr()
    assert run_score(*flags) == 2, flags
    shown = capfd.readouterr()
    last = shown.err.splitlines()[-1]
    assert last.startswith("error: "), flags
    assert all(part in last for part in parts), last
    assert "Traceback" not in shown.err, flags
    assert shown.out == "", flags


def test_a_table_in_the_run_folder_is_replaced_whole_or_not_at_all(
    run: Path, screener: Path, scored: dict[str, bytes], tmp_path: Path
) -> None:
    mine = shutil.copytree(run, tmp_path / "run")
    images = write_files(tmp_path / "images", {"a.jpeg": scored["a/00.jpeg"]})
    out = mine / "scores.csv"
    flags = ["--run-dir", mine, "--out", out, "--screening.screener", screener, "--images"]
    assert run_score(*flags, images) == 0
    first = out.read_bytes()
    assert run_score(*flags, tmp_path / "nowhere") == 2
    assert out.read_bytes() == first
    write_files(images, {"b.jpeg": scored["a/01.jpeg"]})
    assert run_score(*flags, images) == 0
    assert out.read_bytes().startswith(first)
    assert {path.name for path in mine.iterdir()} == {path.name for path in run.iterdir()} | {"scores.csv"}


def test_dashes_underscores_and_a_bare_strict_are_understood() -> None:
    flags = ["--run_dir", "r", "--images", "a_b", "--strict", "--out", "c-d"]
    settings, own = read_own_flags(flags, "x", ScoreFlags)
    assert own == {"images": "a_b", "out": "c-d", "strict": True, "labels": None}
    assert settings.run_dir == "r"


def test_the_help_lists_the_flows_own_flags_and_the_run_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_score("--help")
    shown = capsys.readouterr().out
    for flag in ("--run-dir", "--images", "--out", "--strict", "--screening.screener"):
        assert f"{flag} " in shown


def test_importing_the_flow_loads_neither_tensorflow_nor_scipy() -> None:
    code = "import sys, flows.score; print([m for m in ('tensorflow', 'keras', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_flow_is_deployed_on_demand_with_its_parameters_as_a_form() -> None:
    from flows.score import score

    deployments = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    ours = [each for each in deployments if each["entrypoint"] == "flows/score.py:score"]
    assert [(each["name"], each["work_pool"]["name"]) for each in ours] == [("on-demand", "cpu")]
    assert (score.name, score.parameters.required) == ("score", ["images", "out"])
    assert set(score.parameters.properties) == {"images", "out", "strict", "labels", "settings"}


def test_with_labels_figures_lie_beside_the_scores_and_a_table_of_other_images_is_refused_first(
    run: Path, screener: Path, folder: Path, scored: dict[str, bytes], tmp_path: Path
) -> None:
    lines = [f"{name},{i % 2},ward {i % 3}" for i, name in enumerate([*scored, "cut.png", "noise.png"])]
    labels, out = tmp_path / "labels.csv", tmp_path / "out" / "scores.csv"
    labels.write_text("\n".join(["path,label,group", *lines]))
    given = ["--run-dir", run, "--images", folder, "--screening.screener", screener, "--labels", labels]
    assert run_score(*given, "--out", out) == 0
    found = json.loads((tmp_path / "out" / "scores.metrics.json").read_text())
    counts = ("n_unread", "n_refused", "n_unlabelled", "n_no_patient")
    assert [found[name] for name in counts] == [1, 1, len(UNLIKE | UNREADABLE) - 2, N_SCORED + 2]
    assert found["all"]["n"] == N_SCORED + 1 and found["answered"]["n"] == N_SCORED
    assert sum(group["n"] for group in found["by_group"].values()) == N_SCORED
    labels.write_text("path,label\na/00.jpeg,ill\n")
    assert run_score(*given, "--out", tmp_path / "none.csv") == 2
    assert not (tmp_path / "none.csv").exists()
