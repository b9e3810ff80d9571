"""A few soft chests with known devices, and networks whose habits are known, for tests of the audit."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.ndimage import binary_erosion, gaussian_filter

from tasks.drawings.chests import draw_chest, imagine_child
from tasks.drawings.devices import draw_devices, pick_kinds
from tasks.explaining.subjects import Scene, Subject
from tasks.measures import choose_threshold, to_logit
from tasks.pixels.covering import LUNG_MARGIN_PX
from tasks.pixels.window import window_place
from tasks.records import NORMAL, PNEUMONIA
from tasks.settings import Settings

SIDE_PX = 112
"""Half of what the product packs, for speed; a multiple of 28, as the baselines ask for."""

Ask = Callable[[np.ndarray], np.ndarray]


def settings(**auditing: object) -> Settings:
    """Few images and few draws."""
    how = {"n_images": 8, "min_images": 4, **auditing}
    return Settings.model_validate({"auditing": how, "evaluation": {"n_bootstrap": 60}, "seed": 3})


@lru_cache(maxsize=64)
def soft_chest(number: int, side_px: int = SIDE_PX) -> np.ndarray:
    """A drawn chest without fine detail, float32 ``(side, side)``; the contrast in its lung window is always alike."""
    rng = np.random.default_rng(number)
    film = draw_chest(imagine_child(rng), "normal", 0.0, (side_px, side_px), rng)
    film = gaussian_filter(film, side_px / 25)
    dark, bright = np.quantile(film[window_place(side_px)], [0.1, 0.5])
    return np.asarray(np.clip(0.2 + 0.25 * (film - dark) / (bright - dark), 0, 0.7), np.float32)


def add_haze(film: np.ndarray, haze: float) -> np.ndarray:
    """Disease: a share of the contrast inside the lung window is gone, and what is outside stays."""
    place = window_place(len(film))
    share = haze * np.clip(2 * gaussian_filter(place.astype(np.float32), len(film) / 40) - 1, 0, 1)
    return np.asarray(film + share * (film[place].mean() - film), np.float32)


def add_devices(film: np.ndarray, seed: int, strength: float = 1.3) -> tuple[np.ndarray, np.ndarray]:
    """Devices on an X-ray ``(side, side)``: the X-ray, and the mask as a screener gives it, 255 on a device."""
    rng = np.random.default_rng(seed)
    drawn, mask = draw_devices(film[..., None], pick_kinds(rng), rng, strength)
    return drawn[..., 0], np.where(mask > 0, 255, 0).astype(np.uint8)


def pack(film: np.ndarray) -> np.ndarray:
    return np.rint(film * 255).astype(np.uint8)


def draw_scene(groups: tuple[tuple[int, bool, int], ...], seed: int = 0) -> Scene:
    """Images of each group ``(label, has_device, n)``; each has a patient of its own, and the masks are true."""
    rng = np.random.default_rng(seed)
    packed: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    rows: list[dict[str, object]] = []
    for label, has_device, n in groups:
        for i in range(n):  # each group shows the same children, so that nothing but haze and device tells them apart
            number = 1_000 * seed + len(rows)
            film = add_haze(soft_chest(i), float(rng.uniform(0.35, 0.7) if label == PNEUMONIA else rng.uniform(0, 0.3)))
            film = np.clip(film + rng.uniform(-0.05, 0.05), 0, 1)
            mask = np.zeros(film.shape, np.uint8)
            if has_device:
                film, mask = add_devices(film, number)
            packed.append(pack(film))
            masks.append(mask)
            rows.append({"label": label, "has_device": has_device, "group_id": f"p{number}"})
    table = pd.DataFrame(rows).astype({"label": "Int8", "has_device": "boolean", "group_id": "string"})
    table["image_id"] = pd.array([f"{seed:08x}{i:08x}" for i in range(len(table))], dtype="string")
    table["split"] = pd.array(["test"] * len(table), dtype="string")
    # The size of the file tells nothing: it goes round within each class.
    table["width_px"] = pd.array([1_000 + 10 * (i % 3) for i in range(len(table))], dtype="Int32")
    table["height_px"] = pd.array([800 + 10 * (i % 2) for i in range(len(table))], dtype="Int32")
    lungs = np.broadcast_to(lung_window(), (len(table), SIDE_PX, SIDE_PX))
    return Scene(table, np.stack(packed), np.stack(masks), lungs)


def lung_window() -> np.ndarray:
    """The mask of lungs that fill the lung window, once the audit widens them: uint8 ``(side, side)``."""
    return np.where(binary_erosion(window_place(SIDE_PX), np.ones((3, 3)), LUNG_MARGIN_PX), 255, 0).astype(np.uint8)


def usual_scene(seed: int = 0) -> Scene:
    """Devices mostly on pneumonia, as in a hospital; no group is empty."""
    return draw_scene(((NORMAL, False, 14), (NORMAL, True, 4), (PNEUMONIA, False, 6), (PNEUMONIA, True, 16)), seed)


def answer(figure: np.ndarray, middle: float, scale: float) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-(figure - middle) / scale)), np.float64)


# -- networks ----------------------------------------------------------------------------------------------------------


def read_lung(packed: np.ndarray) -> np.ndarray:
    """The contrast of the darker half of the lung window: haze takes it, a thin bright device hardly moves it."""
    inside = packed[:, window_place(packed.shape[1])]
    dark, middle = np.quantile(inside, [0.1, 0.5], axis=1)
    return answer(dark - middle, -42.0, 4.0)


def read_device(packed: np.ndarray) -> np.ndarray:
    """The share of pixels that are much brighter than what is around them, as those of thin devices are."""
    grey = packed.astype(float)
    bright = grey - gaussian_filter(grey, (0, 2, 2)) > 12
    return answer(bright[:, window_place(packed.shape[1])].mean(1), 0.0008, 0.0004)


def read_both(packed: np.ndarray) -> np.ndarray:
    """Lung and device, as a network that learnt from images that nobody screened."""
    logits = np.clip(to_logit(read_lung(packed)), -4, 4) + np.clip(to_logit(read_device(packed)), -2, 2)
    return answer(logits, 0.0, 1.0)


def read_corner(packed: np.ndarray) -> np.ndarray:
    """The upper left corner, which lies outside of the lung window."""
    return answer(packed[:, :10, :10].mean((1, 2)), 100.0, 10.0)


def say_half(packed: np.ndarray) -> np.ndarray:
    """Always the same answer."""
    return np.full(len(packed), 0.5)


def suspect(name: str, ask: Ask, scene: Scene) -> Subject:
    """A network under audit with the threshold that suits the scene best."""
    probability = ask(scene.packed)
    labels = scene.rows["label"].to_numpy(float)
    return Subject(name, ask, choose_threshold(labels, probability, ["as it is"] * len(labels)), probability)
