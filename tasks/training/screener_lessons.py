"""Lessons: pictures to teach the screener with, and the truth about them.

Four kinds are shown in each epoch. Device-free pictures, of healthy and sick children alike, or it would learn "sick"
for "device"; the same with devices drawn on, of which the mask is known; those read as showing a device, of which the
whole picture and one rough box are known; and drawn chests, so that one network serves the embedded sample too.
Things that are no devices (`tasks.drawings.distractors`) are drawn on half of the pictures whose mask is known.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.drawings.devices import draw_devices, pick_kinds
from tasks.drawings.distractors import draw_distractors
from tasks.pixels.greys import to_float
from tasks.training.drawn_pictures import draw_pictures

CONFIDENCE_WEIGHT = {0: 0.3, 1: 0.8, 2: 1.0}
DISTRACTED_SHARE = 0.5
DEVICE_SHARE = 0.85
SEEN_PX, SEEN_CHANGE = 25, 0.03


@dataclass(frozen=True)
class Lesson:
    """Pictures to learn from, n of each.

    Attributes:
        pixels: uint8 ``(n, 224, 224)``.
        masks: uint8 ``(n, 224, 224)``, 255 where a device is; meaningless where ``exact`` is 0.
        boxes: float32 ``(n, 4)``: left, top, right, bottom as fractions; all 0 where there is no box.
        devices: float32 ``(n,)``: 1.0 a device is there.
        exact: float32 ``(n,)``: how sure the mask is the truth, 0.0 where it is unknown.
        weights: float32 ``(n,)``: how sure the reading is.
    """

    pixels: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    devices: NDArray[np.float32]
    exact: NDArray[np.float32]
    weights: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows: NDArray[Any]) -> "Lesson":
        """The lesson of some rows."""
        return Lesson(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})

    def feed(self, rows: NDArray[Any]) -> list[NDArray[np.float32]]:
        """The inputs of the screener's trainer for some rows."""
        some = self.take(rows)
        facts = [values[:, None] for values in (some.devices, some.exact, some.weights)]
        return [to_float(some.pixels), to_float(some.masks), some.boxes, *facts]

    @staticmethod
    def join(lessons: "list[Lesson]") -> "Lesson":
        """Several lessons after one another."""
        fields = Lesson.__dataclass_fields__
        return Lesson(**{name: np.concatenate([getattr(lesson, name) for lesson in lessons]) for name in fields})


def read_lessons(rows: pd.DataFrame, pixels: NDArray[np.uint8]) -> Lesson:
    """The lesson of readings: columns ``device, confidence, x0, y0, x1, y1`` beside uint8 ``(n, 224, 224)``."""
    boxes = rows[["x0", "y0", "x1", "y1"]].to_numpy(np.float32, na_value=0.0)
    devices = rows["device"].to_numpy(np.float32)
    weights = rows["confidence"].map(CONFIDENCE_WEIGHT).to_numpy(np.float32)
    return Lesson(
        pixels,
        np.zeros_like(pixels),
        np.where(devices[:, None] == 1, boxes, 0),
        devices,
        (1 - devices) * weights,
        weights,
    )


def draw_lessons(pixels: NDArray[np.uint8], rng: np.random.Generator) -> Lesson:
    """Draws distractors on some device-free pictures, uint8 ``(n, 224, 224)``, and devices on most of them."""
    drawn, masks = pixels.copy(), np.zeros_like(pixels)
    for i, packed in enumerate(pixels):
        picture = to_float(packed)
        if rng.random() < DISTRACTED_SHARE:
            picture = draw_distractors(picture, rng)
        if rng.random() < DEVICE_SHARE:
            bare = picture
            picture, mask = draw_devices(bare, pick_kinds(rng), rng, float(rng.uniform(0.7, 1.3)))
            # What cannot be seen, white on white, is not there to be found.
            masks[i] = ((mask > 0) & (np.abs(picture - bare)[..., 0] > SEEN_CHANGE)) * 255
            if np.count_nonzero(masks[i]) < SEEN_PX:
                masks[i] = 0
        drawn[i] = np.round(picture[..., 0] * 255)
    devices = np.asarray(masks.any(axis=(1, 2)), np.float32)
    n = len(pixels)
    return Lesson(drawn, masks, np.zeros((n, 4), np.float32), devices, np.ones(n, np.float32), np.ones(n, np.float32))


def draw_chests(n_images: int, seed: int) -> Lesson:
    """Drawn chests, 59 % of the sick ones with devices, as the embedded sample has them; other children than it."""
    pixels, masks, devices = draw_pictures(n_images, seed, "masks")
    sure, no_box = np.ones(n_images, np.float32), np.zeros((n_images, 4), np.float32)
    return Lesson(pixels, masks, no_box, devices.astype(np.float32), sure, sure)
