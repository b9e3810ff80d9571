"""What the trainings of classifier and screener share: schedule, seeds of an epoch, checkpoints."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tasks.keras_backend import keras
from tasks.network_files import load_checked
from tasks.records import Facts, RunError
from tasks.storage import inside, read_record, sha256_of_file, write_whole

CHECKPOINT = "checkpoint.json"


def build_optimizer(learning_rate: float, epochs: int, n_train: int, batch_size: int) -> Any:
    """AdamW with one epoch of warm-up, a cosine down to 2 % and a moving average of the weights over an epoch."""
    steps = max(1, -(-n_train // batch_size))
    schedule = keras.optimizers.schedules.CosineDecay(
        learning_rate / 10,
        decay_steps=max(1, steps * (epochs - 1)),
        alpha=0.2,  # of the initial rate, a tenth of the peak: 2 % of the peak
        warmup_target=learning_rate,
        warmup_steps=steps,
    )
    momentum = float(np.clip(1 - 1 / steps, 0.5, 0.99))
    return keras.optimizers.AdamW(schedule, weight_decay=0.02, use_ema=True, ema_momentum=momentum)


def reseed(model: Any, seed: int, epoch: int) -> None:
    """Sets the seed of every random layer, in nested models too, to one that follows from the seed and the epoch."""
    for i, layer in enumerate(_flatten(model)):
        generator = getattr(layer, "generator", None) or getattr(layer, "seed_generator", None)
        if generator is not None:
            generator.state.assign(np.array([(seed * 1_000_003 + epoch) % 2**31, i], dtype="uint32"))


def _flatten(model: Any) -> Iterator[Any]:
    for layer in model.layers:
        yield layer
        if isinstance(layer, keras.Model):
            yield from _flatten(layer)


def save_checkpoint(model: Any, state: Facts, folder: Path) -> None:
    """Keeps model and optimiser; the small JSON, written last, says which file counts, and its sha256."""
    name = f"checkpoint-{len(state['history'])}.keras"
    model.save(folder / name)
    kept = {**state, "model": name, "sha256": sha256_of_file(folder / name)}
    write_whole(folder / CHECKPOINT, json.dumps(kept))
    for old in folder.glob("checkpoint-*.keras"):
        if old.name != name:
            old.unlink()


def load_checkpoint(folder: Path, of: str) -> tuple[Any, Facts] | None:
    """Model and state of a training that was killed; ``None`` where there is none to go on from.

    A checkpoint that is damaged, or of another training, costs the epochs in it and not the run: it is left alone, and
    the training starts afresh.

    Args:
        folder: Where ``save_checkpoint`` kept it.
        of: What the state has to say under this name: which training it belongs to.
    """
    if not (folder / CHECKPOINT).exists():
        return None
    try:
        state = read_record(folder / CHECKPOINT, history=list, model=str, sha256=str, of=str)
        if state["of"] != of:
            raise RunError(f"{folder / CHECKPOINT} is of another training")
        return load_checked(inside(folder, state["model"]), state["sha256"], compiled=True), state
    except RunError as error:
        print(f"the checkpoint cannot be gone on from, training starts afresh: {error}")
        return None
