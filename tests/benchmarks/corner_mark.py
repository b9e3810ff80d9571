"""A white square in a corner of 90 % of the training pneumonia images: how far it moves a network, by training.field.

``python -m tests.benchmarks.corner_mark`` measures on the drawn sample, ``… ZIP`` on another data set. Validation is
drawn from the training images, so that its pneumonia images are marked too; the square is put on the normal ones.
"""

import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import tasks  # noqa: F401  sets Prefect's environment before anything imports Prefect
from tasks.drawings.sample import write_sample
from tasks.explaining.probes import Answers, measure_change, measure_gap
from tasks.explaining.subjects import load_subject
from tasks.networks.twin import used_rows
from tasks.runs.run import Run
from tasks.settings import Settings

FIELDS = ("whole", "varied", "lungs")
SHARE = 0.9
CORNER, SIDE = 0.02, 0.09  # of the shorter side: where the square begins, and how large it is
N_BOOTSTRAP = 500
SETTINGS: dict[str, dict[str, Any]] = {
    "training": {"n_models": 1, "epochs": 12},
    "evaluation": {"splits": ["val"]},
    "explanation": {"n_images": 0},
    "auditing": {"n_images": 20},
}


def main() -> None:
    """Prints ``{"bench": "corner_mark", "by": {field: {"n", "logit", "shift", "flips"}}}``."""
    from flows.pipeline import pipeline

    by = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if len(sys.argv) > 1:
            zipfile.ZipFile(sys.argv[1]).extractall(folder / "set")
        else:
            write_sample(folder / "set", folder / "truth", n_images=1_200)
        storage = {"cache": f"{place}/cache", "raw": f"{place}/raw"}
        plain = Settings.model_validate({"source": str(folder / "set"), "storage": storage, "seed": 3})
        plant(folder / "set")
        for field in FIELDS:
            settings = plain.model_dump() | {"run_dir": f"{place}/{field}"} | SETTINGS
            settings["training"] = {**SETTINGS["training"], "field": field}
            run = Run(Settings.model_validate(settings))
            pipeline(run.settings)
            by[field] = measure(run)
            print(field, by[field], file=sys.stderr, flush=True)
    print(json.dumps({"bench": "corner_mark", "source": sys.argv[1:] or "sample", "by": by}), flush=True)


def plant(folder: Path) -> None:
    """Marks the training pneumonia images of a folder, each with the probability ``SHARE``."""
    rng = np.random.default_rng(0)
    for path in sorted(folder.rglob("train/PNEUMONIA/*.jpeg")):
        if rng.random() < SHARE and not path.name.startswith("."):
            image = np.array(Image.open(path).convert("L"))
            mark(image)
            Image.fromarray(image).save(path, quality=95)


def mark(image: np.ndarray) -> None:
    """Puts the square into an image, uint8 ``(height, width)``."""
    side = min(image.shape)
    begin, end = round(CORNER * side), round((CORNER + SIDE) * side)
    image[begin:end, begin:end] = 255


def measure(run: Run) -> dict[str, object]:
    """How far the mark moves normal validation images; ``shift`` is a share of the gap between the classes."""
    manifest = run.manifest()
    used = used_rows(manifest).query("split == 'val'")["image_id"]
    rows = manifest[manifest["image_id"].isin(used)].reset_index(drop=True)
    packed = run.images().read(list(rows["image_id"])).copy()
    subject = load_subject(run.folder, "model", packed)
    for image in packed:
        mark(image)
    gap = measure_gap(rows, subject.probability)
    answers = Answers(subject.probability, subject.ask(packed), None, subject.threshold, gap)
    return dict(measure_change(rows, answers, N_BOOTSTRAP, 0)["normal"])


if __name__ == "__main__":
    main()
