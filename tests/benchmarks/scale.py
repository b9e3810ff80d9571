"""Whether packing ten times as many images takes ten times as long, and no more memory.

Each packing runs in a process of its own, and this one imports nothing heavy: a child counts the memory of the
process it was forked from among its own peak.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.settings import Settings

N_IMAGES = 600  # ten times that is about the size of the public data set
TIMES = 10
N_DRAWN = 60
ROUNDS = 3


def main() -> None:
    """Prints ``{"bench": "scale", "time_ratio", "memory_ratio", …}``: medians over rounds, large to small."""
    counts = {"small": N_IMAGES, "large": N_IMAGES * TIMES}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for size, n_images in counts.items():
            run_child("prepare", folder / size, n_images)
        found: dict[str, list[dict[str, float]]] = {size: [] for size in counts}
        for _ in range(ROUNDS):
            for size, n_images in counts.items():
                found[size].append(run_child("pack", folder / size, n_images))
    middle = {
        size: {name: statistics.median(said[name] for said in rounds) for name in rounds[0]}
        for size, rounds in found.items()
    }
    small, large = middle["small"], middle["large"]
    result = {
        "bench": "scale",
        "time_ratio": round(large["seconds"] / small["seconds"], 2),
        "memory_ratio": round(large["peak_mb"] / small["peak_mb"], 3),
        "n_small": N_IMAGES,
        "n_large": N_IMAGES * TIMES,
        "n_drawn": N_DRAWN,
        "rounds": ROUNDS,
        "seconds_small": round(small["seconds"], 2),
        "seconds_large": round(large["seconds"], 2),
        "images_per_s": round(N_IMAGES * TIMES / large["seconds"], 1),
        "peak_mb_small": round(small["peak_mb"], 1),
        "peak_mb_large": round(large["peak_mb"], 1),
        # What importing alone takes; above it lies what packing takes.
        "start_mb": round(large["start_mb"], 1),
    }
    print(json.dumps(result), flush=True)


def run_child(verb: str, folder: Path, n_images: int) -> dict[str, float]:
    """Runs a part of this module in a fresh process; the last line it prints is JSON."""
    command = [sys.executable, "-m", "tests.benchmarks.scale", verb, str(folder), str(n_images)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def prepare(folder: Path, n_images: int) -> None:
    """Draws X-rays, repeats them under other names until there are enough, and lists them in a manifest.

    The copies differ in their JPEG comment alone, or packing would decode one of them and point the others to it.
    """
    import hashlib

    import pandas as pd

    from tasks.drawings.sample import write_sample
    from tasks.runs.manifest import image_id, write_manifest

    write_sample(folder / "drawn", folder / "truth", n_images=N_DRAWN, seed=3)
    drawn = [file.read_bytes() for file in sorted((folder / "drawn" / "chest_xray").glob("t*/*/*.jpeg"))]
    rows = []
    for number in range(n_images):
        path = f"train/PNEUMONIA/person{number}_virus_1.jpeg"
        content = with_comment(drawn[number % len(drawn)], f"copy {number}")
        (folder / "set" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "set" / path).write_bytes(content)
        rows.append({"path": path, "image_id": image_id(path), "sha256": hashlib.sha256(content).hexdigest()})
    (folder / "run").mkdir()
    write_manifest(folder / "run", pd.DataFrame(rows))
    print(json.dumps({"n_images": n_images}))


def with_comment(jpeg: bytes, text: str) -> bytes:
    """A JPEG with a comment segment behind its first marker."""
    return jpeg[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text.encode() + jpeg[2:]


def pack_once(folder: Path, n_images: int) -> None:
    """Packs all images into an empty cache; prints seconds, and the peak memory of this process in MB."""
    import os
    import time
    from concurrent.futures import ThreadPoolExecutor

    from tasks.preparing.packing import pack, pack_shards, plan_packing
    from tasks.runs.run import Run

    settings, start_mb = settings_of(folder), read_peak_mb()
    run = Run(settings)
    start = time.perf_counter()
    shards = plan_packing.fn(run, 16)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # as the flow does it
        list(threads.map(lambda files: pack_shards.fn(run, settings.source, 16, [files]), shards))
    facts = pack.fn(run, 16, sum(len(files) for files in shards))
    seconds = time.perf_counter() - start
    assert facts["n_new"] == facts["n_packed"] == n_images, facts
    print(json.dumps({"seconds": seconds, "peak_mb": read_peak_mb(), "start_mb": start_mb}))
    shutil.rmtree(settings.storage.cache)


def read_peak_mb() -> float:
    """The most memory that this process has held so far, in MB (10^6 bytes)."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def settings_of(folder: Path) -> "Settings":
    """Settings of a run on the files of ``folder``."""
    from tasks.settings import Settings

    storage = {"cache": str(folder / "cache"), "raw": str(folder / "raw")}
    return Settings.model_validate({"source": str(folder / "set"), "run_dir": str(folder / "run"), "storage": storage})


if __name__ == "__main__":
    if sys.argv[1:]:
        {"prepare": prepare, "pack": pack_once}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
