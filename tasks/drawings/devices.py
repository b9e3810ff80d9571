"""Draws medical devices on a chest X-ray and returns the mask of what it drew.

Four kinds are drawn, in the order of `KINDS`: ECG electrodes with their leads, thin lines (central, peripheral and
umbilical catheters, loose wires), double-walled tubes (endotracheal, gastric, chest drain, loose tubing), and clips
(lead clips, safety pins, sternal wires, surgical clips). A device attenuates: it is screened over the image
(`1 - (1 - image) * (1 - density)`), so that anatomy and noise stay visible through it and bright tissue hides it,
as on film. Sizes are those of a child's chest that fills the picture (about 0.9 mm a pixel at 256 px).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter

KINDS: tuple[str, ...] = ("electrode", "line", "tube", "clip")

MIN_SIDE_PX = 64
CONSPICUOUS = 2.5
"""Strength of conspicuous devices."""

MASKED_DENSITY = 0.03
"""A pixel whose brightness a device may change by more than this belongs to the mask."""

_REFERENCE_SIDE_PX = 256
# How often kinds occur together among children with devices; in all, electrode 0.45, tube 0.47, line 0.38, clip 0.25.
_COMBINATIONS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("electrode",), 0.22),
    (("tube",), 0.10),
    (("line",), 0.11),
    (("clip",), 0.12),
    (("tube", "line"), 0.11),
    (("electrode", "tube"), 0.09),
    (("electrode", "tube", "line"), 0.06),
    (("electrode", "line"), 0.05),
    (("tube", "clip"), 0.05),
    (("electrode", "clip"), 0.03),
    (("line", "tube", "clip"), 0.03),
    (("line", "clip"), 0.02),
)

Floats = NDArray[np.float32]
Point = tuple[float, float]


def draw_devices(
    image: np.ndarray, kinds: Sequence[str], rng: np.random.Generator, strength: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Draws devices of the given kinds on a copy of an X-ray.

    Args:
        image: float32 `(height, width, 1)`, 0.0 black to 1.0 white, at least 64 px on each side. Not modified.
        kinds: names from `KINDS`; one name may stand for several pieces (two or three electrodes with their leads).
        rng: decides pieces, places, sizes and contrast.
        strength: multiplies the contrast, above 0; 1.0 spans the range from barely visible to metal.

    Returns:
        The image with devices, in the shape and range of `image`, and the mask, uint8 `(height, width)`: 0 where
        there is no device, `k + 1` where there is `KINDS[k]` (a clip hides a tube, a tube a line, a line an electrode).

    Raises:
        ValueError: an unknown kind, a wrong shape or type, a side below 64 px, or a strength that is not above 0.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"unknown kind of device {unknown[0]!r}: choose among {', '.join(KINDS)}")
    if image.ndim != 3 or image.shape[2] != 1 or min(image.shape[:2]) < MIN_SIDE_PX:
        raise ValueError(
            f"image has shape {image.shape}: expected (height, width, 1), each side {MIN_SIDE_PX} px or more"
        )
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"image is {image.dtype}: expected float32 from 0.0 (black) to 1.0 (white)")
    if not strength > 0:
        raise ValueError(f"strength is {strength}: expected a number above 0")

    drawn = image[:, :, 0].astype(np.float32)
    mask = np.zeros(drawn.shape, np.uint8)
    scene = _find_scene(drawn)
    # A camera and its processing sharpen and blur every device of one picture alike.
    blur_px = float(rng.uniform(0.35, 0.65)) * max(1.0, scene.scale**0.8)
    overshoot = float(rng.uniform(0.0, 0.15))
    for value, kind in enumerate(KINDS, start=1):
        if kind in kinds:
            for film, contrast in _DRAWERS[kind](scene, rng):
                here, density, footprint = film.develop(min(contrast * strength, 0.97), blur_px, overshoot)
                drawn[here] += np.where(density > 0, 1 - drawn[here], drawn[here]) * density
                mask[here][footprint | (np.abs(density) > MASKED_DENSITY)] = value
    return np.clip(drawn, 0.0, 1.0)[:, :, np.newaxis], mask


def pick_kinds(rng: np.random.Generator) -> tuple[str, ...]:
    """Picks 1 to 3 kinds that occur together as often as in the public archive, in the order of `KINDS`."""
    weights = np.array([weight for _, weight in _COMBINATIONS])
    chosen = _COMBINATIONS[int(rng.choice(len(weights), p=weights / weights.sum()))][0]
    return tuple(kind for kind in KINDS if kind in chosen)


class _Film:
    """A supersampled surface on which one device is drawn: its density relative to its contrast, and its footprint.

    Coordinates and widths are pixels of the image, `(x, y)`; values run from 0.0 (air) to 1.0 (the densest part).
    """

    def __init__(self, height: int, width: int) -> None:
        self.factor = 4 if max(height, width) <= 400 else 2
        size = (width * self.factor, height * self.factor)
        self.density, self.footprint = Image.new("L", size), Image.new("L", size)
        self._pens = ImageDraw.Draw(self.density), ImageDraw.Draw(self.footprint)

    def _points(self, points: ArrayLike) -> list[float]:
        return list((np.asarray(points, np.float64) * self.factor).ravel().tolist())

    def line(self, points: ArrayLike, width_px: float, value: float = 1.0) -> None:
        """A stroke through the points. A second, thinner stroke replaces the middle of a first: a lumen."""
        width = width_px * self.factor
        fill = round(255 * value * min(width, 1.0))
        for pen, ink in zip(self._pens, (fill, 255), strict=True):
            pen.line(self._points(points), fill=ink, width=max(1, round(width)), joint="curve")

    def shape(self, outline: ArrayLike, value: float = 1.0, hole: bool = False) -> None:
        """A filled polygon; a hole is drawn into the density, while the footprint stays whole."""
        self._pens[0].polygon(self._points(outline), fill=round(255 * value))
        if not hole:
            self._pens[1].polygon(self._points(outline), fill=255)

    def develop(
        self, contrast: float, blur_px: float, overshoot: float
    ) -> tuple[tuple[slice, slice], Floats, NDArray[np.bool_]]:
        """The part of the image that the device is in, its density there, and the pixels that it covers."""
        factor, margin = self.factor, 3 + int(np.ceil(4 * blur_px))
        box = self.footprint.getbbox() or (0, 0, 0, 0)
        x0, y0 = (max(0, edge // factor - margin) for edge in box[:2])
        ends = zip(box[2:], self.footprint.size, strict=True)
        x1, y1 = (min(side // factor, edge // factor + 1 + margin) for edge, side in ends)
        area = (x0 * factor, y0 * factor, x1 * factor, y1 * factor)
        density, footprint = (
            np.asarray(layer.crop(area).reduce(factor), np.float32) / 255 for layer in (self.density, self.footprint)
        )
        density = contrast * gaussian_filter(density, blur_px, truncate=3)
        # Edge enhancement of the detector leaves a thin dark rim around dense things.
        density += overshoot * np.minimum(density - gaussian_filter(density, 2.5 * blur_px, truncate=2), 0)
        return np.s_[y0:y1, x0:x1], density, footprint > 0.4


@dataclass(frozen=True)
class _Scene:
    """What placing a device needs of a picture: its size, the spine, and the edges of the body by height."""

    height: int
    width: int
    scale: float
    midline: float
    lefts: Floats
    rights: Floats

    def at(self, points: ArrayLike) -> NDArray[np.float64]:
        """Pixels `(n, 2)` of points given as fractions of width and height."""
        return np.atleast_2d(np.asarray(points, np.float64)) * (self.width, self.height)

    def span(self, y: float) -> tuple[float, float]:
        """Left and right edge of the body at height `y`, all as fractions."""
        row = min(max(int(y * len(self.lefts)), 0), len(self.lefts) - 1)
        return float(self.lefts[row]), float(self.rights[row])

    def film(self) -> _Film:
        return _Film(self.height, self.width)


Exposures = list[tuple[_Film, float]]


def _find_scene(plane: Floats) -> _Scene:
    height, width = plane.shape
    small = np.asarray(Image.fromarray(plane).resize((32, 32), Image.Resampling.BOX))
    profile = gaussian_filter(small[3:20].mean(axis=0), 1.5)
    midline = (11 + int(np.argmax(profile[11:21])) + 0.5) / 32
    body = small > 0.1 + 0.2 * float(np.quantile(small, 0.9))
    seen = body.any(axis=1)
    lefts = np.where(seen, body.argmax(axis=1) / 32, 0.1).astype(np.float32)
    rights = np.where(seen, 1 - body[:, ::-1].argmax(axis=1) / 32, 0.9).astype(np.float32)
    return _Scene(height, width, min(height, width) / _REFERENCE_SIDE_PX, midline, lefts, rights)


def _curve(knots: ArrayLike, n_points: int = 48) -> NDArray[np.float64]:
    """A smooth curve `(n_points, 2)` through the knots, spaced by the distance between them."""
    points = np.asarray(knots, np.float64)
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T) + 1e-6)])
    curve: NDArray[np.float64] = CubicSpline(along, points, bc_type="natural")(np.linspace(0, along[-1], n_points))
    return curve


def _oval(centre: ArrayLike, radii: ArrayLike, angle: float = 0.0) -> NDArray[np.float64]:
    turn = np.linspace(0, 2 * np.pi, 40)
    return _place(np.stack([np.cos(turn), np.sin(turn)], axis=1) * np.asarray(radii), centre, angle)


def _place(outline: ArrayLike, centre: ArrayLike, angle: float) -> NDArray[np.float64]:
    """Turns an outline around its origin by `angle` (radians) and moves it to `centre`."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.asarray(np.asarray(outline) @ np.array([[cos, sin], [-sin, cos]]) + np.asarray(centre), np.float64)


