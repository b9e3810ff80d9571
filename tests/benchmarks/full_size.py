"""Chest X-rays drawn at the size of the public originals, for measurements: their files take as long to decode."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from tasks.drawings.chests import draw_chest, finish_film, imagine_child
from tasks.pixels.greys import SIDE_PX

WIDTH_PX, HEIGHT_PX = 1304, 968
QUALITY = 75  # takes as long to decode as a public original of this size (89 kB), about 1.5 ms


def write_full_size(folder: Path, *, n_drawn: int, n_files: int, seed: int = 1) -> pd.DataFrame:
    """Draws grey chest X-rays, half of them with pneumonia, and writes each under several names.

    The copies differ in their JPEG comment alone, so that nothing that goes by content takes them for one file.

    Args:
        folder: Root of the data set; the files lie in ``train/NORMAL`` and ``train/PNEUMONIA`` below it.
        n_drawn: Different pictures.
        n_files: Files.
        seed: Decides everything.

    Returns:
        A row per file: ``path`` below the root, ``sha256``, ``label`` and ``n_bytes``.
    """
    rows = []
    for drawn in range(n_drawn):
        rng, label = np.random.default_rng((seed, drawn)), drawn % 2
        film = draw_chest(imagine_child(rng), "bacteria" if label else "normal", 0.5, (HEIGHT_PX, WIDTH_PX), rng)
        picture = Image.fromarray(np.round(finish_film(film, rng) * 255).astype(np.uint8))
        for number in range(drawn, n_files, n_drawn):
            path = f"train/{'PNEUMONIA' if label else 'NORMAL'}/{number}.jpeg"
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file, quality=QUALITY, comment=f"copy {number}")
            content = file.read_bytes()
            sha256 = hashlib.sha256(content).hexdigest()
            rows.append({"path": path, "sha256": sha256, "label": label, "n_bytes": len(content)})
    return pd.DataFrame(rows)


def read_as_keras_does(folder: Path, batch_size: int) -> Any:
    """The peer of measurements, Keras' generator: decodes, shrinks and scales each file anew in every epoch.

    Args:
        folder: Holds a folder of files for each class.
        batch_size: Images a batch.

    Returns:
        Endless batches by ``next``, ``len(…)`` of them an epoch: float32 ``(n, 224, 224, 1)``, 0.0 to 1.0, and labels.
    """
    from tasks.networks.keras_backend import native_log_muted

    with native_log_muted():
        import tensorflow as tf
    return tf.keras.preprocessing.image.ImageDataGenerator(rescale=1 / 255).flow_from_directory(
        folder,
        target_size=(SIDE_PX, SIDE_PX),
        color_mode="grayscale",
        class_mode="binary",
        batch_size=batch_size,
        shuffle=True,
        seed=1,
    )
