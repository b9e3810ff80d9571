"""Drawn pictures: those of the embedded sample, but of other children, with the truth about each."""

import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from tasks.drawings.sample import write_sample
from tasks.pixels.decoding import decode
from tasks.pixels.greys import SIDE_PX


def draw_pictures(
    n_images: int, seed: int, truth: Literal["masks", "lungs"]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[Any]]:
    """Draws children's chests as the sample has them, 59 % of the sick ones with devices.

    Args:
        n_images: At least 24.
        seed: Of children and pictures.
        truth: What the masks show: devices (``masks``) or lungs.

    Returns:
        Pictures uint8 ``(n, 224, 224)``, masks the same, 255 sure, and whether there is a device, ``(n,)``.
    """
    with tempfile.TemporaryDirectory() as place:
        root, beside = Path(place) / "set", Path(place) / "truth"
        write_sample(root, beside, n_images=n_images, seed=seed)
        table = pd.read_csv(beside / "truth.csv")
        pixels = np.stack([decode((root / "chest_xray" / path).read_bytes()) for path in table["path"]])
        masks = np.zeros_like(pixels)
        for i, path in enumerate(table["path"]):
            file = beside / truth / f"{path}.png"
            if file.exists():
                mask = Image.fromarray((np.asarray(Image.open(file)) > 0).astype(np.uint8) * 255)
                masks[i] = np.asarray(mask.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR))
    return pixels, masks, table["device"].to_numpy()
