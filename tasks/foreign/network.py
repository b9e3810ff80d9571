"""Networks of other people: ``.keras`` and ``.onnx`` files, refused where they bring more than layers, and asked."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.errors import RunError, SettingsError
from tasks.files import sha256_of_file
from tasks.foreign.reading import FileFacts, ReadAs, Reading, read_as
from tasks.pixels.greys import SIDE_PX, to_float

MAX_BYTES = 2_000_000_000  # what a file of protobuf holds at most
BATCH_IMAGES = 32
BY_KERAS = "save it from Keras 3 as .keras, or export it as .onnx"
BY_TORCH = "loading it would run code that it brings; export it with torch.onnx.export"
BY_H5 = f"Keras loads such a file without its safe mode; {BY_KERAS}"
ENDINGS = dict.fromkeys((".h5", ".hdf5"), BY_H5)
ENDINGS |= dict.fromkeys((".pt", ".pth", ".pkl", ".pickle", ".joblib", ".ckpt"), BY_TORCH)
STARTS = {b"\x89HDF": f"an HDF5 file: {BY_H5}", b"\x80": f"a pickle: {BY_TORCH}", b"PK": f"a zip: {BY_KERAS}"}
"""Why files with these names, or first bytes, are not taken, and the way out."""
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet, as torchvision has them
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)

Batch = NDArray[Any]
Network = Callable[[Batch], dict[str, Batch]]
"""A batch as the file takes it -> its outputs by name, ``(n, …)`` each."""


def refuse_file(model: str) -> Path:
    """The path of a network's file, judged by name, size and first bytes; nothing in it is run.

    Raises:
        SettingsError: If it is not there, too large, or of a kind that is not taken.
    """
    path = Path(model)
    ending = path.suffix.lower()
    try:
        if "://" in model or not path.is_file():
            raise SettingsError(f"model: {model} is no file on this machine; name a .keras or .onnx file")
        n_bytes = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(4)
    except (OSError, ValueError) as error:
        raise SettingsError(f"model: {model} cannot be read ({error}); name a .keras or .onnx file") from None
    if n_bytes > MAX_BYTES:
        raise SettingsError(f"model: {path} has {n_bytes / 1e9:,.1f} GB; at most {MAX_BYTES / 1e9:g} GB are loaded")
    if ending not in (".keras", ".onnx"):
        raise SettingsError(f"model: {path} is neither .keras nor .onnx: {ENDINGS.get(ending, BY_KERAS)}")
    for first, kind in STARTS.items():
        if start.startswith(first) and (first, ending) != (b"PK", ".keras"):
            raise SettingsError(f"model: {path} is named {ending}, but is {kind}")
    return path


def look_at(path: Path, asked: ReadAs) -> Reading:
    """How the network of a file is read, after it answered one grey image.

    Raises:
        SettingsError: If the file leaves open how it is read.
        RunError: If it does not load, or gives no probability.
    """
    facts, network = _open(path, sha256_of_file(path))
    reading = read_as(facts, asked)
    _answer(network, reading, np.full((1, SIDE_PX, SIDE_PX), 0.5, np.float32))
    return reading


class ForeignNetwork:
    """A network of other people, loaded, and asked as its reading says.

    Raises:
        RunError: If the file is not the one that was read.
    """

    def __init__(self, path: Path, reading: Reading) -> None:
        self.reading = reading
        self._network = _open(path, reading.facts.sha256)[1]

    def answer(self, grey: NDArray[np.float32]) -> NDArray[np.float64]:
        """X-rays float32 ``(n, 224, 224)``, 0.0 to 1.0 -> P(label = 1), ``(n,)``.

        Raises:
            RunError: If it gives no probability for an image.
        """
        return _answer(self._network, self.reading, grey)

    def ask(self, packed: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The same for packed images, uint8 ``(n, 224, 224)``."""
        parts = np.array_split(packed, len(packed) // 256 + 1)
        return np.concatenate([self.answer(to_float(part)[..., 0]) for part in parts])


# -- files -------------------------------------------------------------------------------------------------------------


def _open(path: Path, sha256: str) -> tuple[FileFacts, Network]:
    """What a file says of its network, and the network.

    Raises:
        RunError: If the file has another checksum, or does not load.
        SettingsError: If it takes more than one input.
    """
    return (_open_onnx if path.suffix.lower() == ".onnx" else _open_keras)(path, sha256)


def _open_keras(path: Path, sha256: str) -> tuple[FileFacts, Network]:
    from tasks.networks.files import load_checked
    from tasks.networks.keras_backend import keras

    way_out = "save it again with layers of Keras alone, or export it as .onnx"
    model = load_checked(path, sha256, "what was read before", way_out=way_out)
    inputs, layers = getattr(model, "inputs", None) or [], model.layers
    if len(inputs) != 1:
        raise SettingsError(f"model: {path} does not take one input of a known shape; save it as a functional model")
    several = (
        sorted(model.output) if isinstance(model.output, dict) else [f"output_{i}" for i in range(len(model.outputs))]
    )
    last = {layer.name: layer for layer in layers} if len(several) > 1 else {several[0]: layers[-1]}
    facts = FileFacts(
        sha256=sha256,
        shape=tuple(inputs[0].shape),
        dtype=keras.backend.standardize_dtype(inputs[0].dtype),
        white=_find_white(model),
        outputs={name: _count(tensor.shape) for name, tensor in zip(several, model.outputs, strict=True)},
        ends={name: _name_activation(last.get(name)) for name in several},
    )

    def network(batch: Batch) -> dict[str, Batch]:
        found = keras.tree.flatten(model.predict_on_batch(batch))
        return {name: keras.ops.convert_to_numpy(value) for name, value in zip(several, found, strict=True)}

    return facts, network


def _name_activation(layer: Any) -> str:
    while getattr(layer, "layers", None):
        layer = layer.layers[-1]
    activation = getattr(getattr(layer, "activation", None), "__name__", "")
    return "softmax" if type(layer).__name__ == "Softmax" else str(activation)


def _find_white(layer: Any) -> float | None:
    """Which grey the first layer brings to 1 (``Rescaling``), or expects by its mean (``Normalization``)."""
    while getattr(layer, "layers", None):
        # Layers that change images at random do so in training alone.
        rest = (one for one in layer.layers if not type(one).__name__.startswith(("InputLayer", "Random")))
        layer = next(rest, None)
    if type(layer).__name__ == "Rescaling":
        return next(
            (w for w in (1.0, 255.0) if np.allclose(np.multiply(layer.scale, w) + layer.offset, 1, atol=0.02)), None
        )
    if type(layer).__name__ == "Normalization":
        mean = float(np.mean(layer.mean))
        return 1.0 if 0.05 < mean < 1 else 255.0 if mean > 10 else None
    return None


def _open_onnx(path: Path, sha256: str) -> tuple[FileFacts, Network]:
    import onnx
    import onnxruntime

    try:
        if sha256_of_file(path) != sha256:
            raise ValueError("it is not what was read before")
        proto = onnx.load_model_from_string(content := path.read_bytes())
        if any(part.data_location == part.EXTERNAL or part.external_data for part in _list_tensors(proto)):
            raise ValueError("it has weights in other files")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # both packages raise many kinds
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        way_out = "export it again, with standard operators alone and all weights in the one file"
        raise RunError(f"{path} does not load as ONNX ({reason}): {way_out}") from None
    inputs, several = session.get_inputs(), [one.name for one in session.get_outputs()]
    if len(inputs) != 1:
        raise SettingsError(f"model: {path} takes {len(inputs)} inputs; only one is put to it, the image")
    kind = inputs[0].type.removeprefix("tensor(").removesuffix(")")
    facts = FileFacts(
        sha256=sha256,
        shape=tuple(size if isinstance(size, int) else None for size in inputs[0].shape),
        dtype={"float": "float32", "double": "float64"}.get(kind, kind),
        outputs={one.name: _count(one.shape) for one in session.get_outputs()},
        ends={name: _name_operator(proto.graph, name) for name in several},
    )
    return facts, lambda batch: dict(zip(several, session.run(several, {inputs[0].name: batch}), strict=True))


def _list_tensors(message: Any) -> Iterator[Any]:
    """All tensors in a message of ONNX, however deep."""
    for field, value in message.ListFields():
        for part in value if field.is_repeated else [value]:
            if hasattr(part, "data_location"):
                yield part
            elif hasattr(part, "ListFields"):
                yield from _list_tensors(part)


OPERATORS = {
    "Sigmoid": "sigmoid",
    "Softmax": "softmax",
    "LogSoftmax": "log_softmax",
    "Gemm": "linear",
    "MatMul": "linear",
}
PASSING = ("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Add")
"""Operators that leave an activation what it is; a sum counts as that of a product and a bias."""


def _name_operator(graph: Any, name: str) -> str:
    made_by = {output: node for node in graph.node for output in node.output}
    for _ in made_by:
        node = made_by.get(name)
        if node is None or node.op_type not in PASSING:
            return OPERATORS.get(node.op_type, "") if node else ""
        name = next((one for one in node.input if one in made_by), "")
    return ""


def _count(shape: Any) -> int:
    """Numbers for one image in an output ``(n, …)``; 0 where the file does not tell."""
    sizes = list(shape or ())[1:]
    return int(np.prod(sizes)) if shape and all(isinstance(size, int) for size in sizes) else 0


# -- pixels and answers ------------------------------------------------------------------------------------------------


def _answer(network: Network, reading: Reading, grey: NDArray[np.float32]) -> NDArray[np.float64]:
    from tasks.networks.classifier import ops, shrink

    size, resize = reading.facts.shape[0] or BATCH_IMAGES, shrink(reading.side)
    found = [np.empty(0)]
    for start in range(0, len(grey), size):
        part = grey[start : start + size, ..., None]
        # One batch size only: some files fix it, and other networks are compiled again for each.
        full = np.pad(part, ((0, size - len(part)), (0, 0), (0, 0), (0, 0)))
        small = full if reading.side == SIDE_PX else ops.convert_to_numpy(resize(full))
        values = network(to_input(np.asarray(small), reading))[reading.output]
        found.append(to_probability(np.asarray(values, np.float64).reshape(size, -1), reading)[: len(part)])
    return np.concatenate(found)


def to_input(grey: NDArray[np.float32], reading: Reading) -> Batch:
    """X-rays float32 ``(n, side, side, 1)``, 0.0 to 1.0, as the network takes them."""
    pixels: Batch = np.repeat(grey, reading.channels, axis=-1)
    if reading.scale == "imagenet":
        pixels = (pixels - MEAN) / DEVIATION
    else:
        pixels = {"unit": pixels, "bytes": pixels * 255, "signed": pixels * 2 - 1}[reading.scale]
    if reading.layout == "first":
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return (np.rint(pixels) if reading.facts.dtype == "uint8" else pixels).astype(reading.facts.dtype)


def to_probability(values: NDArray[np.float64], reading: Reading) -> NDArray[np.float64]:
    """P(label = 1) from the numbers of the output: ``(n, numbers)`` -> ``(n,)``.

    Raises:
        RunError: If one is no probability.
    """
    if reading.needs == "softmax":
        values = np.exp(values - values.max(1, keepdims=True))
        values = values / values.sum(1, keepdims=True)
    elif reading.needs == "sigmoid":
        values = 1 / (1 + np.exp(-np.clip(values, -500, 500)))
    rest = reading.pneumonia == "rest"
    p = values[:, 0 if rest else int(reading.pneumonia)]
    if not ((p >= -1e-6) & (p <= 1 + 1e-6)).all():  # nor where it is no number
        raise RunError(
            f"model: it gives {p.min():g} to {p.max():g}, which is no probability; give another --read.needs"
        )
    p = np.clip(p, 0, 1)
    return 1 - p if rest else p
