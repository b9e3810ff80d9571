"""Outlines of masks drawn over X-rays, for people."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from tasks.pixels.masks import SURE

JPEG_QUALITY = 92

DISTANCE_PX = 3

FAINTEST = 12
"""Masks whose strongest pixel is below this (of 255) get no outline: it would surround noise."""


def encode_jpeg(pixels: NDArray[np.uint8]) -> str:
    """uint8 ``(224, 224)`` -> a JPEG as data URI, about 15 kB."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def draw_outline(mask: NDArray[np.uint8]) -> tuple[str, bool]:
    """The outline of a mask: the ``d`` of an SVG path in pixels of the image, and whether the screener is sure.

    Returns:
        The outline at probability one half, and ``True``. If the mask stays below that, the outline at half of its
        strongest value, and ``False``. An empty path if there is nothing to outline.
    """
    from skimage.measure import approximate_polygon, find_contours

    peak = int(mask.max())
    if peak < FAINTEST:
        return "", False
    level = SURE - 0.5 if peak >= SURE else peak / 2
    # The line keeps a distance, or it would cover the thin tube that it marks.
    wider = np.asarray(Image.fromarray(mask).filter(ImageFilter.MaxFilter(2 * DISTANCE_PX + 1)), dtype=np.float32)
    # An empty margin closes the outline of devices at the edge; a contour's points are pixel centres.
    contours = find_contours(np.pad(wider, 1), level)
    pieces = []
    for contour in contours:
        points = approximate_polygon(contour, 0.35)[:, ::-1] - 0.5
        pieces.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points[:-1]) + "Z")
    return "".join(pieces), peak >= SURE
