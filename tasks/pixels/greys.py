"""An X-ray as networks and arrays have it: its side, and packed greys as floats."""

import numpy as np
from numpy.typing import NDArray

SIDE_PX = 224
"""Side of a packed X-ray, in pixels."""


def to_float(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Packed uint8 ``(n, side, side)`` to X-rays in memory: float32 ``(n, side, side, 1)``, 0.0 to 1.0."""
    return packed[..., None].astype(np.float32) / np.float32(255.0)
