"""Tiny networks of other people, as .keras and .onnx files, that all compute one function of an X-ray."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SIDE_PX = 16
SCALES = {
    "unit": (np.ones(3), np.zeros(3)),
    "bytes": (np.full(3, 255.0), np.zeros(3)),
    "signed": (np.full(3, 2.0), np.full(3, -1.0)),
    "imagenet": (1 / np.array([0.229, 0.224, 0.225]), -np.array([0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]),
}
"""Of each channel: factor and offset from a grey of 0 to 1 to what the network takes."""
OUTPUTS = {"sigmoid": 1, "linear": 1, "softmax": 2, "logits": 2, "three": 3}
"""What a network ends in, and how many numbers it gives for an image."""


def brightness(small: np.ndarray) -> np.ndarray:
    """The function: a logit that rises with the grey of the left half, float ``(n, side, side)`` -> ``(n,)``."""
    return np.asarray(30 * (small[:, :, : small.shape[2] // 2].mean((1, 2)) - 0.4), np.float64)


def weigh(scale: str, channels: int, layout: str, ends: str, side_px: int = SIDE_PX) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of a dense layer on the flat input, after which ``brightness`` comes out."""
    factor, offset = (part[:channels] for part in SCALES[scale])
    on = np.zeros((side_px, side_px))
    on[:, : side_px // 2] = 30 / (side_px * side_px // 2)
    kernel = on[:, :, None] / factor / channels  # (side, side, channels)
    bias = -12 - 30 * np.mean(offset / factor)
    flat = (kernel.transpose(2, 0, 1) if layout == "first" else kernel).reshape(-1, 1)
    if ends in ("sigmoid", "linear"):
        return flat.astype(np.float32), np.array([bias], np.float32)
    columns = np.zeros((len(flat), OUTPUTS[ends]))
    columns[:, 1:2] = flat  # the logit of number 1 less that of 0 is the function
    biases = np.zeros(OUTPUTS[ends])
    biases[1] = bias
    if ends == "three":
        biases[2] = -40  # a class that hardly ever is
    return columns.astype(np.float32), biases.astype(np.float32)


def input_shape(channels: int, layout: str, side_px: int = SIDE_PX) -> tuple[int, int, int]:
    return (channels, side_px, side_px) if layout == "first" else (side_px, side_px, channels)


def write_keras(path: Path, scale: str, channels: int, layout: str, ends: str, first: Sequence[Any] = ()) -> Path:
    """With layers of ``first`` before all others."""
    from tasks.networks.keras_backend import keras

    pixels = x = keras.Input(input_shape(channels, layout))
    for layer in first:
        x = layer(x)
    activation = {"sigmoid": "sigmoid", "softmax": "softmax", "three": "softmax"}.get(ends)
    dense = keras.layers.Dense(OUTPUTS[ends], activation=activation)
    network = keras.Model(pixels, dense(keras.layers.Flatten()(x)))
    dense.set_weights(list(weigh(scale, channels, layout, ends)))
    network.save(path)
    return path


def write_onnx(path: Path, scale: str, channels: int, layout: str, ends: str, **how: Any) -> Path:
    """``how``: ``batch``, a fixed size of batches; ``dtype``, uint8 in place of float32; ``free``, no fixed side."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kernel, bias = weigh(scale, channels, layout, ends)
    kind = TensorProto.UINT8 if how.get("dtype") == "uint8" else TensorProto.FLOAT
    shape = [how.get("batch", "n"), *input_shape(channels, layout)]
    shape = [("side" if size == SIDE_PX else size) for size in shape] if how.get("free") else shape
    nodes = [
        helper.make_node("Cast", ["x"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["cast"], ["flat"]),
        helper.make_node("Gemm", ["flat", "kernel", "bias"], ["logits"]),
    ]
    last = {"sigmoid": "Sigmoid", "softmax": "Softmax", "three": "Softmax"}.get(ends, "Identity")
    nodes.append(helper.make_node(last, ["logits"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape[0], OUTPUTS[ends]])],
        [numpy_helper.from_array(part, name) for part, name in ((kernel, "kernel"), (bias, "bias"))],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path