def _draw_electrodes(scene: _Scene, rng: np.random.Generator) -> Exposures:
    """One to three alike, about half of them with leads."""
    centres = _place_electrodes(scene, rng)
    radius = scene.scale * rng.uniform(3.8, 7.2)
    style = rng.choice(["snap", "ring", "pad"], p=[0.5, 0.28, 0.22])
    metal = float(rng.uniform(0.25, 0.8))
    exposures = [_draw_leads(scene, centres, metal, rng)] if rng.random() < 0.55 else []
    pads, snaps = scene.film(), scene.film()
    for centre in scene.at(centres):
        # Seen from the side on a shoulder or flank, a round electrode is an upright ellipse.
        radii = radius * rng.uniform((0.55, 0.95), (1.0, 1.15))
        angle = rng.normal(0, 0.3)
        if style == "pad":
            pads.shape(_oval(centre, radii * rng.uniform(2.0, 2.8), angle))
            disks = [(0.75, 0.8), (0.35, 1.0)]
        elif style == "ring":
            disks = [(1.1, 0.95), (0.72, rng.uniform(0.35, 0.6)), (0.38, 0.9), (0.16, 0.55)]
        else:
            disks = [(1.0, rng.uniform(0.55, 0.75))]
        for share, value in disks:
            snaps.shape(_oval(centre, radii * share, angle), value)
        if style == "snap":
            snaps.shape(_oval(centre + radius * rng.normal(0, 0.12, 2), radii * (0.55, 0.5), angle))
    return [*exposures, (pads, float(rng.uniform(0.06, 0.16))), (snaps, metal)]


