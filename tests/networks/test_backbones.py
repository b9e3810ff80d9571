"""Backbones: whose weights they bear, what they are shown, and which names and files are refused."""

import os
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.errors import SettingsError
from tasks.files import REPOSITORY
from tasks.networks.backbones import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    ImagenetPixels,
    add_backbone,
    family_of,
    network_names,
)
from tasks.networks.keras_backend import keras

SMALL = "MobileNetV3Small"
SIDE_PX = 64


def x_rays(n: int = 2, side_px: int = SIDE_PX) -> np.ndarray:
    return np.random.default_rng(0).random((n, side_px, side_px, 1), np.float32)


def colour(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey, 3, axis=-1) * 255


def numbers(tensor: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(tensor)


def with_backbone(name: str, weights: str | None, side_px: int = SIDE_PX) -> keras.Model:
    pixels = keras.Input((side_px, side_px, 1))
    return keras.Model(pixels, add_backbone(pixels, name, weights))


def original(name: str = SMALL, side_px: int = SIDE_PX, weights: str | None = None) -> keras.Model:
    build = getattr(keras.applications, name)
    return build(include_top=False, weights=weights, input_shape=(side_px, side_px, 3), pooling="avg")


def wake(network: keras.Model) -> keras.Model:
    """Fits the normalisation to one batch: what a network with first weights answers is nothing but rounding else."""
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    network(colour(x_rays(8, network.input_shape[1])), training=True)
    return network


@pytest.fixture(scope="module")
def source() -> keras.Model:
    keras.utils.set_random_seed(1)
    return wake(original())


@pytest.fixture(scope="module")
def weights_file(source: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.weights.h5"
    source.save_weights(path)
    return path


@pytest.fixture(scope="module")
def built(weights_file: Path) -> keras.Model:
    keras.utils.set_random_seed(2)
    return with_backbone(SMALL, str(weights_file))


def test_the_weights_of_the_file_are_in_the_network(source: keras.Model, built: keras.Model) -> None:
    (backbone,) = (layer for layer in built.layers if isinstance(layer, keras.Model))
    for there, here in zip(source.get_weights(), backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(there, here)
    assert backbone.trainable_weights


def test_the_features_are_those_of_the_original_on_the_same_picture_in_colour(
    source: keras.Model, built: keras.Model
) -> None:
    features = numbers(built(x_rays()))
    assert features.shape == (2, source.output_shape[-1])
    assert np.abs(features[0] - features[1]).max() > 0.01
    np.testing.assert_allclose(features, numbers(source(colour(x_rays()))), atol=1e-4)


def test_the_older_kind_of_weights_file_does_as_well(source: keras.Model, built: keras.Model, tmp_path: Path) -> None:
    source.save(tmp_path / "small.h5")  # holds weights in the older order; a model file is read for its weights only
    again = with_backbone(SMALL, str(tmp_path / "small.h5"))
    np.testing.assert_allclose(numbers(again(x_rays())), numbers(built(x_rays())), atol=1e-5)


def test_a_saved_network_loads_safely_and_answers_alike(built: keras.Model, tmp_path: Path) -> None:
    built.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", compile=False, safe_mode=True)
    np.testing.assert_allclose(numbers(again(x_rays())), numbers(built(x_rays())), atol=1e-5)


DRAW = """
import hashlib
from test_backbones import SMALL, keras, with_backbone
for seed, weights in [(1, None), (1, "none"), (2, None)]:
    keras.utils.set_random_seed(seed)
    print(hashlib.sha256(with_backbone(SMALL, weights).get_weights()[0].tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_without_weights_the_seed_decides() -> None:
    """In a process of its own: Keras draws from Python's global generator, as threads of the test servers do."""
    place = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests"), str(Path(__file__).parent))),
    }
    done = subprocess.run([sys.executable, "-c", DRAW], env=place, capture_output=True, text=True, check=True)
    one, again, other = done.stdout.split()
    assert one == again != other


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mobilenet_v2", "did you mean MobileNetV2"),
        ("ResNet5O", "did you mean ResNet50"),
        ("preprocess_input", "take one of ConvNeXtBase, "),
        ("resnet", "not a Keras Applications network"),
        ("", "take one of ConvNeXtBase, "),
    ],
)
def test_an_unknown_network_is_refused_with_those_that_are_near(name: str, said: str) -> None:
    with pytest.raises(
        SettingsError, match=r"^training\.backbone: '.*' is not a Keras Applications network; "
    ) as refused:
        with_backbone(name, None)
    assert said in str(refused.value)


def test_a_side_that_a_family_does_not_take_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"^training\.side_px: Xception does not take images of 64 px \(.*71"):
        with_backbone("Xception", None)


@pytest.mark.parametrize("name", ["away.weights.h5", "", "."])
def test_a_missing_file_of_weights_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=r"^training\.weights: .* is not a file; name one"):
        with_backbone(SMALL, str(tmp_path / name))


