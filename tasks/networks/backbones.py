"""Backbones: the networks of Keras Applications, without their classification layers, for transfer to X-rays.

A backbone takes the X-ray as it is in memory, grey and 0.0 to 1.0, and returns pooled features. A layer of the network
converts it to what its family expects (three channels, another range), so that a saved network needs no preprocessing.
Transfer helps most with few images (Kermany et al. 2018, https://doi.org/10.1016/j.cell.2018.02.010).
"""

import difflib
import inspect
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tasks.errors import SettingsError
from tasks.networks.keras_backend import keras

ops = keras.ops

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
WEIGHT_SUFFIXES = (".weights.h5", ".h5")


@keras.saving.register_keras_serializable("x_ray")
class ImagenetPixels(keras.layers.Layer):
    """Turns grey X-rays into the colour pictures that a family of Keras Applications expects.

    The grey is repeated to red, green and blue, scaled to 0 to 255, and passed through the family's own
    ``preprocess_input``, which scales or centres it, or leaves it alone if the network does that inside.

    Input shape: ``(n, side, side, 1)``, 0.0 to 1.0. Output shape: ``(n, side, side, 3)``, in the family's range.

    Args:
        family: Module of ``keras.applications``, such as ``resnet_v2``.
    """

    def __init__(self, family: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.family = family

    def call(self, x: Any) -> Any:
        """Applies the layer to a batch."""
        prepare = getattr(keras.applications, self.family).preprocess_input
        return prepare(ops.concatenate([x, x, x], axis=-1) * 255.0, data_format="channels_last")

    def get_config(self) -> dict[str, Any]:
        """What a saved model needs to build the layer again."""
        return {**super().get_config(), "family": self.family}


@keras.saving.register_keras_serializable("x_ray")
class Spread(keras.layers.Layer):
    """Scales each colour about ImageNet's mean, as EfficientNet's ImageNet weights need; at first by 1.

    These were trained on values divided by the variance instead of the deviation. Keras corrects that by one more layer
    behind the normalisation, but builds it only when it fetches the weights itself, not for a file of the same weights
    (https://github.com/tensorflow/tensorflow/issues/49930). Here the gains are weights that are not trained: they are
    saved, loaded and copied with the others, and every EfficientNet is built alike.

    Input and output shape: ``(n, side, side, 3)``, 0 to 255 before spreading.
    """

    def build(self, input_shape: Any) -> None:
        """One gain a colour."""
        self.gain = self.add_weight(shape=(3,), initializer="ones", trainable=False, name="gain")

    def call(self, x: Any) -> Any:
        """Applies the layer to a batch."""
        mean = 255.0 * ops.convert_to_tensor(IMAGENET_MEAN, x.dtype)
        return x * self.gain + mean * (1.0 - self.gain)


def add_backbone(pixels: Any, name: str, weights: str | None) -> Any:
    """Adds a network of Keras Applications behind a tensor of X-rays; all of its weights can be trained.

    The smallest side depends on the family: 32 px, for Xception 71, for InceptionV3 and InceptionResNetV2 75.
    ImageNet's weights were learnt at 224 px and more; without classification layers they work at any of these sides.

    Args:
        pixels: Keras tensor ``(n, side, side, 1)``, 0.0 to 1.0, of a known side.
        name: Name of a network of `network_names`.
        weights: ``imagenet`` (fetched by Keras unless it has them, which needs network access), ``none`` or nothing
            for random ones, or a file as ``save_weights`` writes it from the same network: ``.weights.h5`` or ``.h5``.

    Returns:
        Keras tensor ``(n, c)``: the last features, averaged over the picture.

    Raises:
        SettingsError: If there is no such network, it does not take this side, or its weights are missing or unfit.
    """
    if name not in network_names():
        raise SettingsError(f"training.backbone: {name!r} is not a Keras Applications network; {_way_out(name)}")
    side_px = pixels.shape[1]
    if weights == "imagenet":
        backbone = _build_imagenet(name, side_px)
    else:
        backbone = _build(name, side_px)
        if weights not in (None, "none"):
            _load_weights(backbone, name, str(weights))
    # In float32 under any policy: half precision loses the last bits of 0 to 255 about a mean.
    x = ImagenetPixels(family_of(name), dtype="float32", name="imagenet_pixels")(pixels)
    if family_of(name) == "efficientnet":
        spread = Spread(dtype="float32", name="spread")
        x = spread(x)
        if _is_from_imagenet(backbone):
            spread.gain.assign([1 / math.sqrt(deviation) for deviation in IMAGENET_DEVIATION])
    return backbone(x)


def network_names() -> list[str]:
    """Names of all networks in ``keras.applications``, sorted: ``ConvNeXtBase`` to ``Xception``."""
    return sorted(n for n, value in vars(keras.applications).items() if inspect.isfunction(value) and n[0].isupper())


def family_of(name: str) -> str:
    """The module of ``keras.applications`` that prepares pixels for a network: ``ResNet50`` -> ``resnet``."""
    return str(getattr(keras.applications, name).__module__).rsplit(".", 1)[-1]


def _way_out(name: str) -> str:
    by_lower = {known.lower(): known for known in network_names()}
    near = [by_lower[lower] for lower in difflib.get_close_matches(name.lower(), by_lower, n=4)]
    return f"did you mean {' or '.join(near)}?" if near else "take one of " + ", ".join(network_names())


# A network keeps its own name: EfficientNetV2 picks its preprocessing by the first letter of the name.
def _build(name: str, side_px: int) -> Any:
    """The network with random weights."""
    try:
        return _call_builder(name, side_px, None)
    except ValueError as error:
        raise SettingsError(
            f"training.side_px: {name} does not take images of {side_px} px ({_reason(error)}); "
            "set another side or another training.backbone"
        ) from None


def _build_imagenet(name: str, side_px: int) -> Any:
    """The network with the weights that Keras fetches for it."""
    try:
        with warnings.catch_warnings():
            # Weights learnt at 224 px are meant to be used at another side here.
            warnings.filterwarnings("ignore", message=".*Weights for input shape", category=UserWarning)
            fetched = _call_builder(name, side_px, "imagenet")
    except Exception as error:  # Keras raises a bare Exception if a download fails
        _build(name, side_px)  # raises the better error if the side is the cause
        raise SettingsError(
            f"training.weights: the ImageNet weights of {name} could not be downloaded ({_reason(error)}); run where "
            "the network can be reached, or set training.weights to a file of them, ending in .weights.h5 or .h5"
        ) from None
    if family_of(name) != "efficientnet":
        return fetched
    # Keras builds this family with one more layer when it fetches the weights; here `Spread` replaces it.
    backbone = _build(name, side_px)
    backbone.set_weights(fetched.get_weights())
    for layer in _normalisations(backbone):
        layer.finalize_state()
    return backbone


def _call_builder(name: str, side_px: int, weights: str | None) -> Any:
    shape = (side_px, side_px, 3)
    return getattr(keras.applications, name)(include_top=False, weights=weights, input_shape=shape, pooling="avg")


def _load_weights(backbone: Any, name: str, weights: str) -> None:
    """Loads a file of weights, all of them or none."""
    path = Path(weights)
    if not path.is_file():
        raise SettingsError(
            f"training.weights: {weights} is not a file; name one that ends in .weights.h5 or .h5, or set imagenet or "
            "none"
        )
    if not path.name.endswith(WEIGHT_SUFFIXES):
        raise SettingsError(
            f"training.weights: {weights} does not end in .weights.h5 or .h5; save the weights of the network, not the "
            "model, to such a file"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # Keras warns if it leaves a layer at random values
            backbone.load_weights(path)
    except Exception as error:  # h5py and Keras raise many kinds for files that do not fit
        raise SettingsError(
            f"training.weights: {weights} does not fit {name} ({_reason(error)}); write it by save_weights of "
            f"keras.applications.{name}(include_top=False)"
        ) from None


def _is_from_imagenet(backbone: Any) -> bool:
    """Whether a network that normalises inside uses ImageNet's means; one trained elsewhere has others."""
    means = [layer.get_weights()[0] for layer in _normalisations(backbone)]
    return any(np.allclose(mean, IMAGENET_MEAN, atol=1e-3) for mean in means)


def _normalisations(backbone: Any) -> list[Any]:
    return [layer for layer in backbone.layers if isinstance(layer, keras.layers.Normalization)]


def _reason(error: Exception) -> str:
    """The first sentence of a library's message, without its full stop, to put in brackets."""
    return " ".join(str(error).split())[:300].split(". ")[0].rstrip(".") or type(error).__name__
