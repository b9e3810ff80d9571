"""Settling: a member is shown images as they are, to be measured and to settle its normalisation."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.networks.checkpoints import every_layer
from tasks.networks.field import Widen
from tasks.networks.keras_backend import keras
from tasks.pixels.greys import to_float
from tasks.training.labelled_images import LabelledImages

ops = keras.ops


def settle_normalisation(member: keras.Model, shown: LabelledImages, seed: int, batch_size: int = 32) -> None:
    """Gives the layers of batch normalisation the mean statistics of training images as they are.

    Those that training leaves are of its last few batches, so that one network in a few is a bad one by chance, and of
    augmented pictures, which a finished network does not see. Averaged weights have other statistics anyhow
    (Izmailov et al. 2018, section 3.2).
    """
    norms = [layer for layer in every_layer(member) if isinstance(layer, keras.layers.BatchNormalization)]
    momenta = [norm.momentum for norm in norms]
    order = np.random.default_rng([seed, 41]).permutation(len(shown.pixels))
    for done, rows in enumerate(np.array_split(order, max(1, len(order) // batch_size))):
        for norm in norms:
            norm.momentum = done / (done + 1)  # a plain mean over the batches
        member(_show(member, shown, rows), training=True)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _show(member: keras.Model, images: LabelledImages, rows: NDArray[Any]) -> Any:
    """What a finished member sees of some of the images."""
    pixels = to_float(images.pixels[rows])
    if len(member.inputs) == 1:
        return pixels
    assert images.lungs is not None
    return [pixels, ops.convert_to_numpy(Widen(dtype="float32")(to_float(images.lungs[rows])))]


def first_logits(member: keras.Model, asked: LabelledImages, batch_size: int = 64) -> NDArray[np.float64]:
    """The member's logits of pneumonia, float64 ``(n,)``."""
    everyone = np.arange(len(asked.pixels))
    parts = [
        member.predict_on_batch(_show(member, asked, everyone[start : start + batch_size]))
        for start in range(0, len(everyone), batch_size)
    ]
    return np.concatenate([ops.convert_to_numpy(part) for part in parts])[:, 0].astype(np.float64)
