"""Scoring without an engine: what is read of a run, and how a row is written."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.errors import RunError, SettingsError
from tasks.networks.familiarity import fit_familiarity, save_familiarity
from tasks.networks.lung_fields import LungBounds, save_bounds
from tasks.scoring.loose_images import LooseBatch
from tasks.scoring.scores import (
    HEADER,
    ScoredImage,
    as_packed,
    decide_image,
    describe_distance,
    find_scored_images,
    load_scorer,
    read_threshold,
    refuse_run_files,
    table_rows,
)
from tasks.settings import Settings

MODEL = b"a network"
NO_BOUNDS = LungBounds({}, "another segmenter", 0)
SHA256 = hashlib.sha256(MODEL).hexdigest()


def write_run(folder: Path, **changes: object) -> Path:
    """A run folder with a network, its checksum and metrics; ``None`` leaves a file out."""
    files: dict[str, object] = {
        "model.keras": MODEL,
        "model.sha256": f"{SHA256}  model.keras\n".encode(),
        "metrics.json": {"threshold": 0.41},
    }
    for name, content in (files | {name.replace("_", "."): content for name, content in changes.items()}).items():
        folder.mkdir(parents=True, exist_ok=True)
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def write_stage(run: Path, stage: str, **inputs: object) -> None:
    (run / "stages").mkdir(exist_ok=True)
    (run / "stages" / f"{stage}.json").write_text(json.dumps({"facts": {}, "parts": {"inputs": inputs}}))


def test_the_threshold_is_the_one_that_was_measured_on_this_network(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert read_threshold(run) == 0.41
    write_stage(run, "evaluate", model=SHA256)
    assert read_threshold(run) == 0.41
    write_stage(run, "evaluate", model="0" * 64)
    with pytest.raises(RunError, match=r"metrics\.json was measured on another network: run the train flow"):
        read_threshold(run)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_keras": None}, "model.keras is missing: run the train flow on this run folder first"),
        ({"model_sha256": None}, "model.sha256 is missing: run the train flow on this run folder first"),
        ({"metrics_json": None}, "metrics.json is missing: run the train flow on this run folder first"),
        ({"model_keras": MODEL + b"x"}, "model.keras does not match model.sha256"),
        ({"model_sha256": b"0" * 64}, "model.keras does not match model.sha256"),
        ({"model_sha256": b""}, "model.keras does not match model.sha256"),
        ({"model_sha256": b"\xff\xfe\x00"}, "model.keras does not match model.sha256"),
        ({"metrics_json": b"{"}, "metrics.json is not JSON"),
        ({"metrics_json": {}}, "metrics.json names no threshold"),
        ({"metrics_json": []}, "metrics.json names no threshold"),
        ({"metrics_json": {"threshold": None}}, "metrics.json names no threshold"),
        ({"metrics_json": {"threshold": True}}, "metrics.json names no threshold"),
        ({"metrics_json": {"threshold": "0.4"}}, "metrics.json names no threshold"),
        ({"metrics_json": {"threshold": 1.2}}, "metrics.json names no threshold"),
        ({"metrics_json": b'{"threshold": NaN}'}, "metrics.json names no threshold"),
    ],
)
def test_a_run_without_network_or_threshold_is_refused_by_the_name_of_the_file(
    changes: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError) as raised:
        read_threshold(write_run(tmp_path, **changes))
    assert str(raised.value).startswith(f"{tmp_path}/{sentence}")


@pytest.mark.parametrize("padding", [True, False])
def test_pixels_are_padded_where_those_of_the_run_were_and_else_as_the_settings_say(
    padding: bool, tmp_path: Path
) -> None:
    given = Settings.model_validate({"packing": {"padding": not padding}})
    assert as_packed(tmp_path, given).packing.padding is not padding
    write_stage(tmp_path, "pack", padding=padding)
    assert as_packed(tmp_path, given).packing.padding is padding


def test_a_table_may_replace_a_table_of_scores_in_the_run_folder_and_no_other_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "scores.csv").write_text(HEADER)
    (tmp_path / "other.csv").write_text("x")
    for allowed in (run / "new.csv", run / "scores.csv", tmp_path / "other.csv"):
        refuse_run_files(run, str(allowed))
    for file in (run / "metrics.json", run / ".." / "run" / "model.sha256"):
        with pytest.raises(SettingsError, match="is a file of the run; name another one"):
            refuse_run_files(run, str(file))
    with pytest.raises(RunError, match="does not exist; name the folder of a finished run"):
        refuse_run_files(tmp_path / "nowhere", "x.csv")


def test_a_run_of_too_few_images_and_one_by_another_segmenter_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    noise = np.random.default_rng(1).integers(0, 256, (30, 224, 224), np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(noise[0]).save(tmp_path / "images" / "a.png")
    settings = Settings(run_dir=str(run))
    save_bounds(NO_BOUNDS, run)
    for n, told in ((2, True), (30, False)):
        save_familiarity(fit_familiarity([noise[:n]], [1, n]), run)
        facts = find_scored_images.fn(str(tmp_path / "images"), str(tmp_path / "x.csv"), settings)
        assert facts == {"n_images": 1, "n_left_out": 0}
        shown = capsys.readouterr().out
        assert ("too few images to tell what looks unlike them" in shown) is told
        assert f"warning: another segmenter drew the lungs of {run}" in shown


def test_a_network_that_is_none_of_a_run_is_refused_by_name(tmp_path: Path) -> None:
    from hostile import network

    from tasks.networks.files import save_network

    run = write_run(tmp_path)
    save_familiarity(fit_familiarity([np.zeros((3, 224, 224), np.uint8)], [1, 3]), run)
    save_bounds(NO_BOUNDS, run)
    save_network(network(), run)
    with pytest.raises(RunError, match=r"model\.keras is not a network of a run: run the train flow"):
        load_scorer(run, Settings(run_dir=str(run)))


@pytest.mark.parametrize(("distance", "bound"), [(9.1, 4.0), (1.8501, 1.85), (1.85001, 1.85), (1e9, 0.001)])
def test_a_refusal_shows_a_distance_beyond_the_bound(distance: float, bound: float) -> None:
    said = describe_distance(distance, bound)
    start = "does not look like a chest X-ray of the kind this network was trained on (distance "
    assert said.startswith(start)
    shown = [float(part) for part in said.removeprefix(start)[:-1].split(", bound ")]
    assert shown[0] > shown[1]


def test_an_image_within_the_bound_is_not_refused() -> None:
    assert describe_distance(1.85, 1.85) == describe_distance(5.0, float("inf")) == ""


def test_a_decision_is_made_from_the_threshold_on_and_not_for_a_refused_image() -> None:
    said = [decide_image(ScoredImage(p, 0.5, refused), 0.41) for p in (0.409999, 0.41) for refused in ("", "why")]
    assert said == ["0", "", "1", ""]
    assert ScoredImage(0.9, 0.5, "one", "two").refused == "one; two"
    assert decide_image(ScoredImage(0.9, 0.5, lungless="two"), 0.41) == ""


def test_a_row_has_five_cells_whatever_its_path_holds() -> None:
    batch = LooseBatch(('a,"b".png', "x.png", "new\nline.png"), ("", "is empty", ""), np.empty((2, 224, 224), np.uint8))
    images = [ScoredImage(0.5, 0.25, ""), ScoredImage(1.0, 0.0, "looks (1, 2)")]
    assert table_rows(batch, images, 0.41) == [
        '"a,""b"".png",0.500000,1,0.250000,\n',
        "x.png,,,,is empty\n",
        '"new\nline.png",1.000000,,0.000000,"looks (1, 2)"\n',
    ]
