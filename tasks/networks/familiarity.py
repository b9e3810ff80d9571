"""Familiarity: whether an image looks like the chest X-rays a network was trained on, without asking the network.

A network scores every image, even a photo of a cat. This check compares the edges of an image with those of the run's
images. An image is described by a coarse histogram of oriented gradients (Dalal & Triggs 2005, CVPR). Its distance from
the others has two parts: from their mean within the directions in which they differ, and outside of these directions
(Moghaddam & Pentland 1997, IEEE TPAMI 19:696). A third part detects images that are upside down, which the other two
often miss. A familiar image is of that kind; it need not be well exposed, in focus or easy.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.errors import RunError
from tasks.files import BROKEN, open_whole
from tasks.pixels.greys import SIDE_PX

FILE = "familiar.npz"
SMALL_PX = 56
CELLS = 7
DIRECTIONS = 8
N_NUMBERS = CELLS * CELLS * DIRECTIONS
MAX_AXES = 60
IMAGES_PER_AXIS = 3
TURNED_WEIGHT = 0.25

FOLDS = 10
REFUSED_SHARE = 1 / 1000  # of images like those the check was fitted on
REFUSED_Z, CONFIDENCE_Z = 3.0902, 2.3263  # of the normal distribution at 0.999 and 0.99
MARGIN = 1.1  # for what training leaves out but use meets: medical devices, other machines
MIN_IMAGES = 20  # with fewer, what is usual is unknown, and nothing is refused

# About as much as training turns, scales and shifts images, which is no reason to refuse one.
TURN_DEGREES, SCALE, SHIFT = 10.0, 0.12, 0.06
_BATCH = 256


@dataclass(frozen=True, eq=False)
class Familiarity:
    """Statistics of the images a network was trained on.

    Attributes:
        mean: float32 ``(392,)``, the mean description.
        axes: float32 ``(392, k)``, the directions in which descriptions differ most.
        spreads: float32 ``(k,)``, the standard deviation along each of them.
        rest: float32 ``()``, the mean squared distance outside of these directions.
        turned: float32 ``(k,)``, the direction, in units of ``spreads``, in which images go when turned upside down.
        bound: Beyond this distance an image counts as unfamiliar; ``inf`` if there were too few images.
    """

    mean: NDArray[np.float32]
    axes: NDArray[np.float32]
    spreads: NDArray[np.float32]
    rest: NDArray[np.float32]
    turned: NDArray[np.float32]
    bound: float

    def distances(self, packed: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Distance of each image from the others; 1 is usual.

        Args:
            packed: uint8 ``(n, 224, 224)``.

        Returns:
            float64 ``(n,)``, 0 or more. An image's distance does not depend on the others it comes with.
        """
        if not len(packed):
            return np.empty(0)
        return np.concatenate([self._measure(describe_images(small)) for small in _shrink(packed)])

    def _measure(self, described: NDArray[np.float32]) -> NDArray[np.float64]:
        """Distances of described images, float32 ``(n, 392)`` -> float64 ``(n,)``."""
        centred = described - self.mean.astype(np.float64)
        # einsum, not @: a matrix product may round a row differently when it has more rows.
        along = np.einsum("nd,dk->nk", centred, self.axes.astype(np.float64))
        outside = np.maximum((centred**2).sum(1) - (along**2).sum(1), 0.0) / self.rest
        scaled = along / self.spreads
        upside_down = np.maximum(np.einsum("nk,k->n", scaled, self.turned.astype(np.float64)), 0.0)
        return np.sqrt(((scaled**2).mean(1) + outside + TURNED_WEIGHT * upside_down**2) / 2)


