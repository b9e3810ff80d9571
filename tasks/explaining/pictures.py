"""Pictures of LIME maps: the X-ray, and beside it the same tinted by what each piece says, once per network."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tasks.pixels.masks import SURE
from tasks.records import MODEL, TWIN, Facts

PICTURE_PX = 320
STRIP_PX = 26
GAP_PX = 8
FAINTEST = 0.01  # change of probability that a full tint stands for at least
FOR, AGAINST, OUTLINE, LUNGS = (214, 73, 51), (47, 110, 186), (255, 205, 64), (84, 214, 160)
COMPARED = {TWIN: "without screening", MODEL: "the run's model"}
"""Networks whose map is shown beside, and what is written over it."""
INK, WARNING = (40, 52, 62), (176, 54, 30)

Floats = NDArray[np.float32]


def draw_explanation(
    grey: Floats,
    pieces: NDArray[np.intp],
    facts: Facts,
    mask: NDArray[np.uint8] | None = None,
    lungs: NDArray[np.bool_] | None = None,
) -> Image.Image:
    """Panels side by side, each under a word about it: the X-ray, the map of a network beside it if any, its own.

    Red pieces speak for pneumonia, blue ones against it; a tint grows with the weight relative to the largest one of
    its map, or to ``FAINTEST`` where all are smaller: a map on which nothing depends looks as pale as it is.

    Args:
        grey: float32 ``(side, side)``, 0.0 to 1.0.
        pieces: int ``(side, side)``, numbered from 0.
        facts: The facts of the image: ``weights``, ``stability``, and the same of one of ``COMPARED`` below its name.
        mask: The image's devices, uint8 ``(side, side)``; they are outlined on every panel.
        lungs: The place of its lungs, bool ``(side, side)``; outlined too, below the devices.
    """
    plain = np.repeat(np.asarray(_enlarge(Image.fromarray((grey * 255).astype(np.uint8))))[..., None], 3, axis=2)
    masks = ((None if lungs is None else np.where(lungs, 255, 0).astype(np.uint8), LUNGS), (mask, OUTLINE))
    lines = [(_outline(one), colour) for one, colour in masks if one is not None]
    panels = [(_outlined(plain.astype(np.float32), lines), "X-ray", INK)]
    beside = next((name for name in COMPARED if name in facts), None)
    own = "this network" if beside == MODEL else "this model"
    for name, part in ([(COMPARED[beside], facts[beside])] if beside else []) + [(own, facts)]:
        tinted = _outlined(tint(plain.astype(np.float32), pieces, np.array(part["weights"])), lines)
        unstable = part["stability"]["stable"] is False
        text = f"{name}: {part['probability']:.2f}" + (", unstable" if unstable else "")
        panels.append((tinted, text, WARNING if unstable else INK))
    width = len(panels) * PICTURE_PX + (len(panels) - 1) * GAP_PX
    sheet = Image.new("RGB", (width, STRIP_PX + PICTURE_PX), (255, 255, 255))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for number, (panel, text, ink) in enumerate(panels):
        left = number * (PICTURE_PX + GAP_PX)
        sheet.paste(Image.fromarray(panel.clip(0, 255).astype(np.uint8)), (left, STRIP_PX))
        pen.text((left + 2, STRIP_PX // 2), text, fill=ink, font=font, anchor="lm")
    return sheet


def tint(plain: Floats, pieces: NDArray[np.intp], weights: NDArray[np.float64]) -> Floats:
    """A map: float32 ``(320, 320, 3)`` in 0 to 255, tinted piece by piece."""
    from skimage.segmentation import find_boundaries

    places = np.asarray(_enlarge(Image.fromarray(pieces.astype(np.int32)), Image.Resampling.NEAREST))
    relative = weights / max(np.abs(weights).max(), FAINTEST)
    strength = relative[places][..., None]
    colour = np.where(strength > 0, np.array(FOR, np.float32), np.array(AGAINST, np.float32))
    tinted = plain + (colour - plain) * 0.6 * np.abs(strength)
    edges = find_boundaries(places, mode="inner")[..., None] & (np.abs(strength) > 0.25)
    return np.where(edges, 0.5 * tinted + 0.5 * colour, tinted).astype(np.float32)


def _outline(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    from skimage.segmentation import find_boundaries

    return np.asarray(find_boundaries(np.asarray(_enlarge(Image.fromarray(mask))) >= SURE, mode="outer"))


def _outlined(panel: Floats, lines: list[tuple[NDArray[np.bool_], tuple[int, int, int]]]) -> Floats:
    for line, colour in lines:
        panel = np.where(line[..., None], np.array(colour, np.float32), panel)
    return panel


def _enlarge(picture: Image.Image, resampling: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    return picture.resize((PICTURE_PX, PICTURE_PX), resampling)
