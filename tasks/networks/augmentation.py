"""Augmentation: layers that vary training images as another machine, operator or child would.

They run inside the training network, on the accelerator; the final network is built without them. Each draws from
``generator``, whose state ``reseed`` in ``checkpoints`` sets from the seed and the epoch. Images are not mirrored: the
heart lies on one side, and a mirrored chest is another finding.

Input and output shape of all of them: ``(n, side, side, 1)``, 0.0 to 1.0.
"""

import math
from typing import Any

import numpy as np

from tasks.networks.keras_backend import keras
from tasks.networks.smoothing import blur

ops = keras.ops


class Augmentation(keras.layers.Layer):
    """Base class: a seed and a generator; changes images in training only."""

    def __init__(self, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, x: Any, training: bool = False) -> Any:
        """Returns changed images in training, otherwise the same ones."""
        return self.change(x) if training else x

    def change(self, x: Any) -> Any:
        """Changes a batch of images."""
        raise NotImplementedError

    def draw(self, x: Any, low: float, high: float, rank: int = 4) -> Any:
        """A number for each image, uniform in ``[low, high)``: shape ``(n, 1, 1, 1)``, or ``(n,)`` with rank 1."""
        return keras.random.uniform((ops.shape(x)[0],) + (1,) * (rank - 1), low, high, seed=self.generator)

    def get_config(self) -> dict[str, Any]:
        """What a saved checkpoint needs to build the layer again."""
        return {**super().get_config(), "seed": self.seed}


def _along_sides(x: Any) -> tuple[Any, Any]:
    """Row and column of each pixel, 0 to 1: ``(1, side, 1, 1)`` and ``(1, 1, side, 1)``."""
    side = x.shape[1]
    ramp = (np.arange(side, dtype=np.float32) + 0.5) / side
    return ops.reshape(ramp, (1, side, 1, 1)), ops.reshape(ramp, (1, 1, side, 1))


@keras.saving.register_keras_serializable("x_ray")
class ExposureShift(Augmentation):
    """Changes exposure and contrast as another machine or operator would.

    Half of the images are mixed with an S curve of their grey values, as in look-up tables of detectors; its share is
    up to ``curve``. Then gamma is drawn log-uniformly from ``[exp(-gamma), exp(gamma)]``, and a tilt of up to
    ``tilt`` brightens one side and one end.
    """

    def __init__(self, gamma: float = 0.5, curve: float = 0.5, tilt: float = 0.2, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(seed, **kwargs)
        self.gamma, self.curve, self.tilt = gamma, curve, tilt

    def change(self, x: Any) -> Any:
        """Applies the layer to a batch."""
        steepness, middle = 4.0 * ops.exp(self.draw(x, -1.0, 1.0)), self.draw(x, 0.3, 0.7)
        low, high = ops.sigmoid(-steepness * middle), ops.sigmoid(steepness * (1.0 - middle))
        curve = (ops.sigmoid(steepness * (x - middle)) - low) / (high - low)
        share = ops.maximum(self.draw(x, -self.curve, self.curve), 0.0)  # 0 in half of the draws
        x = x + share * (curve - x)
        x = ops.power(ops.maximum(x, 1e-3), ops.exp(self.draw(x, -self.gamma, self.gamma)))
        down, right = _along_sides(x)
        x = x * (1.0 + self.draw(x, -self.tilt, self.tilt) * (2.0 * down - 1.0))
        x = x * (1.0 + self.draw(x, -self.tilt, self.tilt) * (2.0 * right - 1.0))
        return ops.minimum(x, 1.0)

    def get_config(self) -> dict[str, Any]:
        """What a saved checkpoint needs to build the layer again."""
        return {**super().get_config(), "gamma": self.gamma, "curve": self.curve, "tilt": self.tilt}


@keras.saving.register_keras_serializable("x_ray")
class DetailShift(Augmentation):
    """Blurs or sharpens, and adds grain: resolution and noise are the machine's, not the child's.

    The difference to a Gaussian blur (deviation 1 px) is subtracted or added, up to ``sharpness`` times; grain has a
    deviation of up to ``noise``.
    """

    def __init__(self, sharpness: float = 0.5, noise: float = 0.02, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(seed, **kwargs)
        self.sharpness, self.noise = sharpness, noise

    def change(self, x: Any) -> Any:
        """Applies the layer to a batch."""
        x = x + self.draw(x, -self.sharpness, self.sharpness) * (x - blur(x, 1.0))
        grain = keras.random.normal(ops.shape(x), seed=self.generator)
        return ops.clip(x + self.draw(x, 0.0, self.noise) * grain, 0.0, 1.0)

    def get_config(self) -> dict[str, Any]:
        """What a saved checkpoint needs to build the layer again."""
        return {**super().get_config(), "sharpness": self.sharpness, "noise": self.noise}


@keras.saving.register_keras_serializable("x_ray")
class BorderBlank(Augmentation):
    """Blanks, in half of the draws, a strip of up to ``width`` of the side at each edge with the image's mean grey.

    So the network cannot rely on letters, edges of collimation or anything else outside of the lungs.
    """

    def __init__(self, width: float = 0.16, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(seed, **kwargs)
        self.width = width

    def change(self, x: Any) -> Any:
        """Applies the layer to a batch."""
        down, right = _along_sides(x)
        edges = (down, 1.0 - down, right, 1.0 - right)
        inside = 1.0
        for distance in edges:
            inside = inside * ops.cast(distance > self.draw(x, -self.width, self.width), x.dtype)
        return x * inside + ops.mean(x, axis=(1, 2, 3), keepdims=True) * (1.0 - inside)

    def get_config(self) -> dict[str, Any]:
        """What a saved checkpoint needs to build the layer again."""
        return {**super().get_config(), "width": self.width}


@keras.saving.register_keras_serializable("x_ray")
class FramingShift(Augmentation):
    """Moves, scales and turns each image a little; the outside is black."""

    def __init__(
        self, degrees: float = 12.0, scale: float = 0.15, shift: float = 0.08, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(seed, **kwargs)
        self.degrees, self.scale, self.shift = degrees, scale, shift

    def change(self, x: Any) -> Any:
        """Applies the layer to a batch."""
        side = x.shape[1]

        def draw(bound: float) -> Any:
            return self.draw(x, -bound, bound, rank=1)

        angle = draw(math.radians(self.degrees))
        wide, high = ops.exp(draw(self.scale)), ops.exp(draw(self.scale))
        centre = (side - 1) / 2.0
        a, b = ops.cos(angle) * wide, -ops.sin(angle) * wide
        c, d = ops.sin(angle) * high, ops.cos(angle) * high
        right = centre - (a + b) * centre + draw(self.shift * side)
        down = centre - (c + d) * centre + draw(self.shift * side)
        nothing = ops.zeros_like(angle)
        transform = ops.stack([a, b, right, c, d, down, nothing, nothing], axis=1)
        return ops.image.affine_transform(x, transform, interpolation="bilinear", fill_mode="constant")

    def get_config(self) -> dict[str, Any]:
        """What a saved checkpoint needs to build the layer again."""
        return {**super().get_config(), "degrees": self.degrees, "scale": self.scale, "shift": self.shift}
