"""How fast the networks of a run are on this machine's accelerator: one JSON object.

``python -m tests.gpu.measure --epochs 24`` on the backend that ``KERAS_BACKEND`` names; on a machine without an
accelerator it measures the CPU, and says so. Pixels are drawn, as many as the public data set has for training.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tasks.settings import ExplanationSettings, TrainingSettings

N_DRAWN = 48


def main() -> None:
    """Prints seconds to import Keras, compile a step, train a member and explain an image, and images a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2, help="of one member; its first one compiles and is left out")
    parser.add_argument("--images", type=int, default=2_812, help="that are trained on")
    parser.add_argument("--field", default="varied", choices=("whole", "varied"), help="as training.field")
    asked = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        result = measure(asked.epochs, asked.images, asked.field)
    print(json.dumps(result), flush=True)


def measure(epochs: int, n_images: int, field: str) -> dict[str, Any]:
    """What ``main`` prints."""
    import_s = time_of(import_keras)
    from tasks.networks.classifier import predict
    from tasks.networks.keras_backend import keras
    from tasks.runs.provenance import describe_hardware
    from tasks.training.members import has_gpu

    packed, labels = draw_images(n_images)
    settings = TrainingSettings.model_validate({"epochs": max(2, epochs), "n_models": 1, "field": field})
    with tempfile.TemporaryDirectory() as place:
        entries, model = train(packed, labels, settings, Path(place))
    predict(model, packed[:64])
    predict_s = time_of(lambda: predict(model, packed[: 64 * 8]))
    explain(model, packed[0])
    explain_s = time_of(lambda: explain(model, packed[1]))
    return {
        "bench": "gpu",
        "backend": keras.backend.backend(),
        "on_gpu": has_gpu(),
        "hardware": describe_hardware(),
        "import_s": round(import_s, 2),
        "first_epoch_s": entries[0]["seconds"],  # with compiling
        "epoch_s": round(float(np.median([entry["seconds"] for entry in entries[1:]])), 2),
        "train_s": round(sum(entry["seconds"] for entry in entries), 2),
        "train_images_per_s": round(n_images / float(np.median([entry["seconds"] for entry in entries[1:]])), 1),
        "predict_images_per_s": round(min(n_images, 64 * 8) / predict_s, 1),
        "explain_s": round(explain_s, 2),
        "n_images": n_images,
        "epochs": len(entries),
        "field": field,
    }


def time_of(work: Callable[[], object]) -> float:
    """Seconds that the work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def import_keras() -> None:
    """Starts Keras with its backend."""
    import tasks.networks.keras_backend  # noqa: F401


def draw_images(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Drawn X-rays, each many times: uint8 ``(n, 224, 224)``, and labels float32 ``(n,)``."""
    from tasks.drawings.sample import write_sample
    from tasks.pixels.decoding import decode

    with tempfile.TemporaryDirectory() as place:
        write_sample(Path(place) / "set", Path(place) / "truth", n_images=N_DRAWN, seed=3)
        files = sorted((Path(place) / "set" / "chest_xray").glob("t*/*/*.jpeg"))
        once = np.stack([decode(file.read_bytes()) for file in files])
    at = np.arange(n) % len(once)
    return once[at], np.array([files[i].parent.name == "PNEUMONIA" for i in at], np.float32)


def train(
    packed: np.ndarray, labels: np.ndarray, settings: TrainingSettings, folder: Path
) -> tuple[list[dict[str, Any]], Any]:
    """The entries of the epochs of one member, as a run trains it, and the model made of it."""
    from tasks.networks.classifier import join_members
    from tasks.networks.files import load_network
    from tasks.training.labelled_images import LabelledImages, shrink_packed
    from tasks.training.members import Member, compile_trainer, train_member

    small, unknown = shrink_packed(packed, settings.side_px), np.full(len(labels), np.nan, np.float32)
    lesson = LabelledImages(small, labels, unknown, np.where(small > small.mean(), 0, 255).astype(np.uint8))
    val = LabelledImages(small[:500], labels[:500], unknown[:500], None)
    trainer = compile_trainer(settings, len(labels))
    entries = train_member(trainer, {"train": lesson, "val": val}, settings, Member("member_1", 1, folder), print)
    return entries, join_members([load_network(folder, "member_1")])


def explain(model: Any, image: np.ndarray) -> object:
    """The LIME weights of an image, with the settings of a run, from cutting on."""
    from tasks.explaining.lime_sampling import cut_image, weigh_pieces
    from tasks.networks.classifier import predict_pixels
    from tasks.pixels.greys import to_float

    wanted = ExplanationSettings()
    return weigh_pieces(
        cut_image(to_float(image[None])[0, ..., 0], wanted.n_segments),
        lambda grey: predict_pixels(model, [grey[..., None]]),
        n_samples=wanted.n_samples,
        batch_size=wanted.batch_size,
        seed=1,
    )


if __name__ == "__main__":
    main()
