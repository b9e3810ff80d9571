"""A small run folder made by hand: what screening leaves of a few images, without a source and without a network."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from tasks.pixels.masks import write_shard
from tasks.runs.manifest import write_manifest


def write_run(run: Path, scores: Sequence[float], cache: Path) -> pd.DataFrame:
    """Writes manifest, arrays and masks of drawn images with these device scores; returns the manifest.

    Every other image lies in ``train``; the mask of image ``i`` is a disc of brightness ``255 * scores[i]``.
    """
    paths = [f"{'train' if i % 2 == 0 else 'test'}/PNEUMONIA/person{i}_virus_{i}.jpeg" for i in range(len(scores))]
    pixels = np.stack([_draw(40 + 5 * i, 200) for i in range(len(scores))])
    masks = np.stack([_draw(0, round(255 * score)) for score in scores])
    manifest = pd.DataFrame(
        {
            "image_id": [hashlib.sha256(path.encode()).hexdigest()[:16] for path in paths],
            "path": paths,
            "sha256": [hashlib.sha256(image.tobytes()).hexdigest() for image in pixels],
            "label": 1,
            "split": [path.split("/")[0] for path in paths],
            "device_score": scores,
            "device_reviewed": False,
            "excluded": "",
        }
    )
    for folder in (run / "arrays", run / "masks", run / "lungs", cache / "shelf"):
        folder.mkdir(parents=True, exist_ok=True)
    write_manifest(run, manifest)
    np.save(cache / "shelf" / "shard.npy", pixels)
    write_shard(cache / "shelf" / "shard.npz", masks, scores=np.array(scores, np.float32))
    places = {image: [0, row] for row, image in enumerate(manifest["image_id"])}
    for name in ("arrays", "masks", "lungs"):
        shard = "shelf/shard.npy" if name == "arrays" else "shelf/shard.npz"
        (run / name / "index.json").write_text(json.dumps({"shards": [{"name": shard}], "images": places}))
    return manifest


def _draw(background: int, disc: int) -> np.ndarray:
    image = Image.new("L", (224, 224), background)
    ImageDraw.Draw(image).ellipse((80, 90, 110, 120), fill=disc)
    return np.asarray(image)
