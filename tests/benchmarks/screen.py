"""How many packed images a second the shipped screener scores and masks, alone and with the segmenter of lungs.

Also whether memory grows with their number.
"""

import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from tasks.devices.files import SHIPPED_SCREENER
from tasks.devices.screener import load_screener, screen_pixels
from tasks.drawings.sample import write_sample
from tasks.networks.segmenter import load_segmenter, segment_pixels
from tasks.pixels.decoding import decode
from tasks.pixels.masks import write_shard

N_IMAGES = 300
ROUNDS = 5
SHARD_IMAGES = 100


def main() -> None:
    """Prints ``{"bench": "screen", "images_per_s", "with_lungs_per_s", "memory_ratio", …}``; masks are written."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_sample(folder / "set", folder / "truth", n_images=N_IMAGES, seed=3)
        files = sorted((folder / "set" / "chest_xray").glob("t*/*/*.jpeg"))
        packed = np.stack([decode(file.read_bytes()) for file in files])
        model = load_screener(SHIPPED_SCREENER)
        list(screen_pixels(model, packed[:64]))
        segmenter = load_segmenter()
        list(segment_pixels(segmenter, packed[:64]))
        rates, rates_with_lungs, peaks = [], [], []
        for turn in range(ROUNDS):
            start = time.perf_counter()
            for first in range(0, len(packed), SHARD_IMAGES):
                said = list(screen_pixels(model, packed[first : first + SHARD_IMAGES]))
                scores, masks = (np.concatenate(parts) for parts in zip(*said, strict=True))
                write_shard(folder / f"{turn}-{first}.npz", masks, scores=scores)
            rates.append(len(packed) / (time.perf_counter() - start))
            for first in range(0, len(packed), SHARD_IMAGES):
                lungs = np.concatenate(list(segment_pixels(segmenter, packed[first : first + SHARD_IMAGES])))
                write_shard(folder / f"lungs-{turn}-{first}.npz", lungs)
            rates_with_lungs.append(len(packed) / (time.perf_counter() - start))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    result = {
        "bench": "screen",
        "images_per_s": round(statistics.median(rates), 1),
        "with_lungs_per_s": round(statistics.median(rates_with_lungs), 1),
        "lowest": round(min(rates), 1),
        "highest": round(max(rates), 1),
        "n_images": len(packed) * ROUNDS,
        # Peak memory after five times as many images, against that after the first round.
        "memory_ratio": round(peaks[-1] / peaks[0], 3),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
