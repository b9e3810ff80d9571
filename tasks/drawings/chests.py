"""Draws the chest X-ray of a child from a seed: thickness of tissue, air and bone added up, then developed like film.

Everything lives on one coordinate grid of the chest: `x` from the spine, -1 and 1 at the side walls of the chest
(the child's left, with heart and stomach, is positive, to the right of the picture), `y` from 0 at the tops of the
lungs to 1 at the domes of the diaphragm. Disease takes the air out of the lung, as it does in the child.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter

Floats = NDArray[Any]
Finding = Literal["normal", "bacteria", "virus"]

# Anatomy is soft: it is drawn on a coarser grid and enlarged; grain, letters and devices are drawn at full detail.
_DETAIL = 0.75
_TABLE = np.linspace(-1.5, 2.5, 1024)


@dataclass(frozen=True)
class Child:
    """The build of one child, the same in all its pictures; lengths in units of the chest, see the module."""

    half_width: float  # of the chest, as a share of the picture's width
    chest_height: float  # lung tops to domes, as a share of the picture's height
    flesh: float
    n_ribs: float
    rib_slope: float
    rib_density: float
    heart_size: float
    heart_tilt: float
    thymus: float
    vessels: float
    arms_up: bool
    spine_bend: float


def imagine_child(rng: np.random.Generator) -> Child:
    """Draws the build of a child between infancy and school age."""
    return Child(
        half_width=float(rng.uniform(0.31, 0.4)),
        chest_height=float(rng.uniform(0.5, 0.66)),
        flesh=float(rng.uniform(0.05, 0.2)),
        n_ribs=float(rng.uniform(8.2, 10.0)),
        rib_slope=float(rng.uniform(0.1, 0.34)),
        rib_density=float(rng.uniform(0.1, 0.19)),
        heart_size=float(rng.uniform(0.88, 1.2)),
        heart_tilt=float(rng.uniform(0.3, 0.8)),
        thymus=float(max(0.0, rng.uniform(-0.25, 0.22))),
        vessels=float(rng.uniform(0.5, 1.0)),
        arms_up=bool(rng.random() < 0.6),
        spine_bend=float(rng.normal(0, 0.05)),
    )


def draw_chest(
    child: Child, finding: Finding, severity: float, shape: tuple[int, int], rng: np.random.Generator
) -> Floats:
    """One exposure of a child.

    Args:
        child: its build.
        finding: what is in the lungs; "normal" draws the harmless haze and markings of `severity`.
        severity: 0.0 nothing to see to 1.0 no air left where the disease is.
        shape: height and width of the picture in pixels.
        rng: decides position, breath, exposure and the shape of the disease.

    Returns:
        float32 of that shape, 0.0 black to 1.0 white, without noise, letters and edges (`finish_film`).
    """
    view = _View.pose(child, round(_DETAIL * shape[0]), round(_DETAIL * shape[1]), rng)
    y, ax = view.y, np.abs(view.x)
    lung, cage = _draw_lungs(view, child, rng)
    heart = _draw_heart(view, child)
    vessels = _draw_vessels(view, rng)
    opacity = _draw_disease(view, finding, severity, rng)
    air = lung * (1 - 0.8 * heart) * (1 - opacity)

    body = _draw_body(view, child, cage, rng)
    below = _soft(y - view.dome, 0.08) * _soft(1.12 * cage - ax, 0.2)
    marking = child.vessels * float(rng.uniform(0.6, 1.2)) * (1 + (1.1 if finding == "virus" else 0.25) * severity)
    attenuation = body + 0.16 * below + 0.1 * heart * body
    attenuation -= float(rng.uniform(0.33, 0.46)) * air
    attenuation += (
        0.24 * marking * vessels * lung * (1 - 0.8 * heart) * (1 - opacity) + _draw_hila(view, marking) * lung
    )
    # Bronchi stay open inside a filled lobe and show as dark branches.
    attenuation -= 0.1 * vessels * np.maximum(opacity - 0.35, 0) * lung
    attenuation += _draw_bones(view, child, cage, rng)
    attenuation -= _draw_gas(view, rng) * below
    attenuation *= 1 + 0.04 * _cloud(view, 5, rng)
    film = Image.fromarray(_develop(attenuation, rng))
    enlarged = np.asarray(film.resize(shape[::-1], Image.Resampling.BICUBIC))
    return np.asarray(np.clip(enlarged, 0, 1), np.float32)


def outline_lungs(child: Child, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Where the lungs are in what `draw_chest` draws of the same child and shape by a generator in the same state.

    As people outline them: what the heart covers counts, what shines through the diaphragm does not.
    """
    return np.asarray(_draw_lungs(_View.pose(child, *shape, rng), child, rng)[0] >= 0.4)


