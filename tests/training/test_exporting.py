"""Exporting: the file answers as the model does, says how it is asked, and is not kept where it answers otherwise."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tasks.errors import RunError, SettingsError
from tasks.networks.classifier import answer, build_member, join_members, set_calibration
from tasks.networks.keras_backend import keras
from tasks.networks.segmenter import load_segmenter
from tasks.pixels.greys import to_float
from tasks.records import Facts
from tasks.runs.run import Run
from tasks.settings import Settings, TrainingSettings
from tasks.training.exporting import MAX_DIFFERENCE, describe_onnx, prepare_export, write_onnx


def x_rays(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 224, 224), dtype=np.uint8)


@pytest.fixture(scope="module", params=["varied", pytest.param("lungs", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> keras.Model:
    settings = TrainingSettings(side_px=64, width=8, field=request.param)
    members = [build_member(settings, seed, f"member_{seed}") for seed in (1, 2)]
    model = join_members(members, load_segmenter() if request.param == "lungs" else None)
    set_calibration(model, "probability", 1.7, -0.4)
    return model


def test_the_file_answers_as_the_model_does_whatever_the_number_of_images(model: keras.Model, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    assert write_onnx(model, path, {}, x_rays(5)) <= MAX_DIFFERENCE
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (1, 7):
        names = ("probability", "bacteria", "members")
        found = dict(zip(names, session.run(names, {"pixels": to_float(x_rays(n))}), strict=True))
        expected = answer(model, x_rays(n))
        np.testing.assert_allclose(found["probability"][:, 0], expected.probability, atol=MAX_DIFFERENCE)
        np.testing.assert_allclose(found["bacteria"][:, 0], expected.bacteria, atol=MAX_DIFFERENCE)
        np.testing.assert_allclose(found["members"], expected.members, atol=MAX_DIFFERENCE)


def test_its_metadata_say_how_it_is_asked_and_from_which_probability_on_it_calls_pneumonia(tmp_path: Path) -> None:
    model, path = join_members([build_member(TrainingSettings(side_px=32, width=4), 1)]), tmp_path / "model.onnx"
    write_onnx(model, path, describe_onnx({"balanced": 0.25, "high_sensitivity": 0.1}, "abc", padded=False), x_rays(2))
    told = {one.key: one.value for one in onnx.load(path).metadata_props}
    assert float(told["threshold"]) == float(told["threshold_balanced"]) == 0.25
    assert float(told["threshold_high_sensitivity"]) == 0.1
    assert told["version"] == "abc"
    assert "(n, 224, 224, 1)" in told["input"] and "255" in told["scale"]


@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = join_members([build_member(TrainingSettings(side_px=32, width=4), 1)]), tmp_path / "model.onnx"
    write, other = type(model).export, join_members([build_member(TrainingSettings(side_px=32, width=4), 2)])
    answer(other, x_rays(1))
    other(to_float(x_rays(1)))
    monkeypatch.setattr(model, "export", lambda *args, **named: write(other, *args, **named), raising=False)
    with pytest.raises(RunError, match=r"answers otherwise than model\.keras, by up to"):
        write_onnx(model, path, {}, x_rays(4))
    assert not path.exists()


@pytest.mark.slow
def test_a_network_that_onnx_does_not_know_is_refused_in_one_sentence(tmp_path: Path) -> None:
    pixels = keras.Input((224, 224, 1), name="pixels")
    small = keras.layers.Resizing(32, 32, antialias=True)(pixels)  # TensorFlow's own operation
    mean = keras.layers.GlobalAveragePooling2D()(small)
    model = keras.Model(pixels, {"probability": mean, "bacteria": mean, "members": mean})
    with pytest.raises(RunError, match=r"export: the network cannot be written as ONNX .* leave export out"):
        write_onnx(model, tmp_path / "model.onnx", {}, x_rays(2))


def test_before_anything_is_trained_another_backend_is_refused_and_an_older_export_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run_of(**settings: str) -> Run:
        places = {"run_dir": str(tmp_path / "run"), "storage": {"cache": str(tmp_path / "cache")}}
        return Run(Settings.model_validate(places | settings))

    def make(out: Path) -> Facts:
        (out / "model.onnx").write_text("older")
        return {}

    run_of().stage("export", given={}, make=make)
    assert (tmp_path / "run" / "model.onnx").exists()
    monkeypatch.setattr("tasks.training.exporting.find_backend", lambda: "jax")
    prepare_export(run_of())
    assert not (tmp_path / "run" / "model.onnx").exists()
    assert not (tmp_path / "run" / "stages" / "export.json").exists()
    with pytest.raises(SettingsError, match="export: onnx is written from TensorFlow, not jax"):
        prepare_export(run_of(export="onnx"))