def _place_electrodes(scene: _Scene, rng: np.random.Generator) -> list[Point]:
    """Centres of one to three, as fractions of width and height: mostly shoulders, else flanks and belly."""
    n_pieces = int(rng.choice([1, 2, 3], p=[0.3, 0.42, 0.28]))
    first = int(rng.integers(2))
    centres = []
    for piece in range(n_pieces):
        side = -1 if (first + piece) % 2 else 1
        shoulder = rng.random() < (0.85 if piece < 2 else 0.25)
        y = rng.uniform(0.04, 0.28) if shoulder else rng.uniform(0.3, 0.95)
        left, right = scene.span(y)
        x = scene.midline + side * rng.uniform(0.2 if shoulder else 0.1, 0.46)
        centres.append((float(np.clip(x, left + 0.01, right - 0.01)), y))
    return centres


def _draw_leads(scene: _Scene, centres: list[Point], metal: float, rng: np.random.Generator) -> tuple[_Film, float]:
    """Leads that leave by the nearer side, or all together over the upper or lower edge."""
    leads, exit_side = scene.film(), rng.uniform(-0.1, 1.1)
    for x, y in centres:
        end = (-0.05 if x < 0.5 else 1.05, y + rng.normal(0.1, 0.25))
        if rng.random() < 0.45:
            end = (exit_side + rng.normal(0, 0.04), 1.05 if y > 0.5 or rng.random() < 0.4 else -0.05)
        middle = (np.array([x, y]) + end) / 2 + rng.normal(0, 0.06, 2)
        leads.line(_curve(scene.at([(x, y), tuple(middle.tolist()), end])), scene.scale * rng.uniform(0.8, 1.6))
    return leads, float(rng.uniform(0.1, 0.35)) * (0.5 + metal)