def finish_film(picture: Floats, rng: np.random.Generator) -> Floats:
    """Adds what the machine adds: blur, grain, side letter and the edge of the beam; keeps shape and range."""
    height, width = picture.shape
    film = gaussian_filter(picture, rng.uniform(0.3, 0.75) * height / 256)
    grain = rng.standard_normal(picture.shape, dtype=np.float32)
    film += float(rng.uniform(0.004, 0.02)) * (1.25 - film) * gaussian_filter(grain, 0.5) * 1.8
    if rng.random() < 0.3:
        film *= _draw_beam_edge(height, width, rng)
    if rng.random() < 0.8:
        film = np.maximum(film, _draw_letter(height, width, rng))
    return np.asarray(np.clip(film, 0, 1), np.float32)


@dataclass(frozen=True)
class _View:
    """The coordinate grid of one picture and the height of the diaphragm at each pixel."""

    x: Floats
    y: Floats
    dome: Floats
    centre: tuple[float, float]
    unit: tuple[float, float]
    turn: float

    @classmethod
    def pose(cls, child: Child, height_px: int, width_px: int, rng: np.random.Generator) -> "_View":
        zoom = float(rng.normal(1.0, 0.04))
        unit = (child.half_width * zoom * width_px, child.chest_height * zoom * height_px)
        centre = (width_px * float(rng.normal(0.5, 0.025)), height_px * float(rng.uniform(0.11, 0.24)))
        turn = float(rng.normal(0, 0.045))
        columns = np.arange(width_px, dtype=np.float32)[np.newaxis] + 0.5 - centre[0]
        rows = np.arange(height_px, dtype=np.float32)[:, np.newaxis] + 0.5 - centre[1]
        cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        x = (columns * cos + rows * sin) / np.float32(unit[0])
        y = (rows * cos - columns * sin) / np.float32(unit[1])
        x += np.float32(child.spine_bend) * (y - 0.4) ** 2
        # Half a breath lifts the diaphragm; the liver lifts the right dome more.
        lift = float(rng.normal(0.0, 0.055))
        away = np.abs(x) - 0.48
        dome = 1.0 - lift + np.where(x > 0, 0.03, 0).astype(np.float32) + away * away * np.where(away > 0, 0.95, 0.3)
        return cls(x, y, dome.astype(np.float32), centre, unit, turn)

    def pixels(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Pixels of points of the chest, `(n, 2)`; the bend of the spine is neglected."""
        right, down = points[:, 0] * self.unit[0], points[:, 1] * self.unit[1]
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        return np.stack([right * cos - down * sin + self.centre[0], right * sin + down * cos + self.centre[1]], axis=1)


def _soft(inside: Floats, width: float) -> Floats:
    """A smooth step from 0 to 1 over `width`, one half where `inside` is 0."""
    t = inside * np.float32(1 / width)
    t += np.float32(0.5)
    np.clip(t, 0, 1, out=t)
    rise = t * np.float32(-2)
    rise += np.float32(3)
    rise *= t
    rise *= t
    return rise


def _hump(distance: Floats, radius: float) -> Floats:
    """A bell of height 1 that ends at `radius`; cheaper than a Gaussian."""
    t = np.maximum(1 - (distance / np.float32(radius)) ** 2, 0)
    return t * t


def _profile(y: Floats, knots: list[tuple[float, float]]) -> Floats:
    """A smooth curve through `(y, value)` knots, looked up at each pixel and held beyond its ends."""
    heights, values = zip(*knots, strict=True)
    table = PchipInterpolator(heights, values)(np.clip(_TABLE, heights[0], heights[-1])).astype(np.float32)
    place = (y - np.float32(_TABLE[0])) * np.float32((len(_TABLE) - 1) / (_TABLE[-1] - _TABLE[0]))
    return np.take(table, place.astype(np.int32), mode="clip")


def _cloud(view: _View, n_cells: int, rng: np.random.Generator) -> Floats:
    """Smooth noise with about `n_cells` waves over the picture, standard deviation about 0.7."""
    cells = rng.standard_normal((n_cells, n_cells), dtype=np.float32)
    height, width = view.x.shape
    return np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))


def _limb(view: _View, start: tuple[float, float], end: tuple[float, float], radius: float) -> Floats:
    """Roundness (0 to 1) of a cylinder between two points, mirrored to both sides."""
    ax = np.abs(view.x)
    run, fall = end[0] - start[0], end[1] - start[1]
    along = np.clip(((ax - start[0]) * run + (view.y - start[1]) * fall) / (run * run + fall * fall), 0, 1)
    gap = (ax - start[0] - along * run) ** 2 + (view.y - start[1] - along * fall) ** 2
    return np.sqrt(np.maximum(1 - gap / np.float32(radius * radius), 0))


def _draw_lungs(view: _View, child: Child, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Depth of air of healthy lungs, 0 to 1, and the half-width of the rib cage at each height."""
    narrow = float(rng.normal(0, 0.025))
    ribs = [(-0.08, 0.3), (-0.03, 0.46), (0.03, 0.6), (0.12, 0.72 - narrow), (0.3, 0.87 - narrow), (0.6, 0.97)]
    cage = _profile(view.y, [*ribs, (0.9, 1.0), (1.3, 1.0 + narrow)])
    middle = _profile(
        view.y,
        [(-0.02, 0.42), (0.04, 0.25), (0.15, 0.19 + 0.3 * child.thymus), (0.35, 0.2 + child.thymus), (0.5, 0.17)],
    )
    ax = np.abs(view.x)
    lateral, medial, floor = cage - ax, ax - middle, view.dome - view.y
    depth = 0.72 + 0.28 * _soft(lateral - 0.2, 0.5)
    lung = _soft(lateral - 0.02, 0.07) * _soft(medial - 0.02, 0.09) * _soft(floor, 0.035) * _soft(view.y - 0.03, 0.1)
    # Lung reaches down behind the dome and thins out there.
    behind = 0.16 * _soft(lateral - 0.03, 0.1) * _soft(0.16 + floor, 0.3) * _soft(ax - 0.3, 0.3)
    return np.maximum(lung * depth, behind * (view.y > 0.5)), cage


def _draw_heart(view: _View, child: Child) -> Floats:
    size = child.heart_size
    x, y = view.x - 0.17 * size, view.y - 0.69
    tilt = child.heart_tilt
    cos, sin = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    u, v = (x * cos + y * sin) / (0.46 * size), (y * cos - x * sin) / (0.36 * size)
    ventricles = _soft(1 - np.sqrt(u * u + v * v), 0.2)
    great_vessels = _soft(0.24 - np.abs(view.x - 0.05), 0.08) * _soft(0.62 - view.y, 0.2) * _soft(view.y - 0.22, 0.2)
    return np.asarray(np.maximum(ventricles, great_vessels))


def _draw_body(view: _View, child: Child, cage: Floats, rng: np.random.Generator) -> Floats:
    """Thickness of soft tissue, about 1 in the middle of the trunk."""
    ax, flesh = np.abs(view.x), child.flesh
    neck = [(-0.9, 0.42), (-0.35, 0.4), (-0.2, 0.56), (-0.08, 0.98), (0.08, 1.12)]
    wall = _profile(view.y, [*neck, (0.3, 1.06), (0.6, 1.07), (1.1, 1.06), (1.6, 1.03)]) + np.float32(flesh)
    trunk = np.sqrt(np.maximum(1 - (ax / wall) ** 2, 0))
    spread = float(rng.uniform(-0.1, 0.1))
    if child.arms_up:
        start, end = (0.95, 0.02), (1.75 + spread, -0.45 + spread)
    else:
        start, end = (1.14 + flesh, 0.02), (1.45 + flesh + spread, 1.5)
    radius = 0.2 + 0.5 * flesh
    arms = _limb(view, start, end, radius)
    bone = _limb(view, start, end, 0.35 * radius)
    # Cortical bone is dense at its edges: a thin wall seen edge-on.
    arms = 0.55 * arms + 0.14 * bone + 0.1 * (bone > 0) * (1 - bone)
    head = np.sqrt(np.maximum(1 - (view.x / 0.6) ** 2 - ((view.y + float(rng.uniform(0.78, 1.0))) / 0.6) ** 2, 0))
    return np.asarray(np.maximum(np.maximum(0.88 * trunk**0.8, arms), 0.95 * head))


def _draw_bones(view: _View, child: Child, cage: Floats, rng: np.random.Generator) -> Floats:
    x, y, ax = view.x, view.y, np.abs(view.x)
    inside = _soft(cage + 0.05 - ax, 0.07) * _soft(y + 0.08, 0.12) * _soft(1.22 - y, 0.7)
    fall = child.rib_slope * (0.75 + 0.5 * y)
    side_tilt = np.float32(rng.normal(0, 0.02))
    uneven = 0.012 * _cloud(view, 7, rng)
    posterior = (y + uneven - fall * ax * ax + 0.07 * ax - side_tilt * x) * child.n_ribs
    anterior = (y - uneven + (0.28 + child.rib_slope) * ax - 0.12 * ax * ax - side_tilt * x) * (0.85 * child.n_ribs)
    ribs = _rib_pattern(posterior, 0.4) * (0.6 + 0.5 * ax) * _soft(ax - 0.08, 0.1)
    ribs += 0.42 * _rib_pattern(anterior, 0.42) * _soft(ax - 0.5, 0.35)
    # Where a rib turns round the side it is seen along its length: the beads of the chest wall.
    rim = _hump(cage + 0.0 - ax, 0.075) * (0.4 + 0.7 * _rib_pattern(posterior + 0.1, 0.4)) * inside
    bones = child.rib_density * (ribs * inside + 1.1 * rim)

    level = y * (child.n_ribs + 0.6) + np.float32(rng.random())
    vertebra = level - np.floor(level)
    body = _soft(0.115 - 0.012 * _hump(vertebra - 0.5, 0.5) - ax, 0.035)
    pedicles = _hump(np.hypot((ax - 0.075) / 0.035, (vertebra - 0.4) / 0.2), 1.0)
    process = _hump(np.hypot(x / 0.03, (vertebra - 0.8) / 0.25), 1.0)
    bones += body * (0.1 + 0.12 * _soft(0.37 - np.abs(vertebra - 0.5), 0.14)) + 0.07 * pedicles + 0.05 * process
    windpipe = _soft(0.055 - np.abs(x + 0.02), 0.04) * _soft(y + 0.45, 0.3) * _soft(0.34 - y, 0.12)
    bones -= float(rng.uniform(0.08, 0.16)) * windpipe

    tilt = float(rng.normal(0.0, 0.05))
    away = (ax - 0.1) / 0.85
    clavicle = y - (0.06 + tilt * np.sign(x)) + 0.2 * away - 0.06 * np.sin(2 * np.pi * away)
    gap = np.abs(clavicle) / (0.03 + 0.012 * np.abs(away - 0.5))
    span = _soft(ax - 0.12, 0.06) * _soft(0.95 - ax, 0.08)
    bones += 0.15 * span * (_soft(1 - gap, 0.7) + 0.45 * _hump(gap - 0.8, 0.45))
    shoulder_blade = _limb(view, (0.9, 0.05), (0.98, 0.38), 0.13)
    bones += 0.05 * shoulder_blade + 0.06 * (shoulder_blade > 0) * (1 - shoulder_blade)
    return np.asarray(bones)


def _rib_pattern(phase: Floats, thickness: float) -> Floats:
    """One rib a period, 0 to 1, brighter along its lower and upper edge."""
    gap = np.abs(phase - np.floor(phase) - 0.5) / np.float32(thickness * 0.5)
    return 0.62 * _soft(1 - gap, 0.45) + 0.38 * _hump(gap - 0.82, 0.4)


def _draw_vessels(view: _View, rng: np.random.Generator) -> Floats:
    """Branches from both hila, 0 to 1, thinning out and forking twice towards the chest wall."""
    height, width = view.x.shape
    plate = Image.new("L", (2 * width, 2 * height))
    pen = ImageDraw.Draw(plate)
    n_stems = 13
    side = np.repeat([-1.0, 1.0], n_stems)
    heading = np.tile(np.linspace(-1.3, 1.5, n_stems), 2) + rng.normal(0, 0.12, 2 * n_stems)
    start = np.stack([side * 0.22, np.full(2 * n_stems, 0.45)], axis=1) + rng.normal(0, (0.05, 0.1), (2 * n_stems, 2))
    for generation in range(3):
        length = rng.uniform(0.16, 0.34, len(side))[:, np.newaxis] * (1.0 - 0.2 * generation)
        bends = heading[:, np.newaxis] + np.cumsum(rng.normal(0, 0.24, (len(side), 4)), axis=1)
        steps = np.stack([side[:, np.newaxis] * np.cos(bends), np.sin(bends)], axis=2) * length[:, :, np.newaxis] / 4
        paths = np.concatenate([start[:, np.newaxis], start[:, np.newaxis] + np.cumsum(steps, axis=1)], axis=1)
        pixels = 2 * view.pixels(paths.reshape(-1, 2)).reshape(len(side), -1)
        stroke = max(1, round((3.0, 2.4, 2.0)[generation] * height / 256))
        for line in pixels.tolist():
            pen.line(line, fill=(160, 140, 120)[generation], width=stroke)
        fork = np.tile([-0.35, 0.3], len(side)) + rng.normal(0, 0.12, 2 * len(side))
        side, start = np.repeat(side, 2), np.repeat(paths[:, -1], 2, axis=0)
        heading = np.repeat(heading, 2) + fork
    sharp = np.asarray(plate.reduce(2), np.float32) / 255
    return np.asarray(gaussian_filter(sharp, 0.5 * height / 256, truncate=2))


def _draw_hila(view: _View, marking: float) -> Floats:
    return np.float32(0.09 * marking) * _hump(np.hypot((np.abs(view.x) - 0.22) / 0.26, (view.y - 0.46) / 0.26), 1.0)


def _draw_gas(view: _View, rng: np.random.Generator) -> Floats:
    """Air in stomach and gut below the diaphragm."""
    x, y = view.x - rng.uniform(0.42, 0.62), view.y - rng.uniform(1.16, 1.28)
    bubble = _soft(1 - np.hypot(x / rng.uniform(0.16, 0.34), y / rng.uniform(0.05, 0.12)), 0.5)
    gut = _soft(_cloud(view, 14, rng) - 1.1, 0.9) * _soft(view.y - 1.25, 0.2)
    return float(rng.choice([0.0, 0.12, 0.3])) * bubble + float(rng.choice([0.0, 0.14])) * gut


def _draw_disease(view: _View, finding: Finding, severity: float, rng: np.random.Generator) -> Floats:
    """Share of the air that is gone at each place, 0 to 1."""
    ax = np.abs(view.x)
    haze = 0.55 + 0.25 * _cloud(view, 5, rng)
    near_hila = _hump(np.hypot((ax - 0.25) / 0.8, (view.y - 0.52) / 0.65), 1.0)
    if finding != "bacteria":
        share = 0.5 if finding == "normal" else 1.05
        fine = 0.1 * _cloud(view, 13, rng) + 0.12 * _cloud(view, 40, rng)
        return np.clip(severity * share * (0.3 + near_hila) * (haze + fine), 0, 0.9)
    opacity = 0.12 * severity * near_hila
    ragged = 0.16 * _cloud(view, 12, rng) + 0.08 * _cloud(view, 30, rng)
    warp_x, warp_y = 0.22 * _cloud(view, 6, rng), 0.22 * _cloud(view, 6, rng)
    for _ in range(1 if rng.random() < 0.7 else 2):
        side = -1 if rng.random() < 0.58 else 1
        x, y, rx, ry = _LOBES[int(rng.integers(len(_LOBES)))]
        size = float(rng.uniform(0.65, 1.25))
        u = (view.x - side * (x + rng.normal(0, 0.05))) / (rx * size) + warp_x
        v = (view.y - y - rng.normal(0, 0.05)) / (ry * size) + warp_y
        patch = 1 - np.hypot(u, v) + ragged
        if y < 0.4 and side < 0 and rng.random() < 0.5:
            # The horizontal fissure ends an upper lobe in a line.
            patch = np.minimum(patch, (0.46 - view.y + 0.08 * (ax - 0.5)) * 14)
        opacity = np.maximum(opacity, severity * _soft(patch - 0.12, float(rng.uniform(0.5, 1.1))))
    return np.clip(opacity, 0, 0.97)


_LOBES = ((0.5, 0.24, 0.36, 0.26), (0.45, 0.66, 0.36, 0.22), (0.55, 0.86, 0.42, 0.24), (0.32, 0.5, 0.3, 0.24))
"""Where lobes lie: x, y, and half-axes."""


def _develop(attenuation: Floats, rng: np.random.Generator) -> Floats:
    """Film curve and window: exposure and contrast vary from picture to picture, whatever is in the lungs."""
    low = float(rng.uniform(0.0, 0.1))
    high = float(np.quantile(attenuation[::4, ::4], 0.985)) * float(rng.uniform(0.95, 1.12))
    level = np.clip((attenuation - low) / (high - low), 0, 1.15)
    level = level ** float(rng.uniform(0.75, 1.5))
    # Digital detectors lift local contrast: each place against its wider surroundings.
    height, width = level.shape
    coarse = Image.fromarray(level).resize((width // 6, height // 6), Image.Resampling.BOX)
    spread = Image.fromarray(gaussian_filter(np.asarray(coarse), 0.022 * height))
    level += float(rng.uniform(0.2, 0.8)) * (
        level - np.asarray(spread.resize((width, height), Image.Resampling.BICUBIC))
    )
    level = np.clip(level, 0, 1.25)
    white = float(rng.uniform(0.72, 0.98))
    shoulder = float(rng.uniform(0.6, 1.6))
    film = white * (1 - np.exp(-shoulder * level)) / np.float32(1 - np.exp(-shoulder))
    return np.clip(film + float(rng.uniform(0.0, 0.04)), 0, 1).astype(np.float32)


def _draw_beam_edge(height: int, width: int, rng: np.random.Generator) -> Floats:
    """Black beyond the straight, slightly tilted edges of the beam."""
    rows = np.arange(height, dtype=np.float32)[:, np.newaxis] / height
    columns = np.arange(width, dtype=np.float32)[np.newaxis] / width
    light = np.ones((height, width), np.float32)
    for near in (rows, 1 - rows, columns, 1 - columns):
        if rng.random() < 0.4:
            across = columns if near.shape[1] == 1 else rows
            light = light * _soft(near - rng.uniform(0.01, 0.06) + rng.normal(0, 0.02) * across, 0.012)
    return light


def _draw_letter(height: int, width: int, rng: np.random.Generator) -> Floats:
    """The side letter: R on the left of the picture, which is the child's right, or L on the other side."""
    plate = Image.new("L", (width, height))
    letter, x = ("R", rng.uniform(0.02, 0.1)) if rng.random() < 0.8 else ("L", rng.uniform(0.86, 0.94))
    font = ImageFont.load_default(size=max(8, round(height * float(rng.uniform(0.05, 0.09)))))
    ink = round(255 * float(rng.uniform(0.7, 1.0)))
    ImageDraw.Draw(plate).text((x * width, rng.uniform(0.02, 0.45) * height), letter, fill=ink, font=font)
    return np.asarray(plate, np.float32) / 255
