"""A whole training epoch against one that decodes full-size JPEGs, and how much of it is not the network's own step."""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tasks.pixels.decoding import decode
from tasks.pixels.greys import SIDE_PX
from tasks.settings import TrainingSettings

from .full_size import read_as_keras_does, write_full_size

N_FILES = 192
BATCH_SIZE = 32
TIMES = 6  # each image so often in an epoch, or what an epoch does once would count for more than it does
VAL_SHARE = 0.18  # what validation has of the training images of the public data set
EPOCHS = 4  # the first one compiles and is left out


def main() -> None:
    """Prints ``{"bench": "train", "ratio", "outside_step_share", …}``: medians over epochs."""
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
        folder = Path(place)
        manifest = write_full_size(folder / "set", n_drawn=24, n_files=N_FILES)
        once = np.stack([decode((folder / "set" / path).read_bytes()) for path in manifest["path"]])
        packed = np.tile(once, (TIMES, 1, 1))
        labels = np.tile(manifest["label"].to_numpy(np.float32), TIMES)
        own, inside = own_epochs(packed, labels, folder / "run")
        peer = [TIMES * seconds for seconds in peer_epochs(folder / "set" / "train")]
    shares = [1 - step / whole for step, whole in zip(inside, own, strict=True)]
    result = {
        "bench": "train",
        "ratio": round(statistics.median(peer) / statistics.median(own), 2),
        "outside_step_share": round(statistics.median(shares), 3),
        "epoch_s": round(statistics.median(own), 2),
        "peer_epoch_s": round(statistics.median(peer), 2),
        "images_per_s": round(len(labels) / statistics.median(own), 1),
        "n_images": len(labels),
        "n_val": round(VAL_SHARE * len(labels)),
        "epochs": EPOCHS - 1,
    }
    print(json.dumps(result), flush=True)


def own_epochs(packed: np.ndarray, labels: np.ndarray, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds of whole epochs as training does them, with validation and checkpoint, and of the steps in them."""
    from tasks.networks.keras_backend import keras
    from tasks.training.labelled_images import LabelledImages, shrink_packed
    from tasks.training.members import Member, compile_trainer, train_member

    settings = TrainingSettings(epochs=EPOCHS, batch_size=BATCH_SIZE, field="whole")
    lesson = LabelledImages(shrink_packed(packed, settings.side_px), labels, np.full(len(labels), np.nan, np.float32))
    n_val = round(VAL_SHARE * len(labels))
    val = LabelledImages(lesson.pixels[:n_val], labels[:n_val], lesson.bacteria[:n_val])
    step, inside, ends = keras.Model.train_on_batch, [0.0], [time.perf_counter()]

    def timed(self: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        done = step(self, *arguments)
        inside[-1] += time.perf_counter() - start
        return done

    def note(entry: dict[str, Any]) -> None:
        ends.append(time.perf_counter())
        inside.append(0.0)

    keras.Model.train_on_batch = timed
    try:
        trainer = compile_trainer(settings, len(labels))
        train_member(trainer, {"train": lesson, "val": val}, settings, Member("member_1", 1, folder), note)
    finally:
        keras.Model.train_on_batch = step
    # The first epoch compiles; the last entry of `inside` is what came after the last epoch.
    return [float(whole) for whole in np.diff(ends)[1:]], inside[1:-1]


def peer_epochs(folder: Path) -> list[float]:
    """Seconds of whole epochs of the same network that is fed by Keras' generator, which decodes every file again."""
    from tasks.networks.checkpoints import build_optimizer
    from tasks.networks.classifier import build_member, shrink
    from tasks.networks.keras_backend import keras
    from tasks.training.members import two_questions

    settings = TrainingSettings(field="whole")
    member = build_member(settings, 1)
    pixels = keras.Input((SIDE_PX, SIDE_PX, 1))
    model = keras.Model(pixels, member(shrink(settings.side_px)(pixels)))
    flow = read_as_keras_does(folder, BATCH_SIZE)
    model.compile(optimizer=build_optimizer(1e-3, EPOCHS, flow.samples, BATCH_SIZE), loss=two_questions)
    seconds = []
    for _ in range(EPOCHS):
        start = time.perf_counter()
        for _ in range(len(flow)):
            batch, truth = next(flow)
            ones, nothing = np.ones_like(truth), np.zeros_like(truth)
            model.train_on_batch(batch, np.stack([truth, ones, nothing, nothing], axis=1))
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


if __name__ == "__main__":
    main()
