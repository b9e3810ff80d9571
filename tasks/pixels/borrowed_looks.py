"""Borrowed looks: each X-ray as it would look from the machine, or the series, of a donor of the other class.

Looks go with classes in many archives. A network that takes the look for the class changes its answer under these.
They are shifts as those of ``tasks.pixels.shifts``. Each of ``LOOKS`` maps images and their donors, packed uint8
``(n, side, side)``, with the places of their lungs, bool of that shape, to changed images.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn, idctn
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter

from tasks.pixels.covering import Packed, Places, cover, find_lungs, widen_lungs
from tasks.pixels.shifts import BORDER, SHIFTS

FINE = 1 / 8
"""Share of the highest frequency from which on power is noise and sharpness rather than anatomy."""
LOW = 2
"""Cycles in an image up to which amplitudes are exchanged; more would exchange the disease too."""
BLACK = 8
TONES = (0.25, 0.5, 0.75)


def pick_donors(labels: NDArray[np.float64], lends: NDArray[np.bool_], seed: int) -> NDArray[np.int64]:
    """For each image a random one of the other class that lends its look, or else itself; ``(n,)`` each."""
    rng, donors = np.random.default_rng([seed, 31]), np.arange(len(labels))
    for label in (0, 1):
        mine, others = np.flatnonzero(labels == label), np.flatnonzero((labels != label) & lends)
        if len(others):
            donors[mine] = rng.choice(others, len(mine))
    return donors


def _detail(image: Packed, donor: Packed, *_: Places) -> NDArray[np.float64]:
    """Gives the power above FINE, ring by ring of frequencies, that of the donor; amplitudes at most fourfold.

    By a cosine transform, in which, unlike in Fourier's, opposite edges are no step.
    """
    at = np.arange(len(image)) / 2
    cycles = np.hypot(at[:, None], at[None, :])
    rings = np.minimum(np.rint(cycles).astype(int), len(image) // 2)
    found, wanted = (np.bincount(rings.ravel(), (dctn(each.astype(float)) ** 2).ravel()) for each in (image, donor))
    gain = np.clip(np.sqrt(wanted / np.maximum(found, 1e-9)), 1 / 4, 4)
    fine = np.clip((cycles - FINE * len(image) / 2) / 8, 0, 1)  # comes in over 8 cycles, or edges would ring
    return np.asarray(idctn(dctn(image.astype(float)) * (1 + fine * (gain[rings] - 1))))


def _low_frequencies(image: Packed, donor: Packed, *_: Places) -> NDArray[np.float64]:
    """Exchanges the lowest amplitudes (Yang & Soatto 2020, Fourier domain adaptation); phases stay."""
    at = np.fft.fftfreq(len(image)) * len(image)
    own, other = np.fft.fft2(image), np.fft.fft2(donor)
    amplitude = np.where(np.hypot(at[:, None], at[None, :]) <= LOW, np.abs(other), np.abs(own))
    return np.asarray(np.fft.ifft2(amplitude * np.exp(1j * np.angle(own))).real)


def _tones(image: Packed, donor: Packed, lungs: Places, donors_lungs: Places) -> NDArray[np.float64]:
    """Maps greys by one smooth curve, which brings those outside of the lungs to where the donor's lie there.

    A few shares only are met, without the black around a picture: a closer match cuts greys off that lungs alone have.
    """
    outside = [grey[~inside & (grey > BLACK)] for grey, inside in ((image, lungs), (donor, donors_lungs))]
    if not all(len(greys) for greys in outside):
        return image.astype(float)
    # A little apart, as a curve asks.
    own, other = (np.quantile(greys, TONES).clip(BLACK, 255 - BLACK) + np.arange(len(TONES)) for greys in outside)
    return np.asarray(PchipInterpolator([0, *own, 260], [0, *other, 260])(image))


def _frame(image: Packed, donor: Packed, lungs: Places, donors_lungs: Places) -> NDArray[np.float64]:
    """Puts the lungs, with a soft edge, on what lies outside of the donor's."""
    outside = cover(donor[None], donors_lungs[None])[0]
    inside = gaussian_filter(lungs.astype(float), 2)
    return inside * image + (1 - inside) * outside


def _border(image: Packed, donor: Packed, *_: Places) -> NDArray[np.float64]:
    """Puts the donor's outer 3/28 around the image."""
    width, changed = round(BORDER * len(image)), donor.astype(float)
    changed[width:-width, width:-width] = image[width:-width, width:-width]
    return changed


Look = Callable[[Packed, Packed, Places, Places], Packed]


def _of_each(change: Callable[..., NDArray[np.float64]], by_lungs: bool = False) -> Look:
    """The same for many images. Where the look goes by lungs, an image without them stays as it is."""

    def look(packed: Packed, donors: Packed, lungs: Places, donors_lungs: Places) -> Packed:
        changed = packed.copy()
        able = find_lungs(lungs) & find_lungs(donors_lungs) if by_lungs else np.ones(len(packed), bool)
        for i in np.flatnonzero(able):
            changed[i] = np.clip(np.rint(change(packed[i], donors[i], lungs[i], donors_lungs[i])), 0, 255)
        return changed

    return look


LOOKS: dict[str, Look] = {
    "detail of the other class": _of_each(_detail),
    "tones of the other class": _of_each(_tones, by_lungs=True),
    "low frequencies of the other class": _of_each(_low_frequencies),
    "frame of the other class": _of_each(_frame, by_lungs=True),
    "border of the other class": _of_each(_border),
}
"""Name of a look, for people -> its function."""
N_CONDITIONS = len(SHIFTS) + len(LOOKS)


def vary_conditions(
    packed: Packed, labels: NDArray[np.float64], masks: Packed, seed: int
) -> Iterator[tuple[str, Packed]]:
    """Validation as it is, under each shift, and in each look of the other class, with the name of each.

    Args:
        packed: The images, uint8 ``(n, side, side)``, on which no network is trained: they lend looks, too.
        labels: 0 or 1, ``(n,)``.
        masks: Their lungs, as the images; those without keep their tones and their frame, and lend no look.
        seed: Picks the donors.
    """
    for name, shift in SHIFTS.items():
        yield name, shift(packed)
    lungs = widen_lungs(masks)
    donors = pick_donors(labels, find_lungs(lungs), seed)
    for name, look in LOOKS.items():
        yield name, look(packed, packed[donors], lungs, lungs[donors])
