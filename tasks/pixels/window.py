"""The window in the middle of an X-ray that the lungs fill most of."""

import numpy as np
from numpy.typing import NDArray

WINDOW = (0.10, 0.86, 0.12, 0.88)
"""The lung window: top, bottom, left, right as shares of the side. A chest film of a child has its lungs in there, and
shoulders, arms, neck, belly, side letters and the edges of the film outside."""


def window_place(side_px: int) -> NDArray[np.bool_]:
    """The lung window as a mask, bool ``(side_px, side_px)``."""
    place = np.zeros((side_px, side_px), bool)
    top, bottom, left, right = (round(share * side_px) for share in WINDOW)
    place[top:bottom, left:right] = True
    return place
