"""What the screener is trained by: a network around it that moves picture and truth alike and gives the loss."""

from typing import Any

from tasks.devices.screener import LOGITS_SIDE_PX
from tasks.networks.augmentation import ExposureShift, FramingShift
from tasks.networks.keras_backend import keras
from tasks.pixels.greys import SIDE_PX

layers, ops = keras.layers, keras.ops

BOX_MARGIN = 0.02


@keras.saving.register_keras_serializable("x_ray")
class BoxArea(keras.layers.Layer):
    """A plane that is 1 inside a box: ``(n, 4)`` fractions -> ``(n, side, side, 1)``; all 0 for a box of no size."""

    def __init__(self, side_px: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.side_px = side_px

    def call(self, boxes: Any) -> Any:
        """Applies the layer to a batch."""
        ramp = (ops.arange(self.side_px, dtype="float32") + 0.5) / self.side_px
        x0, y0, x1, y1 = (boxes[:, i, None] for i in range(4))
        margin = BOX_MARGIN * ops.cast(x1 > x0, "float32")
        across = ops.cast((ramp[None] > x0 - margin) & (ramp[None] < x1 + margin), "float32")
        down = ops.cast((ramp[None] > y0 - margin) & (ramp[None] < y1 + margin), "float32")
        return (down[:, :, None] * across[:, None, :])[..., None]

    def get_config(self) -> dict[str, Any]:
        """What a saved model needs to build the layer again."""
        return {**super().get_config(), "side_px": self.side_px}


@keras.saving.register_keras_serializable("x_ray")
class ScreenerLoss(keras.layers.Layer):
    """What is wrong with a picture's mask and score, ``(n, 1)``.

    Where the mask is known: cross-entropy of its pixels and, if a device is there, the overlap that lacks (Milletari
    et al. 2016, arXiv:1606.04797). Where a box is known: evidence inside it. Always: cross-entropy of the score.
    """

    def call(self, inputs: Any) -> Any:
        """Applies the layer to a batch."""
        logits, score, truth, devices, exact, weights = inputs
        target, box = truth[..., :1], truth[..., 1:]
        cross = ops.maximum(logits, 0) - logits * target + ops.log1p(ops.exp(-ops.abs(logits)))
        per_pixel = 5.0 * ops.mean(cross, axis=(1, 2, 3))[:, None]
        probability = ops.sigmoid(logits)
        overlap = ops.sum(probability * target, axis=(1, 2, 3))
        total = ops.sum(probability + target, axis=(1, 2, 3))
        dice = (1 - (2 * overlap + 10.0) / (total + 10.0))[:, None]
        whole = ops.maximum(score, 0) - score * devices + ops.log1p(ops.exp(-ops.abs(score)))
        n = ops.shape(logits)[0]
        inside = ops.reshape(ops.where(box > 0.5, logits, -12.0), (n, -1))
        found = ops.mean(ops.top_k(inside, 16, sorted=False)[0], axis=1, keepdims=True)
        boxed = ops.cast(ops.sum(box, axis=(1, 2, 3))[:, None] > 4.0, "float32")
        in_box = ops.log1p(ops.exp(-found)) * boxed
        return exact * (per_pixel + dice * devices) + weights * (whole + 0.5 * in_box)


def build_screener_trainer(core: keras.Model, seed: int) -> keras.Model:
    """A network around the screener's core that moves, mirrors and re-exposes pictures and their truth alike.

    Mirroring is right here, other than for the classifier: a device has no side.

    Returns:
        A model from ``pixels`` and ``masks`` ``(n, 224, 224, 1)``, ``boxes`` ``(n, 4)`` and ``devices``, ``exact``,
        ``weights`` ``(n, 1)`` to the loss of each picture, ``(n, 1)``.
    """
    side = (SIDE_PX, SIDE_PX, 1)
    pixels, masks = keras.Input(side, name="pixels"), keras.Input(side, name="masks")
    boxes = keras.Input((4,), name="boxes")
    devices, exact, weights = (keras.Input((1,), name=name) for name in ("devices", "exact", "weights"))
    together = layers.Concatenate()([pixels, masks, BoxArea(SIDE_PX)(boxes)])
    together = FramingShift(degrees=10.0, scale=0.15, shift=0.06, seed=seed + 1)(together)
    together = layers.RandomFlip("horizontal", seed=seed + 2)(together)
    picture, truth = together[..., :1], together[..., 1:]
    picture = ExposureShift(gamma=0.5, curve=0.0, tilt=0.0, seed=seed + 3)(picture)
    truth = layers.MaxPooling2D(SIDE_PX // LOGITS_SIDE_PX)(truth)
    logits, score = core(picture)
    loss = ScreenerLoss(dtype="float32")([logits, score, truth, devices, exact, weights])
    return keras.Model([pixels, masks, boxes, devices, exact, weights], loss, name="screener_trainer")