@pytest.mark.parametrize("name", ["model.keras", "weights.npz", "weights"])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(SettingsError, match=rf"{name} does not end in \.weights\.h5 or \.h5; "):
        with_backbone(SMALL, str(tmp_path / name))


@pytest.mark.parametrize("suffix", [".weights.h5", ".h5"])
@pytest.mark.parametrize("kind", ["bytes", "cut", "another network"])
def test_weights_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, source: keras.Model, suffix: str, kind: str
) -> None:
    path = tmp_path / f"unfit{suffix}"
    if kind == "bytes":
        path.write_bytes(b"these are no weights")
    else:
        other = source
        if kind == "another network":
            pixels = keras.Input((SIDE_PX, SIDE_PX, 3))
            other = keras.Model(pixels, keras.layers.Conv2D(4, 3)(keras.layers.Conv2D(4, 3)(pixels)))
        other.save_weights(path) if suffix == ".weights.h5" else other.save(path)
        if kind == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SettingsError) as refused:
        with_backbone(SMALL, str(path))
    said = str(refused.value)
    assert said.startswith(f"training.weights: {path} does not fit {SMALL} (")
    assert "\n" not in said


def test_a_download_that_fails_ends_in_a_sentence_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("keras.src.utils.file_utils.urlretrieve", fail)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    with pytest.raises(SettingsError, match=r"could not be downloaded .*not known.* to a file of them") as refused:
        with_backbone(SMALL, "imagenet")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("family", "black", "white"),
    [
        ("mobilenet_v3", [0, 0, 0], [255, 255, 255]),
        ("efficientnet", [0, 0, 0], [255, 255, 255]),
        ("mobilenet_v2", [-1, -1, -1], [1, 1, 1]),
        ("resnet", [-103.939, -116.779, -123.68], [151.061, 138.221, 131.32]),
        ("densenet", [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]),
    ],
)
def test_each_family_is_shown_the_values_it_expects(family: str, black: list[float], white: list[float]) -> None:
    x = x_rays(side_px=8)
    x[0, 0, 0], x[0, 0, 1] = 0, 1
    shown = numbers(ImagenetPixels(family)(x))
    np.testing.assert_allclose(shown[0, 0, 0], black, atol=1e-4)
    np.testing.assert_allclose(shown[0, 0, 1], white, atol=1e-4)
    expected = getattr(keras.applications, family).preprocess_input(colour(x))
    np.testing.assert_allclose(shown, expected, atol=1e-4)


def test_every_network_has_a_family_that_prepares_its_pixels() -> None:
    assert {"ConvNeXtTiny", "MobileNetV3Large", "NASNetMobile", "ResNet50", "VGG16"} <= set(network_names())
    for name in network_names():
        assert callable(getattr(keras.applications, family_of(name)).preprocess_input), name


@pytest.mark.slow
def test_efficientnet_sees_a_file_of_imagenet_weights_as_it_sees_those_that_keras_fetches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, side_px = "EfficientNetB0", 32
    x = x_rays(side_px=side_px)

    def first_convolution(network: keras.Model) -> keras.Model:
        return keras.Model(network.input, network.get_layer("stem_conv").output)

    network = original(name, side_px)
    network.save_weights(tmp_path / "elsewhere.weights.h5")
    elsewhere = numbers(first_convolution(network)(colour(x)))
    (normalise,) = (layer for layer in network.layers if isinstance(layer, keras.layers.Normalization))
    normalise.set_weights([np.array(IMAGENET_MEAN), np.array(IMAGENET_DEVIATION) ** 2, np.array(0)])
    network.save(tmp_path / "imagenet.h5")
    monkeypatch.setattr("keras.src.utils.file_utils.get_file", lambda *_, **__: str(tmp_path / "imagenet.h5"))
    imagenet = numbers(first_convolution(original(name, side_px, "imagenet"))(colour(x)))
    assert np.abs(imagenet - elsewhere).max() > 0.1

    for weights, wanted in [("imagenet", imagenet), ("imagenet.h5", imagenet), ("elsewhere.weights.h5", elsewhere)]:
        built = with_backbone(name, weights if weights == "imagenet" else str(tmp_path / weights), side_px)
        shown = built.get_layer("spread")(built.get_layer("imagenet_pixels")(x))
        (backbone,) = (layer for layer in built.layers if isinstance(layer, keras.Model))
        np.testing.assert_allclose(numbers(first_convolution(backbone)(shown)), wanted, atol=1e-4)


def test_the_weights_alone_carry_what_efficientnet_sees() -> None:
    """As training does, which builds the kept network anew without its weights and copies them."""
    one, two = (with_backbone("EfficientNetB0", None, 32) for _ in range(2))
    one.get_layer("spread").gain.assign([2.0, 2.1, 2.2])
    two.set_weights(one.get_weights())
    np.testing.assert_allclose(numbers(two.get_layer("spread").gain), [2.0, 2.1, 2.2])
