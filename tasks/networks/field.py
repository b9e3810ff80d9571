"""The field: layers that keep a network to the lungs, or that make what lies outside of them worthless to it.

``training.field`` names one of three. With ``whole`` a network sees the whole picture. With ``lungs`` it sees the lungs
alone; since their contour and size go with the class in this archive, training varies the masks: it widens, moves and
scales them, and sometimes takes another child's. With ``varied`` training alone changes what is outside, and the
finished network sees the whole picture.

Images are float32 ``(n, side, side, 1)``, 0.0 to 1.0; masks the same, 1.0 surely lung. Widths are in pixels of 224.
"""

from typing import Any

from tasks.networks.keras_backend import keras
from tasks.networks.smoothing import mean_around
from tasks.pixels.greys import SIDE_PX

ops = keras.ops
NARROW_PX, WIDE_PX = 2.0, 16.0
"""How far a mask is widened in training at least and at most; a finished network widens by the mean of the two."""
REACH_PX = 18.0


def widen(masks: Any, px: Any) -> Any:
    """Masks that reach so many pixels further, with a soft edge of about a pixel.

    The share of lung in a square of twice ``REACH_PX`` falls evenly from one half, at a straight border, to 0: where it
    is above a level lies within a distance of the lung.

    Args:
        masks: ``(n, side, side, 1)``.
        px: A number, or one for each mask, ``(n, 1, 1, 1)``; at most ``WIDE_PX``.
    """
    side = masks.shape[1]
    reach = max(1, round(REACH_PX * side / SIDE_PX))
    near = mean_around(masks, reach)
    level = 0.5 * (1.0 - px / REACH_PX)
    return ops.maximum(masks, ops.sigmoid((near - level) * 4.0 * (2 * reach + 1)))


@keras.saving.register_keras_serializable("x_ray")
class Widen(keras.layers.Layer):
    """Widens masks by the mean of what training draws."""

    def call(self, masks: Any) -> Any:
        """Applies the layer to a batch."""
        return widen(masks, (NARROW_PX + WIDE_PX) / 2)


@keras.saving.register_keras_serializable("x_ray")
class KeepLungs(keras.layers.Layer):
    """Images and masks to images in which what is outside has the mean grey of the inside."""

    def call(self, images: Any, masks: Any) -> Any:
        """Applies the layer to a batch."""
        return images * masks + mean_grey(images, masks) * (1.0 - masks)


def mean_grey(images: Any, weights: Any) -> Any:
    """The weighted mean grey of each image, ``(n, 1, 1, 1)``."""
    total = ops.sum(images * weights, axis=(1, 2, 3), keepdims=True)
    return total / (ops.sum(weights, axis=(1, 2, 3), keepdims=True) + 1e-3)
