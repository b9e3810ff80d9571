"""Whether packed pixels are those of a chest X-ray as it should be exported: not flat, not saturated, not inverted.

Bounds lie well outside of what 5,840 children's X-rays (Kermany et al. 2018) and 600 drawn ones show, whose extremes
are given with each bound.
"""

import numpy as np
from numpy.typing import NDArray

from tasks.pixels.greys import SIDE_PX

LOOKS = {
    "flat": "flat (nearly one shade)",
    "saturated": "saturated (mostly black and white)",
    "inverted": "inverted (white where X-rays are black) or on their side",
}
"""What can be wrong with an image, and how to say it."""

MIN_SPREAD = 48
"""Grey levels between the 1st and the 99th percentile. Real: 85 and more. 12 of 16 bits read as 16 leave 15, 14 leave
50; a picture of one shade has 0."""
MAX_SATURATED = 0.5
"""Share of pixels that are black or white, without black margins around the picture. Real: up to 0.25."""
MIN_LIKENESS = -0.3
"""Correlation with the mean chest. Real: 0.33 and more, so at most -0.33 where inverted; half of the X-rays lie beyond
0.87. Those that lie on their side reach -0.45, but 97 % of them are above the bound."""

MEAN_CHEST = np.array(
    [
        [-10, -10, 4, 12, 4, -10, -10],
        [-6, 5, 4, 15, 4, 5, -6],
        [-10, -1, -1, 17, 2, -2, -11],
        [-11, -5, 0, 18, 9, -5, -12],
        [-13, -7, -2, 17, 10, -5, -13],
        [-14, -2, 7, 17, 11, -3, -14],
        [-14, 5, 13, 17, 12, 4, -14],
    ],
    np.float64,
)
"""The mean of 600 drawn chests in 7 x 7 cells: spine and heart bright, lungs darker, corners dark."""


def judge_looks(packed: NDArray[np.uint8]) -> list[str]:
    """What is wrong with the pixels of each image, uint8 ``(n, 224, 224)``: one of ``LOOKS``, or ``""``."""
    return [_judge(image) for image in packed]


def _judge(image: NDArray[np.uint8]) -> str:
    sparse = image[::4, ::4]
    dark, bright = np.percentile(sparse, (1, 99))
    if bright - dark < MIN_SPREAD:
        return "flat"
    inside = sparse[sparse.max(1) > 1][:, sparse.max(0) > 1]
    if ((inside <= 1) | (inside >= 254)).mean() > MAX_SATURATED:
        return "saturated"
    side = len(MEAN_CHEST)
    cells = image.reshape(side, SIDE_PX // side, side, SIDE_PX // side).mean((1, 3))
    with np.errstate(invalid="ignore"):  # of cells that are all the same
        likeness = np.corrcoef(cells.ravel(), MEAN_CHEST.ravel())[0, 1]
    return "inverted" if likeness < MIN_LIKENESS else ""
