"""Files of other people's networks that bring code, name other files, or are no such files: refused in one sentence."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fault_table import FaultTable
from foreign_networks import write_keras, write_onnx
from hostile import DAMAGES, bounded_memory, damage, ends_well, hostile  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import PipelineError
from tasks.foreign.network import look_at, refuse_file
from tasks.foreign.reading import ReadAs
from tasks.networks.keras_backend import keras

READ = ReadAs(scale="unit", needs="none", pneumonia="0")


def look(path: Path) -> None:
    look_at(refuse_file(str(path)), READ)


@pytest.fixture(scope="module", params=["keras", "onnx"])
def whole(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is taken."""
    write = write_keras if request.param == "keras" else write_onnx
    path = write(tmp_path_factory.mktemp("whole") / f"net.{request.param}", "unit", 1, "last", "sigmoid")
    look(path)
    return path


@given(kind=st.sampled_from(DAMAGES), seed=st.integers(0, 2**32 - 1))
@hostile
def test_a_damaged_file_is_read_or_refused(
    faults: FaultTable, whole: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int
) -> None:
    path = tmp_path_factory.mktemp("damaged") / whole.name
    path.write_bytes(damage(whole.read_bytes(), kind, seed))
    ends_well(faults, lambda: look(path))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


H5 = b"\x89HDF\r\n\x1a\n"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.h5", H5, r"without its safe mode; save it from Keras 3 as \.keras, or export"),
        ("a.keras", H5, "is named .keras, but is an HDF5 file"),
        ("a.onnx", H5, "is named .onnx, but is an HDF5 file"),
        ("a.pt", b"PK\x03\x04", r"would run code that it brings; export it with torch\.onnx\.export"),
        ("a.onnx", b"PK\x03\x04", "is named .onnx, but is a zip"),
        ("a.pkl", pickle.dumps([1]), "would run code"),
        ("a.keras", pickle.dumps([1]), "is named .keras, but is a pickle"),
        ("a.keras", b"no zip", "does not load"),
        ("a.onnx", b"", "does not load as ONNX"),
        ("a.onnx", b"no protobuf at all", "does not load as ONNX"),
        ("a.pb", b"\x08\x01", "neither .keras nor .onnx"),
        ("a", b"", "neither .keras nor .onnx"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_the_reason_and_a_way_out(
    faults: FaultTable, tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    faults.n_cases += 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PipelineError, match=says) as caught:
        look(tmp_path / name)
    assert name in str(caught.value)


def test_what_is_no_file_here_is_refused(faults: FaultTable, tmp_path: Path) -> None:
    (tmp_path / "folder.keras").mkdir()
    for place in (tmp_path / "none.onnx", tmp_path / "folder.keras", "s3://bucket/a.onnx", "a\x00b.onnx"):
        faults.n_cases += 1
        with pytest.raises(PipelineError, match=r"is no file on this machine|cannot be read"):
            refuse_file(str(place))


def test_code_in_a_network_does_not_run(faults: FaultTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pixels = keras.Input((16, 16, 1))
    runs = keras.layers.Lambda(lambda x: [__import__("os").makedirs("it-ran", exist_ok=True), x][1])
    keras.Model(pixels, keras.layers.Dense(1)(keras.layers.Flatten()(runs(pixels)))).save("net.keras")
    Path("it-ran").rmdir()
    assert not ends_well(faults, lambda: look(tmp_path / "net.keras"))
    assert not Path("it-ran").exists()


def elsewhere(graph: Any, place: str) -> None:
    tensor = graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)


def in_a_branch(graph: Any, place: str) -> None:
    inner = onnx.helper.make_graph([], "inner", [], [], [graph.initializer[0]])
    elsewhere(inner, place)
    graph.node.append(onnx.helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner))


def of_its_own(graph: Any, place: str) -> None:
    graph.node[-1].domain = "evil"
    graph.node[-1].op_type = "Run"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (elsewhere, "it has weights in other files"),
        (in_a_branch, "it has weights in other files"),
        (of_its_own, "evil:Run.* is not a registered"),
    ],
)
def test_onnx_that_names_other_files_or_operators_of_its_own_is_refused(
    faults: FaultTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, str], None], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    faults.n_cases += 1
    path = write_onnx(tmp_path / "net.onnx", "unit", 1, "last", "sigmoid")
    proto = onnx.load(path)
    (tmp_path / "weights").write_bytes(np.ones(256, np.float32).tobytes())
    change(proto.graph, "weights")
    proto.opset_import.add(domain="evil", version=1)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(PipelineError, match=says):
        look(path)