def _draw_lines(scene: _Scene, rng: np.random.Generator) -> Exposures:
    """One or two catheters or loose wires: smooth, thin, faint to dense."""
    exposures: Exposures = []
    for _ in range(1 if rng.random() < 0.65 else 2):
        film, middle = scene.film(), scene.midline
        side = -1 if rng.random() < 0.65 else 1
        route = rng.choice(["neck", "arm", "umbilical", "loose", "beside"], p=[0.38, 0.2, 0.08, 0.22, 0.12])
        tip = (middle - rng.uniform(0.0, 0.08), rng.uniform(0.3, 0.55))
        if route == "neck":
            start = (middle + side * rng.uniform(0.03, 0.2), -0.03)
            knots = [start, (middle + side * rng.uniform(0.02, 0.07), rng.uniform(0.12, 0.2)), tip]
        elif route == "arm":
            y = rng.uniform(0.02, 0.25)
            bend = (middle + side * rng.uniform(0.08, 0.16), y + rng.uniform(0.0, 0.06))
            far = (middle + side * 0.32, y - rng.uniform(0.0, 0.06))
            knots = [(0.5 + side * 0.54, y + rng.uniform(-0.1, 0.15)), far, bend, tip]
        elif route == "umbilical":
            x = middle + rng.normal(0, 0.03)
            knots = [(x + rng.normal(0, 0.06), 1.03), (x, 0.85), (x + rng.normal(0, 0.01), rng.uniform(0.4, 0.7))]
        elif route == "loose":
            x, drift = rng.uniform(0.05, 0.95), rng.normal(0, 0.2)
            knots = [(x, -0.03), (x + 0.3 * drift, 0.35), (x + drift, 0.7), (x + drift + rng.normal(0, 0.2), 1.03)]
        else:  # outside the body, down one side
            x = np.clip(middle + side * rng.uniform(0.38, 0.46), 0.03, 0.97)
            knots = [(x, -0.03), (x + rng.normal(0, 0.04), 0.4), (0.5 + side * 0.54, rng.uniform(0.6, 1.0))]
        width_px = scene.scale * rng.uniform(1.0, 2.4)
        film.line(_curve(scene.at(knots)), width_px)
        if route == "loose" and rng.random() < 0.3:
            loop = _oval((knots[1][0] + 0.05, 0.4), (rng.uniform(0.03, 0.09), rng.uniform(0.03, 0.09)))
            film.line(scene.at(loop), width_px)
        exposures.append((film, float(rng.uniform(0.1, 0.45))))
    return exposures


