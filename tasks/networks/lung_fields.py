"""Lung fields: whether a mask of lungs shows two, of a size and at places as the training images' own masks do.

What looks familiar at a glance (``familiarity``) may still lack its lungs: a chest whose upper half is missing, another
part of the body. Such an image gets no decision.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.errors import RunError
from tasks.files import read_record, write_json
from tasks.pixels.greys import SIDE_PX
from tasks.pixels.masks import SURE

FILE = "lungs/bounds.json"
SMALL_PX = 56
MIN_IMAGES = 20  # with fewer, what is usual is unknown: only that there are two fields at all is asked
LEAST_AREA = 0.01  # below this there is no field, whatever the training images show
TOUCHING = 0.6  # of the lungs' width: up to this a chest only touches the upper edge, whatever the training images show


class Measure(NamedTuple):
    """A measure of lung fields, 0 to 1.

    Attributes:
        says: What it is, for people.
        beyond: How far beyond the training images an image may lie.
        share: Of the training images, left out at either end.
    """

    says: str
    beyond: float
    share: float = 1 / 1000


MEASURES = {
    "left_area": Measure("area of the left field, as a share of the image", 0.04),
    "right_area": Measure("area of the right field, as a share of the image", 0.04),
    "left_x": Measure("centre of the left field, from left to right", 0.08),
    "right_x": Measure("centre of the right field, from left to right", 0.08),
    "left_y": Measure("centre of the left field, from top to bottom", 0.08),
    "right_y": Measure("centre of the right field, from top to bottom", 0.08),
    # Training images are cut at the top themselves; what is beyond them is hardly a chest any more.
    "cut_top": Measure("width of the lungs at the upper edge, as a share of their greatest", 0.0, share=1 / 300),
    "cut_bottom": Measure("width of the lungs at the lower edge, as a share of their greatest", 0.15),
    "cut_left": Measure("height of the lungs at the left edge, as a share of their greatest", 0.1),
    "cut_right": Measure("height of the lungs at the right edge, as a share of their greatest", 0.1),
    "others": Measure("area of further fields, as a share of the image", 0.04),
    "sure": Measure("mean certainty inside the fields", 0.05),
}
"""What is measured of a mask. Left is that of the image."""


@dataclass(frozen=True)
class LungBounds:
    """What is usual of the lungs of a run's training images.

    Attributes:
        bounds: For each measure the least and greatest value.
        segmenter: sha256 of the network that drew the masks.
        n: Number of the training images.
    """

    bounds: dict[str, tuple[float, float]]
    segmenter: str
    n: int


def measure_fields(masks: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Measures the lung fields of masks: the largest field on either side of the image's middle.

    Args:
        masks: uint8 ``(n, 224, 224)``, 255 surely lung.

    Returns:
        float64 ``(n, 12)``, the numbers in ``MEASURES``; where there is no field, its place is not a number.
    """
    px = SIDE_PX // SMALL_PX
    small = masks.reshape(-1, SMALL_PX, px, SIDE_PX).sum(2, dtype=np.uint16)
    small = small.reshape(-1, SMALL_PX, SMALL_PX, px).sum(3, dtype=np.uint16)
    rows = [_measure(mask / np.float64(px * px)) for mask in small]
    return np.array(rows).reshape(-1, len(MEASURES))


