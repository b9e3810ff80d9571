"""Images as a member is trained on them: small, with what is known of them, and what each counts in the loss."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.errors import RunError
from tasks.networks.classifier import shrink
from tasks.networks.keras_backend import keras
from tasks.pixels.greys import to_float
from tasks.pixels.masks import Masks
from tasks.pixels.packed import PackedImages
from tasks.settings import TrainingSettings


@dataclass(frozen=True)
class LabelledImages:
    """Images and what is known of them.

    Attributes:
        pixels: uint8 ``(n, side_px, side_px)``.
        labels: float32 ``(n,)``, 1 for pneumonia.
        bacteria: float32 ``(n,)``, 1 for bacteria, 0 for virus, NaN where unknown or no pneumonia.
        lungs: Their masks, as the pixels; none where the network sees the whole picture and is trained on it.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.float32]
    bacteria: NDArray[np.float32]
    lungs: NDArray[np.uint8] | None = None


def read_split(
    rows: pd.DataFrame, split: str, images: PackedImages, lungs: Masks | None, settings: TrainingSettings
) -> LabelledImages:
    """The images of a split at the side that is trained on.

    Raises:
        RunError: If they are of one class only.
    """
    rows = rows[rows["split"] == split]
    if rows["label"].nunique() < 2:
        raise RunError(f"manifest: the {split} split has images of one class only; bring more patients")
    ids = list(rows["image_id"])
    pixels = shrink_packed(images.read(ids), settings.side_px)
    masks = None if lungs is None else shrink_packed(lungs.read(ids), settings.side_px)
    bacteria = rows["subtype"].map({"bacteria": 1.0, "virus": 0.0}).to_numpy(np.float32)
    return LabelledImages(pixels, rows["label"].to_numpy(np.float32), bacteria, masks)


def shrink_packed(packed: NDArray[np.uint8], side_px: int, batch_size: int = 256) -> NDArray[np.uint8]:
    """uint8 ``(n, 224, 224)`` to ``(n, side_px, side_px)`` by the layer that the kept model has, once a training."""
    layer = shrink(side_px)
    small = np.empty((len(packed), side_px, side_px), np.uint8)
    for start in range(0, len(packed), batch_size):
        grey = keras.ops.convert_to_numpy(layer(to_float(packed[start : start + batch_size])))[..., 0]
        small[start : start + batch_size] = np.rint(np.clip(grey, 0, 1) * 255)
    return small


def describe_truth(images: LabelledImages) -> NDArray[np.float32]:
    """What ``two_questions`` asks: label, its weight, bacteria, its weight; float32 ``(n, 4)``.

    The weights of each question give both of its answers the same sum and have mean 1 over the images asked about; an
    image of unknown subtype, or without pneumonia, has weight 0 in the second.
    """
    asked = np.isfinite(images.bacteria)
    bacteria = np.where(asked, images.bacteria, 0).astype(np.float32)
    second = np.zeros(len(asked), np.float32)
    if len(np.unique(bacteria[asked])) == 2:
        second[asked] = class_weights(bacteria[asked])
    return np.stack([images.labels, class_weights(images.labels), bacteria, second], axis=1)


def class_weights(labels: NDArray[np.float32]) -> NDArray[np.float32]:
    """A weight per image, float32 ``(n,)`` with mean 1, that gives both classes the same sum."""
    share = labels.mean()
    return np.where(labels == 1, 0.5 / share, 0.5 / (1 - share)).astype(np.float32)