def _draw_tubes(scene: _Scene, rng: np.random.Generator) -> Exposures:
    """One or two double-walled tubes; the wall is seen twice, edge-on, and a stripe may be denser than both."""
    exposures: Exposures = []
    n_tubes = 1 if rng.random() < 0.6 else 2
    routes = rng.choice(["tracheal", "gastric", "drain", "loose"], n_tubes, replace=False, p=[0.4, 0.34, 0.12, 0.14])
    for route in routes:
        film, middle = scene.film(), scene.midline
        side = -1 if rng.random() < 0.5 else 1
        if route == "tracheal":
            x = middle + rng.normal(0, 0.02)
            knots = [(x + rng.normal(0, 0.06), -0.03), (x, 0.12), (x + rng.normal(0, 0.012), rng.uniform(0.2, 0.36))]
            width_px = rng.uniform(4.0, 7.5)
        elif route == "gastric":
            x = middle + rng.normal(0, 0.02)
            knots = [(x + rng.normal(0, 0.04), -0.03), (x, 0.3), (x + rng.normal(0.01, 0.015), 0.62)]
            turn = (middle + rng.uniform(0.05, 0.15), rng.uniform(0.78, 0.88))
            knots += [turn, (turn[0] + rng.normal(0.05, 0.08), 1.03)] if rng.random() < 0.75 else [turn]
            width_px = rng.uniform(2.4, 4.2)
        elif route == "drain":
            y = rng.uniform(0.45, 0.85)
            knots = [(0.5 + side * 0.54, y + rng.uniform(-0.1, 0.2)), (middle + side * 0.33, y)]
            knots.append((middle + side * rng.uniform(0.15, 0.28), y - rng.uniform(0.1, 0.35)))
            width_px = rng.uniform(4.0, 7.5)
        else:
            x = np.clip(middle + side * rng.uniform(0.25, 0.46), 0.03, 0.97)
            knots = [(x, -0.03), (x + rng.normal(0, 0.06), rng.uniform(0.3, 0.5)), (x + rng.normal(0, 0.15), 1.03)]
            width_px = rng.uniform(3.0, 6.0)
        path = _curve(scene.at(knots))
        width_px *= scene.scale
        wall_px = max(0.8 * scene.scale, width_px * rng.uniform(0.14, 0.22))
        has_stripe = rng.random() < 0.45
        wall = 0.4 if has_stripe else 1.0
        film.line(path, width_px, wall)
        film.line(path, width_px - 2 * wall_px, wall * rng.uniform(0.25, 0.5))
        if has_stripe:
            film.line(_offset(path, side * 0.28 * width_px), max(scene.scale, 0.2 * width_px))
        exposures.append((film, float(rng.uniform(0.14, 0.5))))
    return exposures


def _offset(path: NDArray[np.float64], distance_px: float) -> NDArray[np.float64]:
    """The parallel of a path at a distance, to its left when positive."""
    step = np.gradient(path, axis=0)
    normal = np.stack([-step[:, 1], step[:, 0]], axis=1) / np.maximum(np.hypot(*step.T), 1e-6)[:, np.newaxis]
    return np.asarray(path + distance_px * normal)


