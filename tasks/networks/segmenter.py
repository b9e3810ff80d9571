"""The segmenter: a network that draws the lungs in a chest X-ray.

Two fields with a straight border beside the spine, as people draw them: the heart and what is behind it are inside,
spine and mediastinum are not. Where disease has taken the air out of a lung, the expected field is drawn. The network
is a small U-Net that works at a quarter of the side, so that all images of a run cost little. Weights are shipped in
``data/lungs/``, with a card.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.errors import RunError
from tasks.networks.blocks import convolve, go_down_and_up
from tasks.networks.files import load_network
from tasks.networks.keras_backend import keras
from tasks.networks.normalisation import Standardise, draw_kernels
from tasks.networks.shipped import SHIPPED
from tasks.pixels.greys import SIDE_PX, to_float

layers, ops = keras.layers, keras.ops

LOGITS_SIDE_PX = 112
WIDTHS = (24, 48, 96, 80)


def build_core(seed: int, widths: tuple[int, ...] = WIDTHS) -> keras.Model:
    """The untrained part of the segmenter that has weights; `finish_segmenter` completes it.

    Args:
        seed: Seed of the initial weights.
        widths: Channels at 56, 28, 14 and 7 px.

    Returns:
        float32 ``(n, 224, 224, 1)`` in 0.0 to 1.0 -> logits ``(n, 112, 112, 1)``.
    """
    kernels = draw_kernels(seed)
    pixels = keras.Input((SIDE_PX, SIDE_PX, 1), name="pixels")
    x = Standardise()(layers.AveragePooling2D(SIDE_PX // LOGITS_SIDE_PX)(pixels))
    x = convolve(x, widths[0], kernels, kernel=5, strides=2)
    to_logits = layers.Conv2DTranspose(
        1, 4, strides=2, padding="same", kernel_initializer=next(kernels), dtype="float32", name="lung_logits"
    )
    return keras.Model(pixels, to_logits(go_down_and_up(x, widths, kernels)), name="core")


def finish_segmenter(core: keras.Model) -> keras.Model:
    """Completes a core: ``(n, 224, 224, 1)`` -> the probability of lung at each pixel, same shape."""
    pixels = keras.Input((SIDE_PX, SIDE_PX, 1), name="pixels")
    larger = layers.UpSampling2D(SIDE_PX // LOGITS_SIDE_PX, interpolation="bilinear", dtype="float32")(core(pixels))
    return keras.Model(
        pixels, layers.Activation("sigmoid", dtype="float32", name="lungs")(larger), name="lung_segmenter"
    )


def build_segmenter(seed: int, widths: tuple[int, ...] = WIDTHS) -> keras.Model:
    """An untrained segmenter; see `build_core` and `finish_segmenter`."""
    return finish_segmenter(build_core(seed, widths))


def segment_pixels(model: keras.Model, packed: NDArray[np.uint8], batch_size: int = 32) -> Iterator[NDArray[np.uint8]]:
    """Lungs of packed images, uint8 ``(n, 224, 224)``, batch by batch: uint8 ``(k, 224, 224)``, 255 surely lung."""
    for start in range(0, len(packed), batch_size):
        lungs = ops.convert_to_numpy(model.predict_on_batch(to_float(packed[start : start + batch_size])))
        yield np.round(lungs[..., 0] * 255).astype(np.uint8)


def load_segmenter(folder: Path = SHIPPED["segmenter"]) -> keras.Model:
    """Loads a segmenter after checking its checksum.

    Raises:
        RunError: If a file is missing, the checksum differs, or the file is not a segmenter.
    """
    way_out = "name a folder that flows.train_lungs wrote"
    try:
        model = load_network(folder)
    except RunError as error:
        # Without the last part, the way out for a run's classifier.
        raise RunError(f"screening.segmenter: {str(error).rpartition(': ')[0]}; {way_out}") from None
    shape = (None, SIDE_PX, SIDE_PX, 1)
    if isinstance(model.output, dict | list | tuple) or (model.input_shape, model.output_shape) != (shape, shape):
        raise RunError(f"screening.segmenter: {folder} holds no segmenter of lungs; {way_out}")
    return model
