"""Lung lessons: chests and their lungs to teach the segmenter with, and the network that it is trained in."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.networks.augmentation import ExposureShift, FramingShift
from tasks.networks.keras_backend import keras
from tasks.networks.segmenter import LOGITS_SIDE_PX
from tasks.pixels.greys import SIDE_PX, to_float

layers, ops = keras.layers, keras.ops


@dataclass(frozen=True)
class LungLesson:
    """Chests and where their lungs are, n of each.

    Attributes:
        pixels: uint8 ``(n, 224, 224)``.
        lungs: uint8 ``(n, 224, 224)``, 255 where lung is.
    """

    pixels: NDArray[np.uint8]
    lungs: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.pixels)

    def feed(self, rows: NDArray[Any]) -> list[NDArray[np.float32]]:
        """The inputs of the trainer for some rows."""
        return [to_float(self.pixels[rows]), to_float(self.lungs[rows])]

    def join(self, other: "LungLesson", rows: NDArray[Any]) -> "LungLesson":
        """This lesson, and behind it some rows of another one."""
        pairs = ((self.pixels, other.pixels), (self.lungs, other.lungs))
        return LungLesson(*(np.concatenate([mine, theirs[rows]]) for mine, theirs in pairs))


@keras.saving.register_keras_serializable("x_ray")
class LungLoss(keras.layers.Layer):
    """What is wrong with a picture's lungs, ``(n, 1)``: cross-entropy of pixels, and the overlap that lacks.

    The second part is soft Dice (Milletari et al. 2016, arXiv:1606.04797). Input: logits and truth, ``(n, s, s, 1)``.
    """

    def call(self, inputs: Any) -> Any:
        """Applies the layer to a batch."""
        logits, truth = inputs
        cross = ops.maximum(logits, 0) - logits * truth + ops.log1p(ops.exp(-ops.abs(logits)))
        probability = ops.sigmoid(logits)
        overlap = ops.sum(probability * truth, axis=(1, 2, 3))
        total = ops.sum(probability + truth, axis=(1, 2, 3))
        return (ops.mean(cross, axis=(1, 2, 3)) + 1 - (2 * overlap + 10.0) / (total + 10.0))[:, None]


def build_lung_trainer(core: keras.Model, seed: int) -> keras.Model:
    """A network around the segmenter's core that moves chests and lungs alike, and re-exposes the chests.

    Nothing is mirrored: the two lungs differ, and a mirrored chest is another finding.

    Returns:
        A model from ``pixels`` and ``lungs`` ``(n, 224, 224, 1)`` to the loss of each picture, ``(n, 1)``.
    """
    pixels, lungs = (keras.Input((SIDE_PX, SIDE_PX, 1), name=name) for name in ("pixels", "lungs"))
    together = layers.Concatenate()([pixels, lungs])
    together = FramingShift(degrees=10.0, scale=0.15, shift=0.06, seed=seed + 1)(together)
    picture = ExposureShift(gamma=0.5, curve=0.5, tilt=0.2, seed=seed + 2)(together[..., :1])
    truth = layers.AveragePooling2D(SIDE_PX // LOGITS_SIDE_PX)(together[..., 1:])
    loss = LungLoss(dtype="float32")([core(picture), truth])
    return keras.Model([pixels, lungs], loss, name="lung_trainer")
