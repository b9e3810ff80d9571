"""How fast packed shards become batches, against decoding full-size JPEGs in every epoch, as Keras' generator does."""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tasks.pixels.greys import SIDE_PX, to_float
from tasks.pixels.packed import PackedImages
from tasks.preparing.packing import pack, pack_shards, plan_packing
from tasks.runs.manifest import image_id, read_manifest, write_manifest
from tasks.runs.run import Run
from tasks.settings import Settings

from .full_size import HEIGHT_PX, WIDTH_PX, read_as_keras_does, write_full_size

N_DRAWN = 24
N_FILES = 192
BATCH_SIZE = 32
ROUNDS = 5
OWN_EPOCHS = 10  # one epoch is over in milliseconds


def main() -> None:
    """Prints ``{"bench": "input", "ratio", "images_per_s", "peer_images_per_s", …}``: medians over rounds."""
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
        folder = Path(place)
        manifest = write_full_size(folder / "set", n_drawn=N_DRAWN, n_files=N_FILES)
        manifest["image_id"] = manifest["path"].map(image_id)
        settings = Settings.model_validate(
            {
                "source": str(folder / "set"),
                "run_dir": str(folder / "run"),
                "storage": {"cache": str(folder / "cache"), "raw": str(folder / "raw")},
            }
        )
        (folder / "run").mkdir()
        write_manifest(folder / "run", manifest)
        pack_shards.fn(Run(settings), settings.source, 16, plan_packing.fn(Run(settings), 16))
        pack.fn(Run(settings), 16, N_FILES)
        own, peer = own_epoch(folder / "run", Path(settings.storage.cache)), peer_epoch(folder / "set" / "train")
        own(), peer()  # files in memory, code loaded
        rates: dict[str, list[float]] = {"own": [], "peer": []}
        for _ in range(ROUNDS):
            rates["own"].append(time_epochs(own, OWN_EPOCHS))
            rates["peer"].append(time_epochs(peer, 1))
    middle = {name: statistics.median(values) for name, values in rates.items()}
    result = {
        "bench": "input",
        "ratio": round(middle["own"] / middle["peer"], 1),
        "images_per_s": round(middle["own"], 1),
        "peer_images_per_s": round(middle["peer"], 1),
        "lowest": round(min(rates["own"]), 1),
        "highest": round(max(rates["own"]), 1),
        "peer_lowest": round(min(rates["peer"]), 1),
        "peer_highest": round(max(rates["peer"]), 1),
        "rounds": ROUNDS,
        "batch_size": BATCH_SIZE,
        "n_files": N_FILES,
        "n_drawn": N_DRAWN,
        "file_px": [WIDTH_PX, HEIGHT_PX],
        "file_kb": round(float(manifest["n_bytes"].mean()) / 1000),
    }
    print(json.dumps(result), flush=True)


def own_epoch(run: Path, cache: Path) -> Callable[[], int]:
    """An epoch of the product: all rows out of the mapped shards, then shuffled float batches and their labels."""
    manifest = read_manifest(run)
    image_ids, labels = list(manifest["image_id"]), manifest["label"].to_numpy(np.float32)
    images, rng = PackedImages(run, cache), np.random.default_rng(1)

    def run_epoch() -> int:
        pixels = images.read(image_ids)
        order = rng.permutation(len(labels))
        n_seen = 0
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            batch, _truth = to_float(pixels[rows]), labels[rows]
            assert batch.shape == (len(rows), SIDE_PX, SIDE_PX, 1)
            n_seen += len(batch)
        return n_seen

    return run_epoch


def peer_epoch(folder: Path) -> Callable[[], int]:
    """An epoch of Keras' generator: each file is decoded at its full size, shrunk and scaled, every time."""
    flow = read_as_keras_does(folder, BATCH_SIZE)

    def run_epoch() -> int:
        n_seen = 0
        for _ in range(len(flow)):
            batch, _truth = next(flow)
            assert batch.shape[1:] == (SIDE_PX, SIDE_PX, 1)
            n_seen += len(batch)
        return n_seen

    return run_epoch


def time_epochs(run_epoch: Callable[[], int], n_epochs: int) -> float:
    """Images a second over some epochs."""
    start = time.perf_counter()
    n_seen = sum(run_epoch() for _ in range(n_epochs))
    return n_seen / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
