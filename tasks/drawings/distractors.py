"""Draws distractors on a child's chest X-ray: things that look like medical devices but are none.

Bones, clavicle ends, gas, folds of skin and cloth, hands of an adult, borders, letters and text. Dense things are
screened over the image and gas is taken out of it, so that anatomy and noise stay visible. Sizes are reference
pixels: the shorter side of any picture measures 256 of them, about 0.9 mm each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter

DISTRACTORS = ("bone", "clavicle_end", "gas", "skin_fold", "cloth_fold", "hand", "collimation", "side_letter", "text")
"""In the order in which they are drawn: what is in the body, on it, before the film, on the film."""
MIN_SIDE_PX = 64

_REFERENCE_SIDE_PX = 256
_SHARP = 3.0  # pixels per reference pixel of a layer that is written on; soft things need fewer
_NOTHING = 128  # the grey of a layer that leaves the picture as it is
_WORDS = ("{}:{}:{}", "KV{}", "A-P", "mAs {}.{}", "PORTABLE", "{}.{}.20{}", "AP SUPINE", "S {}%", "ID {}{}{}")
Floats = NDArray[np.float32]
Points = NDArray[np.float64]
_font = lru_cache(maxsize=128)(ImageFont.load_default)


def draw_distractors(image: np.ndarray, rng: np.random.Generator, kinds: Sequence[str] | None = None) -> np.ndarray:
    """Draws things that are no medical devices on a copy of an X-ray.

    Args:
        image: float32 `(height, width, 1)`, 0.0 black to 1.0 white, at least 64 px on each side. Not modified.
        rng: decides kinds (unless given), places, sizes and contrast; the same seed gives the same bytes.
        kinds: names from `DISTRACTORS`, each drawn once, in that order; None draws one to three that `rng` chooses.

    Returns:
        The image with distractors, float32 in the shape and range of `image`.

    Raises:
        ValueError: an unknown kind, a wrong shape or type, or a side below 64 px.
    """
    unknown = [kind for kind in kinds or () if kind not in DISTRACTORS]
    if unknown:
        raise ValueError(f"unknown kind of distractor {unknown[0]!r}: choose among {', '.join(DISTRACTORS)}")
    has_room = image.ndim == 3 and image.shape[2] == 1 and min(image.shape[:2]) >= MIN_SIDE_PX
    if not has_room or not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"image is {image.dtype} {image.shape}: not float (height, width, 1), {MIN_SIDE_PX} px and up")
    chosen = rng.choice(DISTRACTORS, int(rng.integers(1, 4)), replace=False).tolist() if kinds is None else kinds
    scene = _find_scene(image[:, :, 0].astype(np.float32))
    for kind, draw in zip(DISTRACTORS, _DRAWERS, strict=True):
        if kind in chosen:
            draw(scene, rng)
    return np.clip(scene.plane, 0.0, 1.0)[:, :, np.newaxis]


@dataclass(frozen=True)
class _Scene:
    """A picture to draw on in place; in reference pixels its sides, spine's column, right dome's row, and centres."""

    plane: Floats
    scale: float
    width: float
    height: float
    midline: float
    dome: float
    columns: Floats
    rows: Floats


def _find_scene(plane: Floats) -> _Scene:
    scale = min(plane.shape) / _REFERENCE_SIDE_PX
    height, width = (side / scale for side in plane.shape)
    small = np.asarray(Image.fromarray(plane).resize((32, 32), Image.Resampling.BOX))
    middle = 11 + int(np.argmax(gaussian_filter(small[3:20].mean(axis=0), 1.5)[11:21]))
    lung = gaussian_filter(small[:, middle + 4 : middle + 9].mean(axis=1), 1.0)
    dome = (19 + int(np.argmax(np.diff(lung[18:28])))) / 32 * height  # below a lung the picture brightens
    rows, columns = ((np.arange(side, dtype=np.float32) + 0.5) / np.float32(scale) for side in plane.shape)
    return _Scene(plane, scale, width, height, (middle + 0.5) / 32 * width, dome, columns[None], rows[:, None])


class _Layer:
    """A small picture to draw on, laid over the whole scene or a part of it; polygons hide what is under them."""

    def __init__(self, scene: _Scene, size: tuple[float, float] | None = None, fineness: float = 0.6) -> None:
        width, height = size or (scene.width, scene.height)
        self.scene, self.fineness = scene, fineness
        self.ink = Image.new("L", (round(width * fineness) + 1, round(height * fineness) + 1), _NOTHING)
        self.pen = ImageDraw.Draw(self.ink)

    def shape(self, outline: ArrayLike, density: float) -> None:
        """A filled polygon of reference pixels; density from -1.0 (air) over 0.0 (nothing) to 1.0 (dense)."""
        self.pen.polygon((np.asarray(outline) * self.fineness).ravel().tolist(), fill=_NOTHING + round(127 * density))

    def expose(self, contrast: float, blur: float, corner: ArrayLike = (0, 0)) -> None:
        """Screens the layer over the picture in place, its upper left at `corner`."""
        sharp = (np.asarray(self.ink, np.float32) - _NOTHING) * np.float32(contrast / 127)
        columns, rows = (max(1, round(side * self.scene.scale / self.fineness)) for side in self.ink.size)
        soft = Image.fromarray(gaussian_filter(sharp, blur * self.fineness, truncate=3))
        x, y = np.round(np.asarray(corner) * self.scene.scale).astype(int).tolist()
        here = self.scene.plane[y : y + rows, x : x + columns]
        density = np.asarray(soft.resize((columns, rows), Image.Resampling.BILINEAR))[: len(here), : here.shape[1]]
        here += np.where(density > 0, 1 - here, here) * density


def _bend(knots: ArrayLike, n_points: int = 24) -> Points:
    """The Bezier curve `(n_points, 2)` of the knots: smooth, from the first to the last, drawn towards the others."""
    t, points = np.linspace(0, 1, n_points)[:, np.newaxis], np.asarray(knots, np.float64)[:, np.newaxis, :]
    while len(points) > 1:
        points = points[:-1] * (1 - t) + points[1:] * t
    return np.asarray(points[0])


def _ribbon(path: Points, half_width: float | Points) -> Points:
    """The outline of a band along a path, `half_width` (one, or one for each point) to both of its sides."""
    x, y = np.gradient(path, axis=0).T
    aside = (np.array([-y, x]) * (half_width / np.maximum(np.hypot(x, y), 1e-6))).T
    return np.concatenate([path + aside, (path - aside)[::-1]])


def _blob(centre: Points, radii: Points, rng: np.random.Generator) -> Points:
    """The outline of an oval, tilted a little and not quite regular."""
    turn, tilt = np.linspace(0, 2 * np.pi, 32, endpoint=False), rng.normal(0, 0.25)
    radius = 1 + sum(rng.normal(0, 0.05) * np.cos(k * turn + rng.uniform(0, 6.3)) for k in (2, 3, 4))
    x, y = np.stack([np.cos(turn), np.sin(turn)]) * radius * radii[:, np.newaxis]
    return centre + np.stack([x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)], axis=1)


def _add_bones(scene: _Scene, rng: np.random.Generator) -> None:
    """One to three neighbouring ribs, or the inner edge of a shoulder blade: broad, soft, brighter at the cortex."""
    layer, side, at = _Layer(scene), rng.choice([-1, 1]), (scene.midline, 0)
    if rng.random() < 0.5:
        x, y, out = rng.uniform(15, 30), rng.uniform(0.12, 0.5) * scene.height, rng.uniform(75, 105)
        drop, taper = rng.uniform(10, 45), rng.uniform(3.2, 5.0) * np.linspace(1.1, 0.8, 24)
        for _ in range(int(rng.integers(1, 4))):
            knots = [(side * x, y), (side * 0.5 * out, y - 11), (side * 1.05 * out, y), (side * out, y + drop)]
            layer.shape(_ribbon(_bend(knots) + at, taper), 1.0)
            layer.shape(_ribbon(_bend(knots) + at, taper - 1.7), 0.55)
            y, out = y + rng.uniform(20, 27), out + 4
    else:
        top, tip = rng.uniform((55, 20), (80, 50)), rng.uniform((70, 100), (90, 140))
        edge = _bend(np.array([top, (top + tip) / 2 - np.array([rng.uniform(0, 14), 0]), tip])) * (side, 1) + at
        back = _bend([tip, tip + np.array([12, -20]), np.array([tip[0] + 30, top[1] + 15]), top]) * (side, 1) + at
        layer.shape([*edge, *back], 0.35)
        layer.shape(_ribbon(edge, rng.uniform(1.8, 3.0) * np.sin(np.linspace(0.3, 2.9, 24))), 1.0)
    layer.expose(rng.uniform(0.16, 0.42), rng.uniform(1.3, 2.2))


def _add_ends(scene: _Scene, rng: np.random.Generator) -> None:
    """A disk or ring on one or both sides of the spine in the upper quarter, often with the stub of its clavicle."""
    layer, (y, gap, radius) = _Layer(scene), rng.uniform((0.09, 13, 3.8), (0.2, 26, 7.5))
    for side in [(-1, 1), (-1,), (1,)][int(rng.choice(3, p=[0.5, 0.25, 0.25]))]:
        centre = np.array((scene.midline + side * gap, y * scene.height)) + rng.normal(0, 3, 2)
        radii = radius * rng.uniform(0.8, 1.2, 2)
        if rng.random() < 0.6:
            stub = _bend([(0, 0), (side * 16, 3), (side * rng.uniform(22, 45), -rng.uniform(0, 12))])
            layer.shape(_ribbon(stub + centre, radius * np.linspace(0.75, 0.2, 24)), 0.45)
        layer.shape(_blob(centre, radii, rng), 1.0)
        if rng.random() < 0.6:
            layer.shape(_blob(centre, 0.55 * radii, rng), rng.uniform(0.2, 0.7))
    layer.expose(rng.uniform(0.28, 0.65), rng.uniform(1.3, 2.2))


def _add_gas(scene: _Scene, rng: np.random.Generator) -> None:
    """The stomach's bubble under the image's right dome, loops of bowel in the lower third, or both."""
    layer, style, rim, bubbles = _Layer(scene), rng.random(), rng.uniform(0.2, 0.5), []
    if style < 0.65:
        radii = rng.uniform((14, 9), (30, 18))
        y = max(scene.dome + rng.uniform(3, 10), 0.68 * scene.height) + radii[1]
        bubbles.append((np.array((scene.midline + rng.uniform(25, 65), min(y, scene.height - 8))), radii))
    if style > 0.4:
        x, y = scene.midline + rng.normal(0, 50), rng.uniform(0.8, 0.95) * scene.height
        for radius in rng.uniform(4, 12, int(rng.integers(3, 9))):
            y = float(np.clip(y, 0.7 * scene.height + radius, scene.height))
            bubbles.append((np.array((x, y)), radius * rng.uniform((0.9, 0.8), (1.4, 1.1))))
            x, y = x + rng.choice([-1, 1]) * radius * rng.uniform(1.2, 2.2), y + rng.normal(0, 8)
    for centre, radii in bubbles:
        outline = _blob(centre, radii, rng)
        layer.shape((outline - centre) * (1 + 3.0 / radii.min()) + centre, rim)
        layer.shape(outline, -rng.uniform(0.6, 1.0))
    layer.expose(rng.uniform(0.18, 0.5), rng.uniform(1.3, 2.4))


def _add_skin(scene: _Scene, rng: np.random.Generator) -> None:
    """A long edge over a lung: the picture brightens towards it and suddenly is as it was; never a line."""
    angle, side = rng.normal(0.15, 0.3), rng.choice([-1, 1])
    cos, sin = np.float32(np.cos(angle)), np.float32(side * np.sin(angle))
    x = scene.columns - np.float32(scene.midline + side * rng.uniform(35, 95))
    y = scene.rows - np.float32(rng.uniform(0.25, 0.7) * scene.height)
    along = (y * cos + x * sin) / np.float32(rng.uniform(50, 120))
    across = (x * cos - y * sin - along * along * np.float32(rng.normal(0, 9))) * np.float32(rng.choice([-1, 1]))
    edge, fall = (np.clip(across / np.float32(rng.uniform(*width)), 0, 1) for width in ((1.2, 3.2), (28, 60)))
    fold = edge * (1 - fall) ** 2 * np.clip(1 - along * along, 0, 1) * np.float32(rng.uniform(0.12, 0.35))
    scene.plane[:] += (1 - scene.plane) * fold


def _add_cloth(scene: _Scene, rng: np.random.Generator) -> None:
    """A broad band of cloth with two to five wrinkles along it, all soft and without a button."""
    layer, angle, taper = _Layer(scene), rng.uniform(0, np.pi), np.sin(np.linspace(0.05, 3.09, 24))
    forth, aside = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    centre = np.array([rng.uniform(0.05, 0.95) * scene.width, rng.choice([0.1, 0.75, 0.9]) * scene.height])
    bow, length, spacing, n_folds = rng.normal(0, 25), rng.uniform(50, 110), rng.uniform(9, 20), int(rng.integers(2, 6))
    band = _bend([centre - 1.2 * length * forth, centre + bow * aside, centre + 1.2 * length * forth])
    layer.shape(_ribbon(band, rng.uniform(0.5, 0.8) * spacing * n_folds * taper), 0.25)
    for fold in range(n_folds):
        at = centre + aside * ((fold - (n_folds - 1) / 2) * spacing + rng.normal(0, 3))
        reach, sway = length * rng.uniform(0.5, 1.1) * forth, rng.normal(0, 6) * aside
        path = _bend([at - reach, at + bow * aside + sway + rng.normal(0, 0.3) * reach, at + reach])
        layer.shape(_ribbon(path, rng.uniform(2.5, 7.0) * taper), rng.uniform(0.45, 1.0))
    layer.expose(rng.uniform(0.14, 0.38), rng.uniform(1.8, 3.6))


def _add_hand(scene: _Scene, rng: np.random.Generator) -> None:
    """Two to four fingers of an adult that come in over an edge, or a forearm across a corner."""
    layer, tissue, n_fingers, bones = _Layer(scene), rng.uniform(0.3, 0.5), int(rng.integers(2, 5)), []
    if rng.random() < 0.3:
        inward = rng.choice([-1, 1], 2)
        corner, far = np.where(inward > 0, 0, (scene.width, scene.height)), inward * rng.uniform(50, 105, 2)
        path = corner + _bend(far * np.array([(-0.3, 1), (0.55, 0.55), (1, -0.3)]))
        layer.shape(_ribbon(path, rng.uniform(17, 25)), tissue)
        bones = [(path + inward * offset, rng.uniform(4.0, 5.5)) for offset in ((-6, 6) if n_fingers > 2 else (0,))]
    else:
        edge = int(rng.choice(3, p=[0.35, 0.35, 0.3]))  # left, right, lower
        root = np.array([(0, 1, rng.uniform(0.05, 0.95))[edge], (*rng.uniform(0.1, 0.9, 2), 1)[edge]])
        angle, half, reach = (0, np.pi, -np.pi / 2)[edge] + rng.normal(0, 0.3), *rng.uniform((6, 35), (8, 70))
        for place in np.arange(n_fingers) - (n_fingers - 1) / 2:
            turn, length = angle + place * 0.07 + rng.normal(0, 0.03), reach * rng.uniform(0.9, 1.1) - 5 * abs(place)
            forth, aside = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
            base = root * (scene.width, scene.height) + aside * place * 2.15 * half
            bent = base + 0.4 * length * forth + aside * rng.normal(0, 3)
            path = _bend([base - 30 * forth, bent, base + length * forth], 32)
            to_tip = np.clip((length - (path - base) @ forth) / half, 0, 1)
            layer.shape(_ribbon(path, half * np.sqrt(to_tip * (2 - to_tip))), tissue)
            bones += [(path[a:b], half * rng.uniform(0.44, 0.52)) for a, b in ((0, 15), (16, 24), (25, 30))]
    for path, half in bones:  # waisted in the middle, dense cortex, less dense marrow
        waist = half * (0.75 + 0.4 * np.linspace(-1, 1, len(path)) ** 2)
        layer.shape(_ribbon(path, waist), 1.0)
        layer.shape(_ribbon(path, 0.5 * waist), 0.7)
    layer.expose(rng.uniform(0.25, 0.52), rng.uniform(1.2, 1.7))


def _add_border(scene: _Scene, rng: np.random.Generator) -> None:
    """A straight dark or bright border on one to four sides, all turned by about the same small angle."""
    mask, tilt, softness = np.zeros_like(scene.plane), rng.normal(0, 0.015), np.float32(np.exp(rng.uniform(-0.5, 2)))
    for side in rng.choice(4, int(rng.choice([1, 2, 3, 4], p=[0.3, 0.3, 0.25, 0.15])), replace=False):
        across, down = (scene.columns, scene.rows) if side < 2 else (scene.rows, scene.columns)
        lean = np.float32(tilt + rng.normal(0, 0.004)) * (1 if side < 2 else -1) * (down - down.mean())
        inwards = across + lean if side % 2 == 0 else across.max() - across - lean
        np.maximum(mask, np.clip(0.5 - (inwards - np.float32(rng.uniform(4, 28))) / softness, 0, 1), out=mask)
    tone = rng.uniform(0.0, 0.08) if rng.random() < 0.7 else rng.uniform(0.8, 1.0)
    scene.plane[:] += (np.float32(tone) - scene.plane) * mask * np.float32(rng.uniform(0.8, 1.0))


def _write(scene: _Scene, text: str, size: float, pad: float, ink: float, paper: float) -> tuple[_Layer, _Layer]:
    """Paper and ink, each of a density, of lines of writing: capitals `size` high, `pad` of paper around them."""
    font = _font(max(4, round(size * _SHARP / 0.72)))
    box = np.array(ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font, spacing=size))
    width, height = ((box[2:] - box[:2]) / _SHARP + 2 * pad + 4).tolist()
    back, front = _Layer(scene, (width, height), _SHARP), _Layer(scene, (width, height), _SHARP)
    back.shape([(2, 2), (width - 2, 2), (width - 2, height - 2), (2, height - 2)], paper)
    front.pen.multiline_text(tuple((pad + 2) * _SHARP - box[:2]), text, _NOTHING + round(127 * ink), font, spacing=size)
    return back, front


def _burn(scene: _Scene, rng: np.random.Generator, layers: Sequence[_Layer], turn: float, share: ArrayLike) -> None:
    """Exposes layers, turned by degrees; `share` (x, y) is their position in the free room."""
    for layer in (layer for layer in layers if layer.ink.getextrema() != (_NOTHING, _NOTHING)):
        layer.ink = layer.ink.rotate(turn, Image.Resampling.BILINEAR, expand=True, fillcolor=_NOTHING)
        room = np.array([scene.width, scene.height]) - np.array(layer.ink.size) / _SHARP
        layer.expose(rng.uniform(0.5, 1.0), rng.uniform(0.15, 0.5), room * np.asarray(share))


def _add_letter(scene: _Scene, rng: np.random.Generator) -> None:
    """R or L on the side of the body that it names, as a rule: alone, in a ring or on a small plate."""
    letter, size = str(rng.choice(["R", "L"], p=[0.75, 0.25])), rng.uniform(6.5, 17.0)
    style = rng.choice(["plain", "ring", "plate"], p=[0.6, 0.2, 0.2])
    back, front = _write(scene, letter, size, 0.5 * size, 1.0, rng.choice([-0.5, 0.3]) if style == "plate" else 0.0)
    if style == "ring":
        x, y, radius = front.ink.width / 2, front.ink.height / 2, 0.85 * size * _SHARP
        front.pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=255, width=round(radius / 8))
    front.ink = front.ink.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.12 else front.ink
    turn = rng.normal(0, 6) + rng.choice([0, 90, 180, 270], p=[0.91, 0.04, 0.02, 0.03])
    x, y = rng.uniform(0.0, 0.18), rng.uniform(0.0, 0.4) if rng.random() < 0.85 else rng.uniform(0.6, 1.0)
    _burn(scene, rng, (back, front), turn, (x if (letter == "R") == (rng.random() < 0.93) else 1 - x, y))


def _add_text(scene: _Scene, rng: np.random.Generator) -> None:
    """One to four lines of words and numbers in a corner or at an edge, at times on a dark or white box."""
    words = rng.choice(_WORDS, int(rng.integers(1, 5)), replace=False).tolist()
    text = "\n".join(word.format(*rng.integers(10, 60, 3).tolist()) for word in words)
    ink, paper = [(1.0, 0.0), (1.0, -1.0), (-1.0, 1.0)][int(rng.choice(3, p=[0.7, 0.18, 0.12]))]
    share = np.abs(rng.integers(0, 2, 2) - rng.uniform(0, 0.03, 2))
    if rng.random() < 0.3:  # somewhere along an edge instead of in a corner
        share[int(rng.integers(2))] = rng.uniform(0, 1)
    layers = _write(scene, text, rng.uniform(3.2, 7.5), rng.uniform(1, 3), ink, paper)
    _burn(scene, rng, layers, float(rng.choice([0, 90, 270], p=[0.88, 0.06, 0.06])), share)


_DRAWERS = (_add_bones, _add_ends, _add_gas, _add_skin, _add_cloth, _add_hand, _add_border, _add_letter, _add_text)
