"""Shifts: validation images as another hospital might have made them.

The test normals of the public data set come from another distribution than its training normals, and so will images of
another hospital. Validation alone does not show that. So calibration and thresholds are fitted on it *and* on these
changed copies, and on those of ``tasks.pixels.borrowed_looks``; the report shows the AUC under each. Training varies
exposure, sharpness, grain and framing too, by other means.

All functions map packed images, uint8 ``(n, side, side)``, to the same shape.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

BORDER = 3 / 28
"""Width of the border as a share of the side; this ring alone reaches AUC 0.81 on the public test set."""

Packed = NDArray[np.uint8]


def keep_border(packed: Packed) -> Packed:
    """Keeps the outer 3/28 of each side; the rest becomes the image's mean."""
    return _blank(packed, outside=False)


def remove_border(packed: Packed) -> Packed:
    """Replaces the outer 3/28 of each side by the image's mean."""
    return _blank(packed, outside=True)


def _blank(packed: Packed, outside: bool) -> Packed:
    width = round(BORDER * packed.shape[1])
    blank = np.full(packed.shape[1:], outside)
    blank[width:-width, width:-width] = not outside
    means = np.rint(packed.mean((1, 2), keepdims=True)).astype(np.uint8)
    return np.where(blank, means, packed)


def _gamma(packed: Packed, power: float) -> Packed:
    return np.rint((np.arange(256) / 255) ** power * 255).astype(np.uint8)[packed]


def _equalise(packed: Packed) -> Packed:
    """Equalises local contrast (CLAHE, Zuiderveld 1994), as the software of many machines does."""
    from skimage.exposure import equalize_adapthist

    return np.stack([np.rint(equalize_adapthist(image, clip_limit=0.02) * 255).astype(np.uint8) for image in packed])


def _blur(packed: Packed) -> Packed:
    sigma = 1.5 * packed.shape[1] / 224
    return np.rint(ndimage.gaussian_filter(packed.astype(np.float32), (0, sigma, sigma))).astype(np.uint8)


def _sharpen(packed: Packed) -> Packed:
    return np.clip(2 * packed.astype(np.int16) - _blur(packed), 0, 255).astype(np.uint8)


def _add_noise(packed: Packed) -> Packed:
    grain = np.random.default_rng(0).normal(0, 0.04 * 255, packed.shape)
    return np.clip(np.rint(packed + grain), 0, 255).astype(np.uint8)


def _zoom(packed: Packed, scale: float) -> Packed:
    """Zooms about the centre; the outside is black."""
    centre = (packed.shape[1] - 1) / 2
    return ndimage.affine_transform(
        packed, [1, 1 / scale, 1 / scale], offset=[0, centre - centre / scale, centre - centre / scale], order=1
    )


def _turn(packed: Packed, degrees: float) -> Packed:
    return ndimage.rotate(packed, degrees, axes=(1, 2), reshape=False, order=1)


SHIFTS: dict[str, Callable[[Packed], Packed]] = {
    "as it is": lambda packed: packed,
    "brighter": lambda packed: _gamma(packed, 0.6),
    "darker": lambda packed: _gamma(packed, 1.7),
    "local contrast": _equalise,
    "blurred": _blur,
    "sharpened": _sharpen,
    "grain": _add_noise,
    "closer": lambda packed: _zoom(packed, 1.15),
    "farther": lambda packed: _zoom(packed, 0.87),
    "turned": lambda packed: _turn(packed, 10.0),
    "border blanked": remove_border,
}
"""Name of a shift, for people -> its function."""
