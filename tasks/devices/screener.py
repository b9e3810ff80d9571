"""The screener: a segmentation network that finds medical devices in an X-ray.

From an X-ray as it is in memory it predicts a mask of devices. The `device_score` comes from that mask alone, not from
the rest of the picture, so the mask shows what led to the score. Weights are shipped in ``data/screener/``, with a
card.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.errors import RunError
from tasks.networks.blocks import convolve, go_down_and_up
from tasks.networks.files import load_network
from tasks.networks.keras_backend import keras
from tasks.networks.normalisation import Standardise, draw_kernels
from tasks.pixels.greys import SIDE_PX, to_float

layers, ops = keras.layers, keras.ops

LOGITS_SIDE_PX = 112
WIDTHS = (24, 48, 96, 128, 160)


class Screened(NamedTuple):
    """The screener's results for a batch: scores float32 ``(n,)``, 0 to 1; masks uint8 ``(n, 224, 224)``, 255 sure."""

    scores: NDArray[np.float32]
    masks: NDArray[np.uint8]


@keras.saving.register_keras_serializable("x_ray")
class StrongestEvidence(keras.layers.Layer):
    """Means of the largest values of a map, one for each number in ``counts``: a clip is few pixels, a tube many.

    Input shape: ``(n, side, side, 1)``. Output shape: ``(n, len(counts))``.
    """

    def __init__(self, counts: tuple[int, ...] = (6, 32, 128), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.counts = tuple(counts)

    def call(self, logits: Any) -> Any:
        """Applies the layer to a batch."""
        flat = ops.reshape(logits, (ops.shape(logits)[0], logits.shape[1] * logits.shape[2]))
        largest = ops.top_k(flat, max(self.counts), sorted=True)[0]
        return ops.stack([ops.mean(largest[:, :count], axis=1) for count in self.counts], axis=1)

    def get_config(self) -> dict[str, Any]:
        """What a saved model needs to build the layer again."""
        return {**super().get_config(), "counts": self.counts}


def build_core(seed: int, widths: tuple[int, ...] = WIDTHS) -> keras.Model:
    """The untrained part of the screener that has weights; `finish_screener` completes it.

    Args:
        seed: Seed of the initial weights.
        widths: Channels at 112, 56, 28, 14 and 7 px.

    Returns:
        float32 ``(n, 224, 224, 1)`` in 0.0 to 1.0 -> logits of the mask ``(n, 112, 112, 1)`` and of the score
        ``(n, 1)``; 1,177,781 weights at the default widths.
    """
    kernels = draw_kernels(seed)
    pixels = keras.Input((SIDE_PX, SIDE_PX, 1), name="pixels")
    x = Standardise()(pixels)
    x = go_down_and_up(convolve(x, widths[0], kernels, kernel=5, strides=2), widths, kernels)
    to_logit = layers.Conv2D(1, 3, padding="same", kernel_initializer=next(kernels), dtype="float32", name="mask_logit")
    logits = to_logit(x)
    evidence = StrongestEvidence(dtype="float32", name="evidence")(logits)
    weigh = layers.Dense(1, kernel_initializer="ones", kernel_constraint="non_neg", dtype="float32", name="score_logit")
    return keras.Model(pixels, [logits, weigh(evidence)], name="core")


def finish_screener(core: keras.Model) -> keras.Model:
    """Completes a core to a screener.

    Returns:
        float32 ``(n, 224, 224, 1)`` in 0.0 to 1.0 -> ``mask`` ``(n, 224, 224, 1)``, the probability of a device at
        each pixel, and ``device_score`` ``(n, 1)``, the probability that there is one.
    """
    logits, score = core.outputs
    larger = layers.UpSampling2D(SIDE_PX // LOGITS_SIDE_PX, interpolation="bilinear", dtype="float32")(logits)
    mask = layers.Activation("sigmoid", dtype="float32", name="mask")(larger)
    device_score = layers.Activation("sigmoid", dtype="float32", name="device_score")(score)
    return keras.Model(core.input, {"mask": mask, "device_score": device_score}, name="device_screener")


def build_screener(seed: int, widths: tuple[int, ...] = WIDTHS) -> keras.Model:
    """An untrained screener; see `build_core` and `finish_screener`."""
    return finish_screener(build_core(seed, widths))


def screen_pixels(model: keras.Model, packed: NDArray[np.uint8], batch_size: int = 32) -> Iterator[Screened]:
    """Screens packed images, uint8 ``(n, 224, 224)``, batch by batch."""
    for start in range(0, len(packed), batch_size):
        outputs = model.predict_on_batch(to_float(packed[start : start + batch_size]))
        scores, masks = (ops.convert_to_numpy(outputs[name]) for name in ("device_score", "mask"))
        yield Screened(scores[:, 0].astype(np.float32), np.round(masks[..., 0] * 255).astype(np.uint8))


def score_pixels(model: keras.Model, packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """``device_score`` of packed images: uint8 ``(n, 224, 224)`` -> float32 ``(n,)``."""
    return np.concatenate([batch.scores for batch in screen_pixels(model, packed)] or [np.empty(0, np.float32)])


def load_screener(folder: Path) -> keras.Model:
    """Loads a screener after checking its checksum.

    Raises:
        RunError: If a file is missing, the checksum differs, or the file is not a screener.
    """
    try:
        model = load_network(folder)
    except RunError as error:
        # Without the last part, the way out for a run's classifier.
        raise RunError(
            f"screening.screener: {str(error).rpartition(': ')[0]}; name a folder with model.keras and model.sha256 of "
            "a screener, or leave the setting out"
        ) from None
    outputs = set(model.output_names) if isinstance(model.output, dict) else set()
    if model.input_shape != (None, SIDE_PX, SIDE_PX, 1) or outputs != {"mask", "device_score"}:
        raise RunError(f"screening.screener: {folder} holds no screener; name a folder that flows.train_screener wrote")
    return model
