"""Which odd images scoring refuses: by their looks (familiarity), by their lungs, and by either.

``python -m tests.benchmarks.refusals`` measures on the drawn sample, ``… RUN`` on the validation images of a run;
what is familiar is then fitted on its training images, and the lungs are those of its prepare flow.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from tasks.drawings.sample import write_sample
from tasks.networks.familiarity import Familiarity, fit_familiarity
from tasks.networks.lung_fields import LungBounds, describe_lungs, fit_bounds, load_bounds, measure_fields
from tasks.networks.segmenter import load_segmenter, segment_pixels
from tasks.networks.shipped import SHIPPED
from tasks.networks.twin import used_rows
from tasks.pixels.decoding import decode
from tasks.runs.run import Run
from tasks.settings import Settings

Packed = NDArray[np.uint8]
SIDE = 224
N_DRAWN, N_KNOWN = 400, 300
LEAST_VISIBLE = 0.1


def main() -> None:
    """Prints ``{"bench": "refusals", "n", "by": {kind: [n, looks, lungs, either]}}``, shares of the images."""
    run = Run(Settings(run_dir=sys.argv[1])) if len(sys.argv) > 1 else None
    groups, familiarity, bounds = open_run(run) if run else draw_run()
    chests = (groups["validation"] if run else groups["others"])[::2]
    model = load_segmenter(SHIPPED["segmenter"])
    for kind, make in SPOILS.items():
        groups[kind] = make(chests)
    rng = np.random.default_rng(0)
    groups |= {
        "other body parts, drawn": draw_parts(200, rng),
        "photos, pages, textures": take_photos(),
        "noise, blank": blanks(),
    }
    shares = {}
    for kind, images in groups.items():
        looks = familiarity.distances(images) > familiarity.bound
        measured = np.concatenate([measure_fields(masks) for masks in segment_pixels(model, images)])
        lungs = np.array([bool(describe_lungs(row, bounds)) for row in measured])
        shares[kind] = [len(images), *(round(float(each.mean()), 4) for each in (looks, lungs, looks | lungs))]
        print(kind, shares[kind], file=sys.stderr, flush=True)
    print(json.dumps({"bench": "refusals", "n": len(chests), "by": shares}), flush=True)


def open_run(run: Run) -> tuple[dict[str, Packed], Familiarity, LungBounds]:
    """Validation images by class, and those whose lungs are hardest to see; what is familiar, and the bounds."""
    images, manifest = run.images(), run.manifest()
    rows = used_rows(manifest)
    learnt = list(rows.loc[rows["split"] == "train", "image_id"])
    batches = (images.read(learnt[i : i + 256]) for i in range(0, len(learnt), 256))
    val = rows[rows["split"] == "val"]
    groups = {"validation": images.read(list(val["image_id"]))}
    for label, name in enumerate(("normal", "pneumonia")):
        groups[f"validation, {name}"] = images.read(list(val.loc[val["label"] == label, "image_id"]))
    least = int(np.ceil(LEAST_VISIBLE * len(val)))
    lungs = run.lungs().read(list(val["image_id"]))
    contrast = [see_lungs(image, mask) for image, mask in zip(groups["validation"], lungs, strict=True)]
    groups["validation, least visible lungs"] = groups["validation"][np.argsort(contrast)[:least]]
    out = manifest[(manifest["split"] == "train") & manifest["excluded"].str.contains("medical device").fillna(False)]
    groups["left out for devices"] = images.read(list(out["image_id"]))
    return groups, fit_familiarity(batches, [run.settings.seed, len(learnt)]), load_bounds(run.folder)


def see_lungs(image: Packed, mask: Packed) -> float:
    """How much darker the lungs are than what lies around them, in standard deviations of the image."""
    inside = mask >= 128
    around = ndimage.binary_dilation(inside, iterations=20) & ~inside
    return float((image[around].mean() - image[inside].mean()) / image.std()) if inside.any() else -np.inf


def draw_run() -> tuple[dict[str, Packed], Familiarity, LungBounds]:
    """Drawn chests, with what is familiar and what is plausible fitted on three quarters of them."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_sample(folder / "set", folder / "truth", n_images=N_DRAWN, seed=3)
        files = sorted(path for path in folder.glob("set/**/*.jpeg") if not path.name.startswith("."))
        packed = np.unique(np.stack([decode(file.read_bytes()) for file in files]), axis=0)
    packed = np.random.default_rng(1).permutation(packed)
    known = packed[:N_KNOWN]
    masks = np.concatenate(list(segment_pixels(load_segmenter(SHIPPED["segmenter"]), known)))
    bounds = fit_bounds(measure_fields(masks), "")
    return {"others": packed[N_KNOWN:]}, fit_familiarity([known], [7, len(known)]), bounds


def crop(images: Packed, top: float, left: float, height: float, width: float) -> Packed:
    """A part of each image, in shares of its side, enlarged to the whole."""
    rows, columns = (slice(round(a * SIDE), round((a + b) * SIDE)) for a, b in ((top, height), (left, width)))
    return np.stack([np.asarray(Image.fromarray(i[rows, columns]).resize((SIDE, SIDE))) for i in images])