def _draw_clips(scene: _Scene, rng: np.random.Generator) -> Exposures:
    """Lead clips and safety pins near the edge, or wires and small clips of an operation in the middle: dense metal."""
    film, scale = scene.film(), scene.scale
    style = rng.choice(["lead", "pin", "sternal", "surgical"], p=[0.5, 0.16, 0.24, 0.1])
    if style == "sternal":
        y, gap = rng.uniform(0.12, 0.25), rng.uniform(0.09, 0.13)
        for row in range(int(rng.integers(2, 6))):
            centre = scene.at((scene.midline + rng.normal(0, 0.012), y + row * gap))[0]
            angle, radii = rng.normal(0, 0.15), (rng.uniform(5.0, 8.0) * scale, rng.uniform(1.6, 3.6) * scale)
            film.line(_oval(centre, radii, angle), rng.uniform(0.9, 1.3) * scale)
            twist = _place([(0.1, 0.0), (rng.uniform(1.0, 1.7), rng.uniform(-0.4, 0.4))], (0, 0), angle) * radii[0]
            film.line(centre + twist, 1.8 * scale)
    elif style == "surgical":
        middle = scene.at((scene.midline + rng.normal(0.02, 0.08), rng.uniform(0.3, 0.65)))[0]
        for _ in range(int(rng.integers(1, 5))):
            bar = _place([(-1, 0), (1, 0)], (0, 0), rng.uniform(0, np.pi)) * rng.uniform(1.5, 3.2) * scale
            film.line(bar + middle + rng.normal(0, 9, 2) * scale, 1.6 * scale)
    else:
        for _ in range(1 if rng.random() < 0.6 else 2):
            side = -1 if rng.random() < 0.45 else 1
            spot = (0.5 + side * rng.uniform(0.36, 0.5), rng.uniform(0.02, 0.35))
            if rng.random() < 0.25:
                spot = (rng.uniform(0.1, 0.9), rng.uniform(0.55, 0.97))
            draw = _draw_lead_clip if style == "lead" else _draw_pin
            draw(film, scene.at(spot)[0], scale * rng.uniform(0.75, 1.3), rng)
    return [(film, float(rng.uniform(0.45, 0.95)))]


def _draw_lead_clip(film: _Film, centre: NDArray[np.float64], scale: float, rng: np.random.Generator) -> None:
    """A sprung clip from above: two jaws and a coil in a rounded frame with dark windows, and its wire."""
    angle = rng.uniform(0, 2 * np.pi)
    length, breadth = rng.uniform(8, 12) * scale, rng.uniform(4, 6.5) * scale
    corners = [(-1, -0.5), (-0.5, -1), (0.5, -0.8), (1, -0.25), (1, 0.25), (0.5, 0.8), (-0.5, 1), (-1, 0.5)]
    frame = np.array(corners) * (length, breadth)
    wire = [(length, 0), (1.7 * length, rng.normal(0, 5) * scale), (3.0 * length, rng.normal(0, 14) * scale)]
    film.line(_place(_curve(wire, 24), centre, angle), 1.3 * scale, 0.6)
    film.shape(_place(frame, centre, angle), 1.0)
    shrink = rng.uniform(0.62, 0.76)
    film.shape(_place(frame * shrink, centre, angle), rng.uniform(0.1, 0.3), hole=True)
    film.line(_place([(-0.95 * length, 0), (0.9 * length, 0)], centre, angle), 0.18 * length, 1.0)
    spring, eye = _place([(rng.uniform(-0.4, 0.3) * length, 0) for _ in range(2)], centre, angle)
    film.shape(_oval(spring, (0.42 * breadth,) * 2), 0.95)
    film.shape(_oval(eye, (0.2 * breadth,) * 2), 0.2, hole=True)


def _draw_pin(film: _Film, centre: NDArray[np.float64], scale: float, rng: np.random.Generator) -> None:
    """A safety pin or the long sprung loop of a cable clip: a narrow loop with a dense head."""
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(9, 15) * scale
    gap = rng.uniform(0.15, 0.3) * length
    loop = [(-length, 0), (-0.6 * length, gap), (0.3 * length, 0.7 * gap), (length, 0.3 * gap)]
    back = [(-length, 0), (-0.6 * length, -gap), (0.3 * length, -0.7 * gap), (length, -0.3 * gap)]
    for arm in (loop, back):
        film.line(_place(_curve(arm, 24), centre, angle), 1.4 * scale)
    film.shape(_oval(_place([(length, 0)], centre, angle)[0], (2.6 * scale, 1.8 * scale), angle))
    film.line(_oval(_place([(-length, 0)], centre, angle)[0], (1.8 * scale,) * 2), scale)


_DRAWERS = dict(zip(KINDS, (_draw_electrodes, _draw_lines, _draw_tubes, _draw_clips), strict=True))
