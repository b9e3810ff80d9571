"""Shared by all trainings: schedule, seeds of an epoch, checkpoints, stop signals."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tasks.errors import RunError
from tasks.files import digest, inside, read_record, room_in, sha256_of_file, write_whole
from tasks.networks.files import load_checked
from tasks.networks.keras_backend import keras
from tasks.records import Facts

CHECKPOINT = "checkpoint.json"

T = TypeVar("T")


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


@keras.saving.register_keras_serializable("x_ray")
def mean_of_losses(truth: Any, losses: Any) -> Any:
    """The loss of a trainer that gives the loss of each picture itself; ``truth`` is not looked at."""
    return keras.ops.mean(losses)


def reseed(model: Any, seed: int, epoch: int) -> None:
    """Sets the seed of every random layer, also in nested models, from the seed and the epoch."""
    for i, state in enumerate(_flatten(model)):
        if state is not None:
            state.assign(np.array([(seed * 1_000_003 + epoch) % 2**31, i], dtype="uint32"))


def read_seeds(model: Any) -> list[list[int]]:
    """The state of every random layer, which a saved model does not hold; for ``put_seeds``."""
    return [keras.ops.convert_to_numpy(state).tolist() for state in _flatten(model) if state is not None]


def put_seeds(model: Any, seeds: list[list[int]]) -> None:
    """Restores the state of every random layer from ``read_seeds``."""
    states = [state for state in _flatten(model) if state is not None]
    for state, seed in zip(states, seeds, strict=True):
        state.assign(np.array(seed, dtype="uint32"))


def _flatten(model: Any) -> Iterator[Any]:
    """For each layer, also in nested models, the variable that holds its seed, or ``None``."""
    for layer in every_layer(model):
        generator = getattr(layer, "generator", None) or getattr(layer, "seed_generator", None)
        yield generator and generator.state


def every_layer(model: Any) -> Iterator[Any]:
    """All layers, each nested model followed by its own."""
    for layer in model.layers:
        yield layer
        if isinstance(layer, keras.Model):
            yield from every_layer(layer)


def save_checkpoint(model: Any, state: Facts, folder: Path) -> None:
    """Saves model and optimiser; a small JSON record, written last, names the valid file, with checksums of both.

    Args:
        model: A compiled model.
        state: ``history``, an entry for each finished epoch, and ``losses`` of the steps since.
        folder: The folder of this network alone.
    """
    steps = len(state.get("losses", ()))
    name = f"checkpoint-{len(state['history'])}{f'-{steps}' if steps else ''}.keras"
    beside = folder / "checkpoint-.partial.keras"  # Keras picks the format by the ending
    variables = [*model.trainable_variables, *model.optimizer.variables]
    try:
        with room_in(folder, sum(4 * int(np.prod(variable.shape)) for variable in variables)):
            model.save(beside)
            beside.replace(folder / name)
    finally:
        beside.unlink(missing_ok=True)
    record = {**state, "model": name, "sha256": sha256_of_file(folder / name)}
    write_whole(folder / CHECKPOINT, json.dumps({**record, "digest": digest(record)}))
    for old in folder.glob("checkpoint-*.keras"):
        if old.name != name:
            old.unlink()


def run_stoppable(train: Callable[[Callable[[Callable[[], None]], None]], T]) -> T:
    """Trains in a thread of its own, so that a signal, which raises in the main thread, stops it between two steps.

    So SIGTERM, which is sent before a machine is taken away, and Ctrl-C cost no step: Prefect's handler, or any other,
    raises here, and its exception is passed on once the training has saved a checkpoint.

    Args:
        train: Given a function to call between two steps, with one that saves a checkpoint. That call saves and stops
    the training after a signal.
    """
    stop, ready = threading.Event(), threading.Event()

    def look(save: Callable[[], None]) -> None:
        if stop.is_set():
            save()
            raise _StoppedError

    def begin() -> T:
        # The pool waits at its end for a thread only once ``submit`` has returned: nothing is trained before.
        ready.wait()
        look(lambda: None)
        return train(look)

    with ThreadPoolExecutor(1, "training") as pool:  # waits for the thread at the end
        try:
            future = pool.submit(copy_context().run, begin)
            ready.set()
            return future.result()
        finally:
            stop.set()
            ready.set()


class _StoppedError(Exception):
    """Ends the training thread early; the main thread raises the signal's exception."""


def load_checkpoint(folder: Path, of: str) -> tuple[Any, Facts] | None:
    """Model and state of a training to resume; ``None`` if there is no usable checkpoint.

    A checkpoint that is damaged, or of another training, costs its epochs, not the run: it is ignored, and the training
    starts again.

    Args:
        folder: The folder given to ``save_checkpoint``.
        of: The training that the checkpoint must belong to, as in the entry ``of`` of its state.
    """
    if not (folder / CHECKPOINT).exists():
        return None
    try:
        state = read_record(folder / CHECKPOINT, history=list, model=str, sha256=str, of=str)
        if state.pop("digest", "") != digest(state):
            raise RunError(f"{folder / CHECKPOINT} is damaged")
        if state["of"] != of:
            raise RunError(f"{folder / CHECKPOINT} is of another training")
        return load_checked(inside(folder, state["model"]), state["sha256"], compiled=True), state
    except RunError as error:
        print(f"the checkpoint cannot be resumed, training starts again: {error}")
        return None
