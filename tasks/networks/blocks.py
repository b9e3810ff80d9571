"""Blocks: what the networks that draw masks are built of, the screener of devices and the segmenter of lungs."""

from collections.abc import Iterator, Sequence
from typing import Any

from tasks.networks.keras_backend import keras

layers = keras.layers


def convolve(x: Any, channels: int, kernels: Iterator[Any], kernel: int = 3, strides: int = 1) -> Any:
    """A convolution, normalised over the batch: ``(n, s, s, c)`` -> ``(n, s / strides, s / strides, channels)``."""
    x = layers.Conv2D(
        channels, kernel, strides=strides, padding="same", use_bias=False, kernel_initializer=next(kernels)
    )(x)
    return layers.Activation("relu")(layers.BatchNormalization(momentum=0.95)(x))


def residual_block(x: Any, channels: int, kernels: Iterator[Any]) -> Any:
    """Two 3 x 3 convolutions with a shortcut: ``(n, s, s, c)`` -> ``(n, s, s, channels)``."""
    shortcut = x
    if x.shape[-1] != channels:
        shortcut = layers.Conv2D(channels, 1, use_bias=False, kernel_initializer=next(kernels))(x)
    x = convolve(x, channels, kernels)
    x = layers.Conv2D(channels, 3, padding="same", use_bias=False, kernel_initializer=next(kernels))(x)
    return layers.Activation("relu")(layers.Add()([layers.BatchNormalization(momentum=0.95)(x), shortcut]))


def go_down_and_up(x: Any, widths: Sequence[int], kernels: Iterator[Any]) -> Any:
    """A small U-Net with residual blocks (Ronneberger et al. 2015, arXiv:1505.04597).

    Args:
        x: Features ``(n, s, s, widths[0])``.
        widths: Channels at ``s``, ``s / 2`` and so on.
        kernels: Initialisers, one for each kernel.

    Returns:
        Features ``(n, s, s, widths[0])``.
    """
    levels = []
    for depth, channels in enumerate(widths):
        x = layers.MaxPooling2D(2)(x) if depth else x
        x = residual_block(x, channels, kernels)
        levels.append(x)
    for skip, channels in zip(levels[-2::-1], widths[-2::-1], strict=True):
        x = layers.Conv2D(channels, 1, use_bias=False, kernel_initializer=next(kernels))(x)
        x = layers.Add()([layers.UpSampling2D(2, interpolation="bilinear")(x), skip])
        x = convolve(x, channels, kernels)
    return x
