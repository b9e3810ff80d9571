"""Settling: the statistics of a finished network are those of the images that it is shown, as they are."""

import numpy as np

from tasks.networks.classifier import build_member
from tasks.networks.keras_backend import keras
from tasks.settings import TrainingSettings
from tasks.training.labelled_images import LabelledImages
from tasks.training.settling import first_logits, settle_normalisation

layers = keras.layers


def images(n: int = 64, side_px: int = 32) -> LabelledImages:
    """Pictures of two brightnesses, in order, as the rows of a manifest are."""
    pixels = np.random.default_rng(0).integers(0, 40, (n, side_px, side_px), dtype=np.uint8)
    pixels[n // 2 :] += 120
    labels = (np.arange(n) >= n // 2).astype(np.float32)
    return LabelledImages(pixels, labels, np.full(n, np.nan, np.float32), np.full_like(pixels, 255))


def member(nested: bool) -> keras.Model:
    """A network that normalises the pixels themselves, itself or in a backbone."""
    pixels = keras.Input((32, 32, 1))
    inner = keras.Model(pixels, layers.BatchNormalization(momentum=0.9, name="norm")(pixels), name="inner")
    seen = inner(pixels) if nested else inner.get_layer("norm")(pixels)
    return keras.Model(pixels, layers.Dense(2)(layers.GlobalAveragePooling2D()(seen)))


def test_statistics_become_those_of_all_images_in_a_backbone_too() -> None:
    grey = images().pixels / 255
    for nested in (False, True):
        network = member(nested)
        norm = (network.get_layer("inner") if nested else network).get_layer("norm")
        norm.moving_mean.assign([7.0])
        settle_normalisation(network, images(), seed=1)
        np.testing.assert_allclose(norm.moving_mean, grey.mean(), rtol=1e-3)
        np.testing.assert_allclose(norm.moving_variance, grey.var(), rtol=0.05)
        assert norm.momentum == 0.9, "training goes on as before"


def test_nothing_but_statistics_changes_and_settling_twice_is_settling_once() -> None:
    for field in ("varied", "lungs"):
        network = build_member(TrainingSettings.model_validate({"side_px": 32, "width": 4, "field": field}), 1)
        learnt = [variable.numpy().copy() for variable in network.trainable_variables]
        settle_normalisation(network, images(), seed=1)
        once = first_logits(network, images())
        settle_normalisation(network, images(), seed=1)
        np.testing.assert_allclose(first_logits(network, images()), once, atol=1e-4)
        for before, after in zip(learnt, network.trainable_variables, strict=True):
            np.testing.assert_array_equal(before, after)


def test_fewer_images_than_a_batch_are_one_batch() -> None:
    network = member(nested=False)
    settle_normalisation(network, images(n=6), seed=1)
    np.testing.assert_allclose(network.get_layer("norm").moving_mean, (images(n=6).pixels / 255).mean(), rtol=1e-3)