def fit_familiarity(batches: Iterable[NDArray[np.uint8]], seed: int | Sequence[int]) -> Familiarity:
    """Fits the statistics of images and the bound.

    A slightly turned, scaled and shifted copy of each image is added, so that framing alone is no reason to refuse. The
    bound comes from images that were held out in turn, in blocks of neighbours, because neighbouring rows are often of
    one child.

    Args:
        batches: uint8 ``(n, 224, 224)`` each, the images a network was trained on; read once, in order.
        seed: Seed of the copies, one number or several.

    Raises:
        ValueError: If there is no image.
    """
    rng = np.random.default_rng(seed)
    small = (s for packed in batches for s in _shrink(packed))
    parts = [(describe_images(s), describe_images(_vary(s, rng)), describe_images(s[:, ::-1])) for s in small]
    if not parts:
        raise ValueError("no image to be familiar with")
    usual, varied, turned = (np.concatenate(each) for each in zip(*parts, strict=True))
    bound = float("inf")
    if len(usual) >= MIN_IMAGES:
        held_out = []
        for block in np.array_split(np.arange(len(usual)), FOLDS):
            rest = np.setdiff1d(np.arange(len(usual)), block)
            held_out.append(_learn(usual[rest], varied[rest], turned[rest], bound)._measure(usual[block]))
        bound = choose_bound(np.concatenate(held_out))
    return _learn(usual, varied, turned, bound)


def choose_bound(distances: NDArray[np.float64]) -> float:
    """The distance that at most about one in a thousand images of the same kind exceeds, whatever their number.

    Logarithms of distances are close to normal; the bound is a one-sided tolerance limit for them at 99 % confidence
    (NIST/SEMATECH e-Handbook of Statistical Methods, 7.2.6.3), never below what all but one in a thousand of the images
    show, and wider by ``MARGIN``. The fewer the images, the wider it is.

    Args:
        distances: float64 ``(n,)``, 3 or more, of images that were held out.
    """
    n, logs = len(distances), np.log(np.maximum(distances, 1e-6))
    a = 1 - CONFIDENCE_Z**2 / (2 * (n - 1))
    b = REFUSED_Z**2 - CONFIDENCE_Z**2 / n
    factor = (REFUSED_Z + np.sqrt(REFUSED_Z**2 - a * b)) / a
    seen = np.quantile(distances, 1 - REFUSED_SHARE, method="higher")
    return float(MARGIN * max(np.exp(logs.mean() + factor * logs.std(ddof=1)), seen))


def describe_images(small: NDArray[np.float32]) -> NDArray[np.float32]:
    """Describes the edges in each part of an image, independent of its brightness and contrast.

    Args:
        small: float32 ``(n, 56, 56)``, 0 to 255.

    Returns:
        float32 ``(n, 392)``: for 7 x 7 cells the square root of the mean gradient in 8 directions over the full
        circle, dark to bright unlike bright to dark.
    """
    contrast = small.std((1, 2))[:, None, None] + 1.0  # a blank image has none
    right, down = np.zeros_like(small), np.zeros_like(small)
    right[:, :, 1:-1] = (small[:, :, 2:] - small[:, :, :-2]) / contrast
    down[:, 1:-1] = (small[:, 2:] - small[:, :-2]) / contrast
    strength = np.hypot(right, down)
    angle = np.arctan2(down, right) % (2 * np.pi) * (DIRECTIONS / (2 * np.pi))
    px = SMALL_PX // CELLS
    counted = np.empty((len(small), CELLS, CELLS, DIRECTIONS), np.float32)
    for direction in range(DIRECTIONS):
        away = np.abs(angle - direction)
        share = np.maximum(1.0 - np.minimum(away, DIRECTIONS - away), 0.0)
        counted[..., direction] = (strength * share).reshape(-1, CELLS, px, CELLS, px).mean((2, 4))
    return np.sqrt(counted).reshape(len(small), N_NUMBERS)


def save_familiarity(familiarity: Familiarity, folder: Path) -> None:
    """Writes ``familiar.npz`` into a folder, whole or not at all; the same numbers give the same bytes."""
    with open_whole(folder / FILE) as stream:
        np.savez(
            stream, allow_pickle=False, **{each.name: getattr(familiarity, each.name) for each in fields(Familiarity)}
        )


