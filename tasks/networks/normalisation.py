"""Normalisation: layers that remove the effects of the machine from an X-ray."""

import random
from collections.abc import Iterator
from typing import Any

from tasks.networks.keras_backend import keras

ops = keras.ops


@keras.saving.register_keras_serializable("x_ray")
class Standardise(keras.layers.Layer):
    """Scales each image to mean 0 and deviation 1, which removes overall exposure and contrast.

    Input and output shape: ``(n, side, side, 1)``. A constant image becomes all 0.
    """

    def call(self, x: Any) -> Any:
        """Applies the layer to a batch."""
        centred = x - ops.mean(x, axis=(1, 2, 3), keepdims=True)
        return centred / ops.sqrt(ops.mean(ops.square(centred), axis=(1, 2, 3), keepdims=True) + 1e-6)


@keras.saving.register_keras_serializable("x_ray")
class LocalContrast(keras.layers.Layer):
    """Subtracts from each pixel the mean grey around it, and divides by the deviation there (Pinto et al. 2008; Jarrett
    et al. 2009). Texture and edges remain; exposure, contrast and the machine's local processing of them are removed.

    The surroundings are a square of about ``window`` of the side. Mean and deviation are computed on a grid of 4 px and
    enlarged bilinearly, at a tenth of the cost of a box filter. Beyond the edge the image is mirrored.

    Input and output shape: ``(n, side, side, 1)``, the input 0.0 to 1.0. A constant image becomes all 0.
    """

    GRID_PX = 4

    def __init__(self, window: float = 0.16, floor: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.window, self.floor = window, floor

    def call(self, x: Any) -> Any:
        """Applies the layer to a batch."""
        side = x.shape[1]
        reach = max(1, round((self.window * side / self.GRID_PX - 1) / 2))

        def average(values: Any) -> Any:
            values = ops.average_pool(values, self.GRID_PX, self.GRID_PX, padding="valid")
            values = ops.pad(values, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="symmetric")
            values = ops.average_pool(values, (2 * reach + 1, 1), 1, padding="valid")
            values = ops.average_pool(values, (1, 2 * reach + 1), 1, padding="valid")
            return ops.image.resize(values, (side, side), interpolation="bilinear")

        mean = average(x)
        variance = ops.maximum(average(ops.square(x)) - ops.square(mean), 0.0)
        return (x - mean) / (ops.sqrt(variance + 1e-4) + self.floor)

    def get_config(self) -> dict[str, Any]:
        """What a saved model needs to build the layer again."""
        return {**super().get_config(), "window": self.window, "floor": self.floor}


def draw_kernels(seed: int) -> Iterator[keras.initializers.Initializer]:
    """One initialiser after another for the kernels of a network (Glorot & Bengio 2010), in the order of building."""
    generator = random.Random(seed)
    while True:
        yield keras.initializers.GlorotUniform(seed=generator.randint(1, 10**9))
