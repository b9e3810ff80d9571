"""The network: its contract, its layers, and loading only what was saved."""

from pathlib import Path

import numpy as np
import pytest

from tasks.keras_backend import keras
from tasks.networks import (
    ExposureShift,
    FramingShift,
    Standardise,
    build_network,
    load_network,
    predict,
    save_network,
)
from tasks.records import RunError
from tasks.settings import TrainingSettings

TINY = TrainingSettings(side_px=32, width=4)


@pytest.fixture(scope="module")
def network() -> keras.Model:
    return build_network(TINY, seed=1)


def x_rays(n: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 224, 224), dtype=np.uint8)


def test_the_answer_is_one_probability_an_image(network: keras.Model) -> None:
    answers = predict(network, x_rays(5), batch_size=2)
    assert answers.shape == (5,)
    assert ((answers > 0) & (answers < 1)).all()


def test_the_answer_does_not_depend_on_the_batch(network: keras.Model) -> None:
    together, alone = predict(network, x_rays(3), batch_size=3), predict(network, x_rays(3), batch_size=1)
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_the_same_seed_builds_the_same_network() -> None:
    one, two = build_network(TINY, seed=3), build_network(TINY, seed=3)
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_overall_brightness_and_contrast_change_nothing(network: keras.Model) -> None:
    grey = x_rays(2).astype(np.float32)[..., None] / 255
    dim = 0.2 + 0.5 * grey
    np.testing.assert_allclose(network.predict_on_batch(grey), network.predict_on_batch(dim), atol=1e-3)


def test_a_constant_image_gets_a_finite_answer(network: keras.Model) -> None:
    assert np.isfinite(predict(network, np.zeros((1, 224, 224), np.uint8))).all()
    assert np.isfinite(predict(network, np.full((1, 224, 224), 255, np.uint8))).all()


@pytest.mark.parametrize("layer", [ExposureShift(seed=1), FramingShift(seed=1)])
def test_augmentation_acts_in_training_only(layer: keras.layers.Layer) -> None:
    x = np.random.default_rng(0).random((2, 32, 32, 1), np.float32)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer(x, training=False)), x)
    changed = keras.ops.convert_to_numpy(layer(x, training=True))
    assert changed.shape == x.shape
    assert np.abs(changed - x).mean() > 0.01
    assert changed.min() >= 0
    assert changed.max() <= 1 + 1e-6


def test_framing_without_bounds_moves_nothing() -> None:
    x = np.random.default_rng(0).random((2, 32, 32, 1), np.float32)
    still = FramingShift(degrees=0.0, scale=0.0, shift=0.0)(x, training=True)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(still), x, atol=1e-5)


def test_standardised_images_have_mean_0_and_deviation_1() -> None:
    out = keras.ops.convert_to_numpy(Standardise()(np.random.default_rng(0).random((3, 16, 16, 1), np.float32)))
    np.testing.assert_allclose(out.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(out.std((1, 2, 3)), 1, atol=1e-2)


def test_a_saved_network_loads_safely_and_answers_alike(network: keras.Model, tmp_path: Path) -> None:
    save_network(network, tmp_path)
    np.testing.assert_allclose(predict(load_network(tmp_path), x_rays()), predict(network, x_rays()), atol=1e-6)


def test_a_changed_model_file_is_refused_by_name(network: keras.Model, tmp_path: Path) -> None:
    save_network(network, tmp_path)
    with (tmp_path / "model.keras").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(RunError, match=r"model\.keras does not match model\.sha256"):
        load_network(tmp_path)


def test_a_missing_model_says_which_flow_makes_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="run the train flow"):
        load_network(tmp_path)
