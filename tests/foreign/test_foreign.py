"""Networks of other people: one function in every form gives the same answers; what is not plain is asked for."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_networks import OUTPUTS, SCALES, SIDE_PX, brightness, write_keras, write_onnx

from tasks.errors import PipelineError, SettingsError
from tasks.foreign import network as foreign
from tasks.foreign.network import ForeignNetwork, look_at, refuse_file
from tasks.foreign.reading import FileFacts, ReadAs, read_as
from tasks.networks.classifier import ops, shrink
from tasks.networks.keras_backend import keras
from tasks.pixels.greys import to_float

layers = keras.layers
PACKED = np.random.default_rng(1).integers(0, 256, (5, 224, 224), dtype=np.uint8)
PACKED[:3, :, :90] //= 2
NEEDS = {"logits": "softmax", "three": None, "softmax": None, "linear": None, "sigmoid": None}
FORMS = [
    *[(scale, 3, layout, "linear") for scale, layout in itertools.product(SCALES, ("first", "last"))],
    *[(scale, 1, layout, "sigmoid") for scale in ("unit", "bytes", "signed") for layout in ("first", "last")],
    *[("unit", 3, "last", ends) for ends in OUTPUTS],
]


def expected() -> np.ndarray:
    small = np.asarray(ops.convert_to_numpy(shrink(SIDE_PX)(to_float(PACKED))))[..., 0]
    return 1 / (1 + np.exp(-brightness(small)))


def asked(scale: str, ends: str, **more: Any) -> ReadAs:
    several = OUTPUTS[ends] > 1
    return ReadAs.model_validate({"scale": scale, "needs": NEEDS[ends], "pneumonia": "1" if several else None} | more)


def answer(path: Path, how: ReadAs) -> np.ndarray:
    return ForeignNetwork(path, look_at(refuse_file(str(path)), how)).ask(PACKED)


@pytest.mark.parametrize(
    ("write", "form"),
    [*((write_onnx, form) for form in FORMS), *((write_keras, form) for form in FORMS[::2])],  # which take longer
    ids=lambda value: getattr(value, "__name__", None) or "-".join(map(str, value)),
)
def test_a_function_in_any_form_gives_the_answers_of_the_function(tmp_path: Path, write: Any, form: Any) -> None:
    path = write(tmp_path / f"net.{write.__name__.removeprefix('write_')}", *form)
    scale, _, _, ends = form
    assert answer(path, asked(scale, ends)) == pytest.approx(expected(), abs=2e-4)


def test_what_stands_for_normal_is_turned_round(tmp_path: Path) -> None:
    one = write_onnx(tmp_path / "one.onnx", "unit", 1, "first", "sigmoid")
    two = write_onnx(tmp_path / "two.onnx", "unit", 1, "first", "logits")
    assert answer(one, asked("unit", "sigmoid", pneumonia="rest")) == pytest.approx(1 - expected(), abs=2e-4)
    assert answer(two, asked("unit", "logits", pneumonia="0")) == pytest.approx(1 - expected(), abs=2e-4)


@pytest.mark.parametrize("how", [{"batch": 1}, {"batch": 2}, {"free": True}])
def test_a_fixed_batch_and_a_free_side_change_no_answer(tmp_path: Path, how: dict[str, Any]) -> None:
    path = write_onnx(tmp_path / "net.onnx", "signed", 3, "first", "sigmoid", **how)
    side = {"side": SIDE_PX} if "free" in how else {}
    assert answer(path, asked("signed", "sigmoid", **side)) == pytest.approx(expected(), abs=2e-4)


def test_whole_bytes_are_a_scale_of_their_own(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "net.onnx", "bytes", 1, "last", "sigmoid", dtype="uint8")
    assert answer(path, ReadAs()) == pytest.approx(expected(), abs=0.02)
    with pytest.raises(SettingsError, match=r"^read\.scale: is unit, but the file has bytes; leave --read\.scale out$"):
        look_at(path, ReadAs(scale="unit"))


@pytest.mark.parametrize(
    ("first", "scale"),
    [
        (layers.Rescaling(1 / 255), "bytes"),
        (layers.Rescaling(1 / 127.5, offset=-1), "bytes"),
        (layers.Rescaling(2.0, offset=-1), "unit"),
        (layers.Normalization(mean=[0.485, 0.456, 0.406], variance=[0.05, 0.05, 0.05]), "unit"),
        (layers.Normalization(mean=[123.7, 116.3, 103.5], variance=[3409.0, 3262.0, 3291.0]), "bytes"),
    ],
)
def test_a_layer_inside_that_scales_greys_tells_which_it_takes(tmp_path: Path, first: Any, scale: str) -> None:
    path = write_keras(tmp_path / "net.keras", "unit", 3, "last", "sigmoid", [layers.RandomFlip(), first])
    reading = look_at(path, ReadAs())
    assert (reading.scale, reading.side, reading.channels, reading.layout) == (scale, SIDE_PX, 3, "last")
    assert "scale" in reading.guessed and look_at(path, ReadAs(scale="signed")).scale == "signed"


def test_an_output_of_several_is_read_by_its_name(tmp_path: Path) -> None:
    one = keras.saving.load_model(write_keras(tmp_path / "one.keras", "unit", 1, "last", "sigmoid"))
    other = layers.Dense(3, activation="softmax", name="kind")(layers.Flatten()(one.input))
    path = tmp_path / "net.keras"
    keras.Model(one.input, {"probability": one.output, "kind": other}).save(path)
    how = asked("unit", "sigmoid", output="probability", needs="none")
    assert answer(path, how) == pytest.approx(expected(), abs=2e-4)
    assert look_at(path, asked("unit", "softmax", output="kind")).needs == "none"
    with pytest.raises(SettingsError, match=r"give --read\.output \(kind, probability\)"):
        look_at(path, asked("unit", "sigmoid"))


FACTS = {
    "sha256": "0" * 64,
    "shape": (None, 150, 150, 3),
    "dtype": "float32",
    "outputs": {"y": 2},
    "ends": {"y": "linear"},
}


@pytest.mark.parametrize(
    ("facts", "flags", "says"),
    [
        (
            {},
            {"pneumonia": "1", "needs": "softmax"},
            r"read\.scale: the file leaves it open; give --read\.scale \(unit, ",
        ),
        ({}, {"scale": "unit", "needs": "softmax"}, r"read\.pneumonia: .* give --read\.pneumonia \(0, 1\)"),
        ({}, {"scale": "unit", "pneumonia": "1"}, r"read\.needs: .* give --read\.needs \(none, sigmoid, softmax\)"),
        ({}, {"side": 100}, r"read\.side: is 100, but the file has 150; leave --read\.side out"),
        ({}, {"channels": 1}, r"read\.channels: is 1, but the file has 3"),
        ({}, {"layout": "first"}, r"read\.layout: is first, but the file has last"),
        ({}, {"scale": "unit", "pneumonia": "2"}, r"read\.pneumonia: 2 does not go with this file; only 0, 1"),
        ({}, {"scale": "unit", "pneumonia": "rest"}, r"read\.pneumonia: rest does not go with this file"),
        ({"shape": (None, None, None, 3)}, {}, r"read\.side: .* give --read\.side \(a number\)"),
        ({"shape": (None, 3, 150, 3)}, {}, r"read\.layout: .* give --read\.layout \(first, last\)"),
        ({"shape": (None, None, None, None)}, {}, r"read\.layout"),
        ({"shape": (None, None, None, None)}, {"layout": "last"}, r"read\.channels: .* \(1, 3\)"),
        (
            {"shape": (None, 150, 150, 4)},
            {"layout": "last"},
            r"read\.channels: 4 does not go with this file; only 1, 3",
        ),
        ({"shape": (None, 150, 200, 3)}, {}, "not square"),
        ({"shape": (None, 150, 150, 1)}, {"scale": "imagenet"}, r"read\.scale: imagenet does not go with"),
        ({"shape": (None, 224)}, {}, r"takes float32 \(any, 224\); only images"),
        ({"dtype": "int64"}, {}, "takes int64"),
        ({"outputs": {"y": 50_176}}, {"scale": "unit"}, "50176 numbers for an image"),
        ({"outputs": {"y": 0}}, {"scale": "unit"}, "an unknown number of numbers"),
        ({"outputs": {"y": 1, "z": 1}}, {"scale": "unit", "output": "x"}, r"read\.output: x does not .* only y, z"),
        ({"outputs": {"y": 1}, "ends": {}}, {"scale": "unit"}, r"read\.needs"),
    ],
)
def test_what_the_file_leaves_open_is_asked_for_and_what_contradicts_it_is_refused(
    facts: dict[str, Any], flags: dict[str, Any], says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        read_as(FileFacts.model_validate(FACTS | facts), ReadAs.model_validate(flags))


def test_all_of_a_reading_is_said_and_from_where_it_is_known() -> None:
    flags = {"scale": "signed", "pneumonia": "1", "needs": "softmax"}
    said = read_as(FileFacts.model_validate(FACTS), ReadAs.model_validate(flags)).describe()
    assert said == [
        ("Side of an image", "150 px", "the file"),
        ("Channels", "3, all equal", "the file"),
        ("Place of channels", "after height and width", "the file"),
        ("Greys", "-1 (black) to 1 (white)", "--read.scale"),
        ("Output", "y", "the file"),
        ("Pneumonia", "number 1 (from 0) of 2", "--read.pneumonia"),
        ("To be a probability it needs", "a softmax, all its numbers are logits", "--read.needs"),
    ]


def test_an_answer_that_is_no_probability_is_refused(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "net.onnx", "unit", 1, "first", "linear")
    with pytest.raises(PipelineError, match=r"which is no probability; give another --read\.needs"):
        answer(path, asked("unit", "linear", needs="none"))


def test_a_network_that_was_exchanged_after_it_was_read_is_refused(tmp_path: Path) -> None:
    for write, name in ((write_onnx, "net.onnx"), (write_keras, "net.keras")):
        path = write(tmp_path / name, "unit", 1, "last", "sigmoid")
        reading = look_at(path, ReadAs(scale="unit"))
        write(path, "unit", 1, "last", "linear")
        with pytest.raises(PipelineError, match="what was read before"):
            ForeignNetwork(path, reading)


def test_a_file_that_is_too_large_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_onnx(tmp_path / "net.onnx", "unit", 1, "last", "sigmoid")
    monkeypatch.setattr(foreign, "MAX_BYTES", 100)
    with pytest.raises(SettingsError, match=r"^model: .*net\.onnx has 0\.0 GB; at most"):
        refuse_file(str(path))
