"""The classifier: building members, joining them to a model, and predicting; shared by all stages that need it.

Networks use layers and ``keras.ops`` only, so that the same model trains on TensorFlow, JAX or PyTorch, and a saved
one loads with ``safe_mode=True``. The saved model takes X-rays as they are in memory, float32 ``(n, 224, 224, 1)`` in
0.0 to 1.0, resizes and standardises them inside, and returns calibrated probabilities.

A **member** is one trained network; the model averages the logits of its members and calibrates the mean.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.networks.backbones import add_backbone
from tasks.networks.field import KeepLungs, Widen
from tasks.networks.keras_backend import keras
from tasks.networks.normalisation import LocalContrast, Standardise, draw_kernels
from tasks.networks.smoothing import resize
from tasks.pixels.greys import SIDE_PX, to_float
from tasks.settings import TrainingSettings

layers, ops = keras.layers, keras.ops
OUTPUTS = ("probability", "bacteria")
"""P(label = 1), and P(bacteria) for an image that shows pneumonia; a member's logits lie in this order."""


@keras.saving.register_keras_serializable("x_ray")
class Calibrate(keras.layers.Layer):
    """A column of logits to calibrated probability: sigmoid(slope * logit + offset) (Platt 1999).

    Slope and offset are fitted after training, on validation (``tasks.training.calibration``). The logit is clipped to
    +-LIMIT, so that single precision rounds no probability to 0 or 1: the logit of every prediction is finite.

    Input shape: ``(n, 2)``. Output shape: ``(n, 1)``.
    """

    LIMIT = 15.0

    def __init__(self, column: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.column = column

    def build(self, input_shape: Any) -> None:
        """One slope, at first 1, and one offset, at first 0."""
        self.slope = self.add_weight(shape=(), initializer="ones", trainable=False, name="slope")
        self.offset = self.add_weight(shape=(), initializer="zeros", trainable=False, name="offset")

    def call(self, logits: Any) -> Any:
        """Applies the layer to a batch."""
        logit = self.slope * logits[:, self.column : self.column + 1] + self.offset
        return ops.sigmoid(ops.clip(logit, -self.LIMIT, self.LIMIT))

    def get_config(self) -> dict[str, Any]:
        """What a saved model needs to build the layer again."""
        return {**super().get_config(), "column": self.column}


def build_member(settings: TrainingSettings, seed: int, name: str = "member_1") -> keras.Model:
    """Builds one network: a small residual one, or a Keras Applications network if ``backbone`` names one.

    Args:
        settings: ``side_px``, ``width``, ``field``, ``backbone`` and ``weights``.
        seed: Seed of the initial weights.

    Returns:
        float32 ``(n, side_px, side_px, 1)`` in 0.0 to 1.0 -> logits ``(n, 2)`` in the order of ``OUTPUTS``; without a
        backbone, at the default width, 494,242 weights. With the field ``lungs`` it takes their masks too,
        ``(n, side_px, side_px, 1)``.

    Raises:
        SettingsError: If there is no such backbone, or its weights are not available.
    """
    kernels = draw_kernels(seed)
    pixels = keras.Input((settings.side_px, settings.side_px, 1), name="small_pixels")
    lungs = keras.Input((settings.side_px, settings.side_px, 1), name="small_lungs")
    is_kept = settings.field == "lungs"
    x = KeepLungs(dtype="float32")(pixels, lungs) if is_kept else pixels
    if settings.backbone is None:
        # In single precision under any policy: the difference of two means has few digits left.
        x = LocalContrast(dtype="float32")(x)
        x = layers.Multiply(dtype="float32")([x, lungs]) if is_kept else x  # the border of the lungs is no contrast
        x = _residual_features(Standardise(dtype="float32")(x), settings.width, kernels)
    else:
        keras.utils.set_random_seed(seed)  # a backbone without a weights file draws its own
        x = add_backbone(x, settings.backbone, settings.weights)
    x = layers.Dropout(0.3, seed=seed + 3)(x)
    logits = layers.Dense(len(OUTPUTS), kernel_initializer=next(kernels), dtype="float32", name="logits")(x)
    return keras.Model([pixels, lungs] if is_kept else pixels, logits, name=name)


def _residual_features(x: Any, width: int, kernels: Iterator[Any]) -> Any:
    """(n, s, s, c) -> (n, 4 * width)."""
    x = layers.Conv2D(width, 5, strides=2, padding="same", use_bias=False, kernel_initializer=next(kernels))(x)
    x = layers.BatchNormalization(momentum=0.9)(x)
    x = layers.Activation("relu")(x)
    x = layers.MaxPooling2D(2, padding="same")(x)  # as in ResNet: most of the time went into blocks at half the side
    for multiple in (1, 2, 3, 4):
        x = _residual_block(x, width * multiple, kernels)
    return layers.GlobalAveragePooling2D()(x)


def _residual_block(x: Any, channels: int, kernels: Iterator[Any]) -> Any:
    """Two 3 x 3 convolutions with a shortcut, then halving: (n, s, s, c) -> (n, s / 2, s / 2, channels), rounded up."""
    shortcut = x
    if x.shape[-1] != channels:
        shortcut = layers.Conv2D(channels, 1, use_bias=False, kernel_initializer=next(kernels))(x)
    for last in (False, True):
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False, kernel_initializer=next(kernels))(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.Add()([x, shortcut]) if last else x
        x = layers.Activation("relu")(x)
    return layers.MaxPooling2D(2, padding="same")(x)


@keras.saving.register_keras_serializable("x_ray")
class Shrink(keras.layers.Layer):
    """Resizes images to another square, as ``keras.layers.Resizing`` does it by an operation that ONNX does not know.

    Input shape: ``(n, s, s, 1)``. Output shape: ``(n, side_px, side_px, 1)``.
    """

    def __init__(self, side_px: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.side_px = side_px

    def call(self, x: Any) -> Any:
        """Applies the layer to a batch."""
        return resize(x, self.side_px)

    def get_config(self) -> dict[str, Any]:
        """What a saved model needs to build the layer again."""
        return {**super().get_config(), "side_px": self.side_px}


def shrink(side_px: int) -> keras.layers.Layer:
    """The layer that resizes ``(n, 224, 224, 1)`` to the members' side."""
    return Shrink(side_px, name="shrink")


def join_members(members: Sequence[keras.Model], segmenter: keras.Model | None = None) -> keras.Model:
    """The model of a run: one network made of its members, which need different names.

    Args:
        members: As from ``build_member``.
        segmenter: Finds the lungs for members that see these alone; it becomes a part of the model.

    Returns:
        float32 ``(n, 224, 224, 1)`` in 0.0 to 1.0 -> ``probability`` and ``bacteria``, ``(n, 1)`` each, from the mean
        of the members' logits, and ``members`` ``(n, len(members))``, the probability by each member alone. Until
        ``set_calibration``, slopes are 1 and offsets 0.
    """
    pixels = keras.Input((SIDE_PX, SIDE_PX, 1), name="pixels")
    see_lungs = len(members[0].inputs) == 2
    to_side = shrink(members[0].inputs[0].shape[1])
    seen = to_side(pixels)
    if see_lungs:
        assert segmenter is not None
        segmenter.trainable = False
        seen = [seen, Widen(dtype="float32")(to_side(segmenter(pixels)))]
    logits = [member(seen) for member in members]
    mean = layers.Average(name="mean_logits")(logits) if len(logits) > 1 else logits[0]
    to_answer = {name: Calibrate(column, name=name) for column, name in enumerate(OUTPUTS)}
    alone = [to_answer["probability"](part) for part in logits]
    answers = {name: layer(mean) for name, layer in to_answer.items()}
    answers["members"] = layers.Concatenate(name="members")(alone) if len(alone) > 1 else alone[0]
    return keras.Model(pixels, answers, name="x_ray_classifier")


def set_calibration(model: keras.Model, name: str, slope: float, offset: float) -> None:
    """Sets slope and offset of an output's calibration."""
    layer = model.get_layer(name)
    layer.slope.assign(slope)
    layer.offset.assign(offset)


@dataclass(frozen=True)
class Answers:
    """Predictions of a model for ``n`` images, float64.

    Attributes:
        probability: P(label = 1), ``(n,)``.
        bacteria: P(bacteria) for an image that shows pneumonia, ``(n,)``; meaningless for other images.
        members: P(label = 1) by each member alone, ``(n, n_models)``.
    """

    probability: NDArray[np.float64]
    bacteria: NDArray[np.float64]
    members: NDArray[np.float64]


def answer(model: keras.Model, packed: NDArray[np.uint8], batch_size: int = 64) -> Answers:
    """All predictions of the model for packed images, uint8 ``(n, 224, 224)``."""
    return answer_pixels(model, (to_float(packed[i : i + batch_size]) for i in range(0, len(packed), batch_size)))


def answer_pixels(model: keras.Model, batches: Iterable[NDArray[np.float32]]) -> Answers:
    """All predictions of the model for batches of X-rays in memory, each float32 ``(n, 224, 224, 1)``."""
    parts = [model.predict_on_batch(batch) for batch in batches]
    width = model.output["members"].shape[1]

    def join(name: str, columns: int) -> NDArray[np.float64]:
        found = [ops.convert_to_numpy(part[name]) for part in parts]
        return np.concatenate(found).astype(np.float64) if found else np.empty((0, columns))

    return Answers(join("probability", 1)[:, 0], join("bacteria", 1)[:, 0], join("members", width))


def predict(model: keras.Model, packed: NDArray[np.uint8], batch_size: int = 64) -> NDArray[np.float64]:
    """P(label = 1) for packed images: uint8 ``(n, 224, 224)`` -> float64 ``(n,)``."""
    return answer(model, packed, batch_size).probability


def predict_pixels(model: keras.Model, batches: Iterable[NDArray[np.float32]]) -> NDArray[np.float64]:
    """P(label = 1) for batches of X-rays in memory, each float32 ``(n, 224, 224, 1)``: float64 ``(sum of n,)``."""
    return answer_pixels(model, batches).probability