def _measure(mask: NDArray[np.float64]) -> list[float]:
    """The measures of one mask, ``(56, 56)``, 0 to 255."""
    from scipy.ndimage import label

    lung = mask >= SURE
    parts, n = label(lung)
    areas = np.bincount(parts.ravel(), minlength=n + 1)[1:] / lung.size
    ys, xs = np.nonzero(parts)
    numbers = parts[ys, xs] - 1
    counts = np.maximum(np.bincount(numbers, minlength=n), 1)
    x, y = (np.bincount(numbers, at + 0.5, n) / counts / SMALL_PX for at in (xs, ys))
    found = []
    for side in (x < 0.5, x >= 0.5):
        which = int(np.argmax(np.where(side, areas, 0))) if side.any() else None
        found.append((0.0, np.nan, np.nan) if which is None else (areas[which], x[which], y[which]))
    (left, left_x, left_y), (right, right_x, right_y) = found
    across, down = lung.sum(1), lung.sum(0)
    edges = [across[:2].mean(), across[-2:].mean(), down[:2].mean(), down[-2:].mean()]
    most = [max(int(each.max()), 1) for each in (across, across, down, down)]
    cut = [edge / whole for edge, whole in zip(edges, most, strict=True)]
    others = max(float(areas.sum() - left - right), 0.0)
    sure = float(mask[lung].mean() / 255) if lung.any() else np.nan
    return [left, right, left_x, right_x, left_y, right_y, *cut, others, sure]


def fit_bounds(measured: NDArray[np.float64], segmenter: str) -> LungBounds:
    """The bounds of plausible lungs, from the lungs of the training images.

    The range of all but a small share of them at either end of each measure, and what ``MEASURES`` allows beyond.

    Args:
        measured: ``(n, 12)``, of the training images.
        segmenter: sha256 of the network that drew the masks.
    """
    least, most = {"left_area": LEAST_AREA, "right_area": LEAST_AREA}, {"cut_top": TOUCHING}
    bounds = {name: (least[name], 1.0) for name in least}
    for (name, (_, beyond, share)), values in zip(MEASURES.items(), measured.T, strict=True):
        known = values[np.isfinite(values)]
        if len(measured) >= MIN_IMAGES and len(known):
            low, high = np.quantile(known, [share, 1 - share])
            low, high = max(low - beyond, least.get(name, 0.0)), min(max(high + beyond, most.get(name, 0.0)), 1.0)
            bounds[name] = (round(float(low), 4), round(float(high), 4))
    return LungBounds(bounds, segmenter, len(measured))


def describe_lungs(measured: NDArray[np.float64], bounds: LungBounds) -> str:
    """Why an image counts as one without two plausible lungs, in one short sentence; ``""`` if it shows them.

    The measure that lies furthest beyond its bound is named.

    Args:
        measured: The 12 numbers of ``measure_fields``.
        bounds: Those of the run.
    """
    found = dict(zip(MEASURES, map(float, measured), strict=True))
    beyond = {
        name: max(low - found[name], found[name] - high) / (high - low + LEAST_AREA)
        for name, (low, high) in bounds.bounds.items()
        if found[name] < low or found[name] > high
    }
    if not beyond:
        return ""
    name = max(beyond, key=beyond.__getitem__)
    low, high = bounds.bounds[name]
    return (
        f"shows no two lungs like those of the training images ({MEASURES[name].says}: {found[name]:.3f}, "
        f"bound {low if found[name] < low else high:.3f})"
    )


def save_bounds(bounds: LungBounds, folder: Path) -> None:
    """Writes ``lungs/bounds.json`` into a folder."""
    write_json(folder / FILE, {"bounds": bounds.bounds, "segmenter": bounds.segmenter, "n": bounds.n})


def load_bounds(folder: Path) -> LungBounds:
    """Reads ``lungs/bounds.json`` of a run.

    Raises:
        RunError: If it is missing, or not such a file.
    """
    path = folder / FILE
    if not path.exists():
        raise RunError(f"{path} is missing: run the prepare flow on this run folder first")
    found = read_record(path, bounds=dict, segmenter=str, n=int)
    try:
        bounds = {str(name): (float(low), float(high)) for name, (low, high) in found["bounds"].items()}
        whole = set(bounds) <= set(MEASURES) and all(low <= high for low, high in bounds.values())
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise RunError(f"{path} is not what a run wrote there: run the prepare flow on this run folder again")
    return LungBounds(bounds, found["segmenter"], found["n"])