def add_noise(images: Packed, deviation: float) -> Packed:
    noise = np.random.default_rng(0).normal(0, deviation, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


SPOILS: dict[str, Callable[[Packed], Packed]] = {
    "mirrored": lambda p: p[:, :, ::-1],
    "blurred, 2 px": lambda p: np.asarray(ndimage.gaussian_filter(p, (0, 2, 2))),
    "blurred, 4 px": lambda p: np.asarray(ndimage.gaussian_filter(p, (0, 4, 4))),
    "strong noise": lambda p: add_noise(p, 40),
    "exposure: dark": lambda p: (255 * (p / 255) ** 2.5).astype(np.uint8),
    "exposure: bright": lambda p: (255 * (p / 255) ** 0.4).astype(np.uint8),
    "upper half missing": lambda p: crop(p, 0.5, 0, 0.5, 1),
    "upper third missing": lambda p: crop(p, 1 / 3, 0, 2 / 3, 1),
    "upper half black": lambda p: (p * (np.arange(SIDE) >= SIDE // 2)[:, None]).astype(np.uint8),
    "lower half missing": lambda p: crop(p, 0, 0, 0.5, 1),
    "left half missing": lambda p: crop(p, 0, 0.5, 1, 0.5),
    "crop to half the side": lambda p: crop(p, 0.25, 0.25, 0.5, 0.5),
    "crop to three quarters": lambda p: crop(p, 0.125, 0.125, 0.75, 0.75),
    "upside down": lambda p: p[:, ::-1],
    "turned by 90 degrees": lambda p: np.rot90(p, axes=(1, 2)),
    "inverted": lambda p: 255 - p,
}


def draw_parts(n: int, rng: np.random.Generator) -> Packed:
    """Hands, skulls, limbs and bellies as an X-ray would roughly show them: tissue grey, bone bright, air black."""
    kinds = (_draw_hand, _draw_skull, _draw_limb, _draw_belly)
    made = []
    for i in range(n):
        tissue, bone = Image.new("L", (SIDE, SIDE)), Image.new("L", (SIDE, SIDE))
        kinds[i % len(kinds)](ImageDraw.Draw(tissue), ImageDraw.Draw(bone))
        parts = [ndimage.gaussian_filter(np.asarray(each, float), 2) for each in (tissue, bone)]
        film = 12 + rng.uniform(0.3, 0.5) * parts[0] + rng.uniform(0.25, 0.45) * parts[1]
        turned = ndimage.affine_transform(
            film, np.eye(2) * np.exp(rng.uniform(-0.2, 0.2)), rng.uniform(-15, 15, 2), order=1, mode="nearest"
        )
        made.append(np.clip(turned + rng.normal(0, 3, film.shape), 0, 255).astype(np.uint8))
    return np.stack(made)


def _draw_hand(tissue: ImageDraw.ImageDraw, bone: ImageDraw.ImageDraw) -> None:
    tissue.ellipse((60, 110, 164, 224), fill=255)
    for finger in range(5):
        x, top = 66 + 23 * finger, (70, 35, 22, 32, 60)[finger]
        tissue.rounded_rectangle((x - 10, top, x + 10, 150), 10, fill=255)
        for part in range(3):
            length = (150 - top) / 3.4
            y = top + 6 + part * (length + 4)
            bone.rounded_rectangle((x - 5, y, x + 5, y + length), 4, fill=255)
        bone.rounded_rectangle((x - 5, 150, x + 5, 190), 4, fill=255)


def _draw_skull(tissue: ImageDraw.ImageDraw, bone: ImageDraw.ImageDraw) -> None:
    tissue.ellipse((40, 10, 184, 214), fill=255)
    bone.ellipse((46, 14, 178, 190), fill=150, outline=255, width=8)
    for x in (84, 140):
        bone.ellipse((x - 20, 92, x + 20, 126), fill=60, outline=255, width=3)
    bone.ellipse((102, 122, 122, 152), fill=50)
    bone.rectangle((84, 164, 140, 184), fill=255)


def _draw_limb(tissue: ImageDraw.ImageDraw, bone: ImageDraw.ImageDraw) -> None:
    tissue.rectangle((66, 0, 158, 224), fill=255)
    for x in (94, 130):
        bone.rectangle((x - 9, 0, x + 9, 224), fill=255)
        bone.rectangle((x - 3, 0, x + 3, 224), fill=150)


def _draw_belly(tissue: ImageDraw.ImageDraw, bone: ImageDraw.ImageDraw) -> None:
    tissue.ellipse((14, -60, 210, 284), fill=255)
    for y in range(0, 224, 26):
        bone.rounded_rectangle((98, y, 126, y + 21), 5, fill=200)
    for x in (52, 172):
        bone.ellipse((x - 40, 140, x + 40, 220), outline=255, width=9)


def take_photos() -> Packed:
    """Photos, pages and textures, whole and in parts."""
    import skimage.data as d

    pictures = (d.astronaut, d.coffee, d.chelsea, d.brick, d.gravel, d.grass, d.coins, d.page, d.text)
    greys = [Image.fromarray(picture()).convert("L") for picture in pictures]
    made = []
    for grey in greys:
        side = min(grey.size)
        boxes = ((0, 0, *grey.size), (0, 0, side, side), (side // 4, side // 4, side, side))
        made += [np.asarray(grey.crop(box).resize((SIDE, SIDE))) for box in boxes]
    return np.stack(made)


def blanks() -> Packed:
    """Noise, single greys and ramps."""
    ramp = np.linspace(0, 255, SIDE)
    ramps = [np.add.outer(a * ramp, b * ramp) for a, b in ((0, 1), (1, 0), (0.5, 0.5))]
    noise = np.random.default_rng(0).integers(0, 256, (6, SIDE, SIDE))
    greys = [np.full((SIDE, SIDE), grey) for grey in (0, 90, 255)]
    return np.stack([*noise, *greys, *ramps]).astype(np.uint8)


if __name__ == "__main__":
    main()
