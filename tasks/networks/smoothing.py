"""Smoothing and resizing along both sides of an image, as two products of matrices.

On a CPU that is several times as fast as a convolution or a pooling of one channel, and every runtime of ONNX knows it.
Images are float32 ``(n, side, side, 1)``; beyond the edge they are mirrored.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, uniform_filter1d

from tasks.networks.keras_backend import keras

ops = keras.ops


def along_sides(x: Any, weights: NDArray[np.float64]) -> Any:
    """``(n, s, s, 1)`` to ``(n, t, t, 1)``: rows and columns become sums of rows and columns, weights ``(t, s)``."""
    weights = weights.astype(np.float32)
    return ops.matmul(ops.matmul(weights, x[..., 0]), weights.T)[..., None]


def blur(x: Any, deviation_px: float) -> Any:
    """A Gaussian blur."""
    return along_sides(x, gaussian_filter1d(np.eye(x.shape[1]), deviation_px, axis=0))


def mean_around(x: Any, reach_px: int) -> Any:
    """The mean of the square that reaches so far from each pixel."""
    return along_sides(x, uniform_filter1d(np.eye(x.shape[1]), 2 * reach_px + 1, axis=0))


def resize(x: Any, side_px: int) -> Any:
    """Bilinear and antialiased, as ``keras.layers.Resizing`` does it."""
    step = x.shape[1] / side_px
    centres = (np.arange(side_px) + 0.5) * step
    share = np.maximum(0.0, 1.0 - np.abs(np.arange(x.shape[1]) + 0.5 - centres[:, None]) / max(step, 1.0))
    return along_sides(x, share / share.sum(1, keepdims=True))
