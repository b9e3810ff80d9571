"""Takes real devices off one X-ray and puts them on another, or fills their place from its surroundings.

A device attenuates: the anatomy under it stays visible. So a density is lifted off, not a patch of the donor: the
difference between the filled-in picture and the one with the device. The donor's lung does not come along.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, gaussian_filter

from tasks.pixels.masks import SURE

MARGIN_PX = 3
"""Pixels by which a mask is grown before filling or lifting: it is a little tight and drawn at half the side."""
MAX_DENSITY = 0.97

Floats = NDArray[np.float32]


def grow_mask(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The place of a device, edges included: uint8 ``(side, side)``, 255 sure -> bool of the same shape."""
    return np.asarray(binary_dilation(mask >= SURE, iterations=MARGIN_PX))


def fill_place(grey: Floats, place: NDArray[np.bool_]) -> Floats:
    """The X-ray with a place filled from its surroundings, by biharmonic inpainting (Damelin & Hoang 2018).

    Args:
        grey: float32 ``(side, side)``, 0.0 to 1.0.
        place: bool ``(side, side)``; all or nothing of it marked leaves the X-ray as it is.
    """
    from skimage.restoration import inpaint_biharmonic

    if not place.any() or place.all():
        return grey
    return np.clip(inpaint_biharmonic(grey, place), 0, 1).astype(np.float32)


def lift_density(grey: Floats, place: NDArray[np.bool_]) -> Floats:
    """The density that a device adds to its X-ray: 0.0 to 0.97, ``(side, side)``, 0 outside of its place."""
    filled = fill_place(grey, place)
    density = np.clip((grey - filled) / np.maximum(1 - filled, 1e-3), 0, MAX_DENSITY)
    soft = np.clip(gaussian_filter(place.astype(np.float32), 1.0) * 2 - 0.5, 0, 1)  # no step at the edge
    return (density * soft * place).astype(np.float32)


def put_density(grey: Floats, density: Floats) -> Floats:
    """The X-ray with a density put over it, as ``tasks.drawings.devices`` does: ``1 - (1 - grey) * (1 - density)``."""
    return (1 - (1 - grey) * (1 - density)).astype(np.float32)
