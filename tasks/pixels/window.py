"""The lung window: the middle part of an X-ray, mostly filled by the lungs."""

import numpy as np
from numpy.typing import NDArray

WINDOW = (0.10, 0.86, 0.12, 0.88)
"""The lung window: top, bottom, left, right as shares of the side. In a child's chest film the lungs are inside;
shoulders, arms, neck, belly, side letters and the edges of the film are outside."""


def window_place(side_px: int) -> NDArray[np.bool_]:
    """The lung window as a mask, bool ``(side_px, side_px)``."""
    place = np.zeros((side_px, side_px), bool)
    top, bottom, left, right = (round(share * side_px) for share in WINDOW)
    place[top:bottom, left:right] = True
    return place