def load_familiarity(folder: Path) -> Familiarity:
    """Reads ``familiar.npz`` of a run.

    Raises:
        RunError: If it is missing, damaged, or not such a file.
    """
    path = folder / FILE
    if not path.exists():
        raise RunError(f"{path} is missing: run the train flow on this run folder first")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            found = {each.name: np.asarray(file[each.name]) for each in fields(Familiarity)}
    except BROKEN:
        found = {}
    if not _fits(found):
        raise RunError(f"{path} is not what the train flow wrote: remove it and run the train flow on this run folder")
    bound = float(found.pop("bound"))
    return Familiarity(bound=bound, **{name: values.astype(np.float32) for name, values in found.items()})


def _fits(found: dict[str, NDArray[np.float32]]) -> bool:
    """Whether arrays are numbers, have the shapes of a `Familiarity`, and can measure a distance."""
    if not found or any(values.dtype.kind != "f" for values in found.values()):
        return False
    k = found["spreads"].size
    shapes = {"mean": (N_NUMBERS,), "axes": (N_NUMBERS, k), "spreads": (k,), "rest": (), "turned": (k,), "bound": ()}
    if not k or any(found[name].shape != shape for name, shape in shapes.items()):
        return False
    finite = all(np.isfinite(values).all() for name, values in found.items() if name != "bound")
    return bool(finite and found["bound"] > 0 and found["rest"] > 0 and (found["spreads"] > 0).all())


def _learn(
    usual: NDArray[np.float32], varied: NDArray[np.float32], turned: NDArray[np.float32], bound: float
) -> Familiarity:
    """Fits all but the bound to descriptions of images, their copies, and the images upside down, ``(n, 392)`` each."""
    together = np.concatenate([usual, varied]).astype(np.float64)
    mean = together.mean(0)
    centred = together - mean
    variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    k = int(np.clip(len(usual) // IMAGES_PER_AXIS, 1, MAX_AXES))
    # Identical images have no spread; the floor is far below the spread of any two X-rays.
    axes, spreads = axes[:, : -k - 1 : -1], np.sqrt(np.maximum(variances[: -k - 1 : -1], 1e-6))
    rest = max(float(variances[:-k].sum()), 1e-6)
    upright, upside_down = (centred @ axes / spreads, (turned - mean) @ axes / spreads)
    return Familiarity(
        mean.astype(np.float32),
        axes.astype(np.float32),
        spreads.astype(np.float32),
        np.asarray(rest, np.float32),
        _direction_between(upright, upside_down).astype(np.float32),
        bound,
    )


def _direction_between(here: NDArray[np.float64], there: NDArray[np.float64]) -> NDArray[np.float64]:
    """The direction ``(k,)`` that best separates two groups ``(n, k)`` (Fisher 1936); deviation 1 in ``here``."""
    own, other = (c.T @ c / len(c) for c in (here - here.mean(0), there - there.mean(0)))
    both = own + other + 0.01 * np.eye(len(own))  # few images do not span all directions
    direction = np.linalg.solve(both, there.mean(0) - here.mean(0))
    return direction / np.sqrt(max(float(direction @ own @ direction), 1e-6))


def _shrink(packed: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
    """uint8 ``(n, 224, 224)`` -> float32 ``(at most 256, 56, 56)``, batch after batch: means of 4 x 4 pixels."""
    px = SIDE_PX // SMALL_PX
    for start in range(0, len(packed), _BATCH):
        rows = packed[start : start + _BATCH].reshape(-1, SMALL_PX, px, SIDE_PX).sum(2, dtype=np.uint16)
        summed = rows.reshape(-1, SMALL_PX, SMALL_PX, px).sum(3, dtype=np.uint16)
        yield summed.astype(np.float32) / np.float32(px * px)


def _vary(small: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """A copy of each image ``(n, 56, 56)``, a little turned, scaled and shifted; the outside is black."""
    from scipy.ndimage import affine_transform

    varied = np.empty_like(small)
    centre = np.full(2, (SMALL_PX - 1) / 2)
    for i, image in enumerate(small):
        angle = np.radians(rng.uniform(-TURN_DEGREES, TURN_DEGREES))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = turn * np.exp(rng.uniform(-SCALE, SCALE, 2))
        offset = centre - matrix @ centre + rng.uniform(-SHIFT, SHIFT, 2) * SMALL_PX
        varied[i] = affine_transform(image, matrix, offset, order=1)
    return varied
