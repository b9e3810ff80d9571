"""Parts of X-rays covered: what a network is shown when it is asked what it knows from the lungs, and what without.

All functions map packed images or masks, uint8 ``(n, side, side)``, to arrays of that shape.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter

from tasks.pixels.masks import SURE

LUNG_MARGIN_PX = 4
"""Pixels by which lungs are widened before they are shown or covered, so that the edge of a mask cuts off no lung."""

Packed = NDArray[np.uint8]
Places = NDArray[np.bool_]


def widen_lungs(masks: Packed) -> Places:
    """The place of the lungs, 4 px wider than the masks are sure of."""
    size = 2 * LUNG_MARGIN_PX + 1
    return np.asarray(maximum_filter(masks, size=(1, size, size)) >= SURE)


def find_lungs(places: Places) -> NDArray[np.bool_]:
    """Images of whose lungs something is found, bool ``(n,)``; nothing can be covered, or left, of the others."""
    return np.asarray(places.any((1, 2)) & ~places.all((1, 2)))


def cover(packed: Packed, places: Places) -> Packed:
    """Images with places covered by the mean grey of what is left: that of the whole would tell what was covered.

    Args:
        packed: The images.
        places: What is covered, of the same shape or one for all, ``(side, side)``; not all of an image.
    """
    places = np.broadcast_to(places, packed.shape)
    sums = np.where(places, 0, packed).sum((1, 2), dtype=np.int64)
    means = np.rint(sums / (~places).sum((1, 2))).astype(np.uint8)
    return np.where(places, means[:, None, None], packed)
