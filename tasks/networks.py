"""Networks: build, load (checksum first), predict; what fit, evaluate, explain, audit and score share.

Networks are layers and ``keras.ops`` only, so that the same model trains on TensorFlow, JAX or PyTorch, and a saved
one loads with ``safe_mode=True``. Every network takes X-rays as they are in memory, float32 ``(n, 224, 224, 1)`` in
0.0 to 1.0, and resizes, augments and standardises inside: what it was trained to see is part of it.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.images import SIDE_PX, to_float
from tasks.keras_backend import keras
from tasks.records import RunError
from tasks.settings import TrainingSettings
from tasks.storage import sha256_of_file

layers, ops = keras.layers, keras.ops


@keras.saving.register_keras_serializable("x_ray")
class ExposureShift(keras.layers.Layer):
    """In training, changes exposure as another machine or operator would; otherwise the identity.

    Gamma is drawn log-uniformly from ``[exp(-gamma), exp(gamma)]`` per image; half of the images lose their outer
    frame, of up to ``border`` of the side, to their mean grey, so that letters and edges cannot be relied on.

    Input and output shape: ``(n, side, side, 1)``, 0.0 to 1.0.
    """

    def __init__(self, gamma: float = 0.5, border: float = 0.16, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gamma, self.border, self.seed = gamma, border, seed
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, x: Any, training: bool = False) -> Any:
        """See the class."""
        if not training:
            return x
        n, side = ops.shape(x)[0], x.shape[1]

        def draw(low: float, high: float) -> Any:
            return keras.random.uniform((n, 1, 1, 1), low, high, seed=self.generator)

        x = ops.power(ops.maximum(x, 1e-3), ops.exp(draw(-self.gamma, self.gamma)))
        ramp = (ops.arange(side, dtype="float32") + 0.5) / side
        down, across = ops.reshape(ramp, (1, side, 1, 1)), ops.reshape(ramp, (1, 1, side, 1))
        # A width below zero, in half of the draws, masks nothing; the four edges are drawn apart.
        inside = (
            ops.cast(down > draw(-self.border, self.border), "float32")
            * ops.cast(down < 1.0 - draw(-self.border, self.border), "float32")
            * ops.cast(across > draw(-self.border, self.border), "float32")
            * ops.cast(across < 1.0 - draw(-self.border, self.border), "float32")
        )
        mean = ops.mean(x, axis=(1, 2, 3), keepdims=True)
        return x * inside + mean * (1.0 - inside)

    def get_config(self) -> dict[str, Any]:
        """What a saved model needs to build the layer again."""
        return {**super().get_config(), "gamma": self.gamma, "border": self.border, "seed": self.seed}


@keras.saving.register_keras_serializable("x_ray")
class FramingShift(keras.layers.Layer):
    """In training, moves, scales and turns each image a little; otherwise the identity.

    No mirroring: the heart lies on one side, and a mirrored chest is another finding.

    Input and output shape: ``(n, side, side, 1)``.
    """

    def __init__(
        self, degrees: float = 12.0, scale: float = 0.15, shift: float = 0.08, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.degrees, self.scale, self.shift, self.seed = degrees, scale, shift, seed
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, x: Any, training: bool = False) -> Any:
        """See the class."""
        if not training:
            return x
        n, side = ops.shape(x)[0], x.shape[1]

        def draw(bound: float) -> Any:
            return keras.random.uniform((n,), -bound, bound, seed=self.generator)

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
        """What a saved model needs to build the layer again."""
        config = {"degrees": self.degrees, "scale": self.scale, "shift": self.shift, "seed": self.seed}
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable("x_ray")
class Standardise(keras.layers.Layer):
    """Brings each image to mean 0 and deviation 1, so that overall exposure and contrast carry nothing.

    Input and output shape: ``(n, side, side, 1)``. A constant image becomes all 0.
    """

    def call(self, x: Any) -> Any:
        """See the class."""
        centred = x - ops.mean(x, axis=(1, 2, 3), keepdims=True)
        return centred / ops.sqrt(ops.mean(ops.square(centred), axis=(1, 2, 3), keepdims=True) + 1e-6)


def build_network(settings: TrainingSettings, seed: int) -> keras.Model:
    """A small residual network, from scratch.

    Args:
        settings: ``side_px`` and ``width`` shape the network.
        seed: Seed of the initial weights and of the augmentation.

    Returns:
        float32 ``(n, 224, 224, 1)`` in 0.0 to 1.0 -> ``probability`` ``(n, 1)``, P(label = 1); 278,617 weights at
        the default width of 24.
    """
    keras.utils.set_random_seed(seed)
    pixels = keras.Input((SIDE_PX, SIDE_PX, 1), name="pixels")
    x = layers.Resizing(settings.side_px, settings.side_px, interpolation="bilinear", antialias=True)(pixels)
    x = ExposureShift(seed=seed + 1)(x)
    x = FramingShift(seed=seed + 2)(x)
    x = Standardise()(x)
    x = layers.Conv2D(settings.width, 5, strides=2, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization(momentum=0.9)(x)
    x = layers.Activation("relu")(x)
    for multiple in (1, 2, 3, 4):
        x = _residual_block(x, settings.width * multiple)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(0.3, seed=seed + 3)(x)
    probability = layers.Dense(1, activation="sigmoid", dtype="float32", name="probability")(x)
    return keras.Model(pixels, probability, name="x_ray_classifier")


def _residual_block(x: Any, channels: int) -> Any:
    """Two 3 x 3 convolutions with a shortcut, then halving: (n, s, s, c) -> (n, s / 2, s / 2, channels)."""
    shortcut = x if x.shape[-1] == channels else layers.Conv2D(channels, 1, use_bias=False)(x)
    for last in (False, True):
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.Add()([x, shortcut]) if last else x
        x = layers.Activation("relu")(x)
    return layers.MaxPooling2D(2)(x)


def save_network(model: keras.Model, folder: Path) -> str:
    """Writes ``model.keras`` and its checksum ``model.sha256`` into a folder; returns the checksum."""
    path = folder / "model.keras"
    model.save(path)
    checksum = sha256_of_file(path)
    (folder / "model.sha256").write_text(f"{checksum}  model.keras\n")
    return checksum


def load_network(folder: Path) -> keras.Model:
    """Loads ``model.keras`` of a run, after its checksum matched ``model.sha256``.

    Raises:
        RunError: If a file is missing, the checksum differs, or the file is no Keras model.
    """
    path, checksum_path = folder / "model.keras", folder / "model.sha256"
    for needed in (path, checksum_path):
        if not needed.exists():
            raise RunError(f"{needed} is missing: run the train flow on this run folder first")
    if checksum_path.read_text().split()[:1] != [sha256_of_file(path)]:
        raise RunError(f"{path} does not match model.sha256: it was changed after training; train again")
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except (ValueError, OSError) as error:
        raise RunError(f"{path} does not load ({str(error).splitlines()[0][:120]}): train again") from None


def predict(model: keras.Model, packed: NDArray[np.uint8], batch_size: int = 64) -> NDArray[np.float64]:
    """P(label = 1) for packed images: uint8 ``(n, 224, 224)`` -> float64 ``(n,)``."""
    return predict_pixels(model, (to_float(packed[i : i + batch_size]) for i in range(0, len(packed), batch_size)))


def predict_pixels(model: keras.Model, batches: Any) -> NDArray[np.float64]:
    """P(label = 1) for batches of X-rays in memory, each float32 ``(n, 224, 224, 1)``: float64 ``(sum of n,)``."""
    parts = [ops.convert_to_numpy(model.predict_on_batch(batch))[:, 0] for batch in batches]
    return np.concatenate(parts).astype(np.float64) if parts else np.empty(0)
