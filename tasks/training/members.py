"""Members: trains one network of the model, epoch by epoch, and resumes a training that was killed.

Pixels lie on the accelerator for the whole training; a step sends row numbers and labels there, nothing else. After
each epoch a checkpoint is kept, and at SIGTERM or Ctrl-C after the step that is being done. Every random choice of an
epoch follows from seed, member and epoch: resumed and unbroken trainings see the same.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from tasks.errors import RunError
from tasks.files import digest, read_record, write_whole
from tasks.networks.augmentation import BorderBlank, DetailShift, ExposureShift, FramingShift
from tasks.networks.checkpoints import (
    build_optimizer,
    load_checkpoint,
    put_seeds,
    read_seeds,
    reseed,
    run_stoppable,
    save_checkpoint,
)
from tasks.networks.classifier import build_member, shrink
from tasks.networks.files import check_network, save_network
from tasks.networks.keras_backend import keras
from tasks.pixels.decoding import to_float
from tasks.records import Facts
from tasks.settings import TrainingSettings

ops = keras.ops
SMOOTHING = 0.1
"""Labels are taken as 0.05 and 0.95: a network that may not be certain keeps its logits apart and finite."""
BACTERIA_SHARE = 0.3
"""Weight of the second question, bacteria or virus, in the loss."""


@dataclass(frozen=True)
class LabelledImages:
    """Images and what is known of them.

    Attributes:
        pixels: uint8 ``(n, side_px, side_px)``.
        labels: float32 ``(n,)``, 1 for pneumonia.
        bacteria: float32 ``(n,)``, 1 for bacteria, 0 for virus, NaN where unknown or no pneumonia.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.float32]
    bacteria: NDArray[np.float32]


@keras.saving.register_keras_serializable("x_ray")
class ResidentImages(keras.layers.Layer):
    """Row numbers, int32 ``(n,)``, to images, float32 ``(n, side, side, 1)`` in 0.0 to 1.0, out of memory on the
    device.

    The pixels are no part of what is saved: ``put`` brings them back after loading.
    """

    def __init__(self, n_images: int, side_px: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_images, self.side_px = n_images, side_px

    def build(self, input_shape: Any) -> None:
        """Room for the pixels."""
        shape = (self.n_images, self.side_px, self.side_px)
        self.pixels = self.add_weight(
            shape=shape, dtype="uint8", initializer="zeros", trainable=False, autocast=False, name="pixels"
        )

    def put(self, pixels: NDArray[np.uint8]) -> None:
        """Sets the pixels, uint8 ``(n_images, side_px, side_px)``."""
        self.pixels.assign(pixels)

    def call(self, rows: Any) -> Any:
        """Applies the layer to a batch."""
        return ops.expand_dims(ops.cast(ops.take(self.pixels, rows, axis=0), "float32"), -1) / 255.0

    def save_own_variables(self, store: Any) -> None:
        """Saves nothing."""

    def load_own_variables(self, store: Any) -> None:
        """Loads nothing."""

    def get_config(self) -> dict[str, Any]:
        """What a saved checkpoint needs to build the layer again."""
        return {**super().get_config(), "n_images": self.n_images, "side_px": self.side_px}


@keras.saving.register_keras_serializable("x_ray")
def two_questions(truth: Any, logits: Any) -> Any:
    """Loss of each image, ``(n,)``: pneumonia or not, and for pneumonia of known subtype bacteria or virus.

    Args:
        truth: ``(n, 4)``: label, its weight, bacteria, its weight.
        logits: ``(n, 2)``.
    """
    target = truth[:, 0] * (1.0 - SMOOTHING) + SMOOTHING / 2
    entropy = keras.losses.binary_crossentropy
    first = entropy(target[:, None], logits[:, :1], from_logits=True)
    second = entropy(truth[:, 2:3], logits[:, 1:], from_logits=True)
    return truth[:, 1] * first + BACTERIA_SHARE * truth[:, 3] * second


def shrink_packed(packed: NDArray[np.uint8], side_px: int, batch_size: int = 256) -> NDArray[np.uint8]:
    """uint8 ``(n, 224, 224)`` to ``(n, side_px, side_px)`` by the layer that the kept model has, once a training."""
    layer = shrink(side_px)
    small = np.empty((len(packed), side_px, side_px), np.uint8)
    for start in range(0, len(packed), batch_size):
        grey = ops.convert_to_numpy(layer(to_float(packed[start : start + batch_size])))[..., 0]
        small[start : start + batch_size] = np.rint(np.clip(grey, 0, 1) * 255)
    return small


def build_trainer(member: keras.Model, n_images: int, seed: int) -> keras.Model:
    """Row numbers of resident images to a member's logits, through the augmentation."""
    rows = keras.Input((), dtype="int32", name="rows")
    x = ResidentImages(n_images, member.input_shape[1], dtype="float32", name="resident")(rows)
    for i, kind in enumerate((ExposureShift, DetailShift, BorderBlank, FramingShift), start=1):
        x = kind(seed=seed + i, dtype="float32")(x)
    return keras.Model(rows, member(x), name="trainer")


def compile_trainer(settings: TrainingSettings, n_images: int) -> keras.Model:
    """A trainer with its optimiser and loss; members use it in turn, so that its step is compiled once."""
    with compute_precision():
        trainer = build_trainer(build_member(settings, seed=0, name="member"), n_images, seed=0)
    optimizer = build_optimizer(settings.learning_rate, settings.epochs, n_images, settings.batch_size)
    trainer.compile(optimizer=optimizer, loss=two_questions)
    optimizer.build(trainer.trainable_variables)
    return trainer


def start_afresh(trainer: keras.Model, settings: TrainingSettings, seed: int) -> None:
    """Gives the trainer the initial weights of a seed, and an optimiser that remembers nothing."""
    trainer.get_layer("member").set_weights(build_member(settings, seed).get_weights())
    for variable in trainer.optimizer.variables:
        variable.assign(np.zeros(variable.shape, variable.dtype))


def train_member(
    trainer: keras.Model,
    train: LabelledImages,
    val: LabelledImages,
    settings: TrainingSettings,
    seed: int,
    folder: Path,
    name: str,
    show: Callable[[Facts], None],
) -> list[Facts]:
    """Trains one network into ``<name>.keras`` in a folder; resumes what a killed training left there.

    What is kept is a moving average of the weights over about an epoch, as it stands after the last epoch: with a rate
    that has come down by then, the average generalises better than any single step (Izmailov et al. 2018), and nothing
    has to be picked by validation, where the best epochs differ by chance. Training itself keeps the plain weights.

    Args:
        trainer: From ``compile_trainer``, in any state.
        train: What is learnt from.
        val: What is measured after each epoch, for people to see; nothing is chosen by it.
        settings: The recipe.
        seed: Seed of this member: initial weights, order, augmentation.
        folder: Where the finished network goes; its checkpoints lie in a folder of its name there.
        name: Name of the network.
        show: Called with the entry of each epoch.

    Returns:
        An entry ``epoch, loss, val_auc, seconds`` for each epoch.

    Raises:
        RunError: If the loss is no number any more.
    """
    checkpoints = folder / name
    if (finished := read_finished(folder, name)) is not None:
        shutil.rmtree(checkpoints, ignore_errors=True)  # of a process that was killed just before it did so
        return finished
    checkpoints.mkdir(parents=True, exist_ok=True)
    of = digest([settings.model_dump(), seed, name, len(train.labels)])
    if (kept := load_checkpoint(checkpoints, of)) is not None:
        trainer, state = kept
        after = f"epoch {len(state['history'])}" + (f" and {len(state['losses'])} steps" if state["losses"] else "")
        print(f"{name.replace('_', ' ')}: resuming after {after} from {checkpoints}")
    else:
        state = {"history": [], "losses": [], "seeds": [], "of": of}
        start_afresh(trainer, settings, seed)
    member = trainer.get_layer("member")
    trainer.get_layer("resident").put(train.pixels)
    truth = describe_truth(train)

    def train_epochs(look: Callable[[Callable[[], None]], None], state: Facts = state) -> list[Facts]:
        while len(state["history"]) < settings.epochs:
            epoch = len(state["history"]) + 1
            start = time.perf_counter()
            order = np.random.default_rng([seed, epoch]).permutation(len(truth)).astype(np.int32)
            if state["losses"]:
                put_seeds(trainer, state["seeds"])
            else:
                reseed(trainer, seed, epoch)

            def save(state: Facts = state) -> None:
                save_checkpoint(trainer, {**state, "seeds": read_seeds(trainer)}, checkpoints)

            between = partial(look, save)
            loss = run_epoch(trainer, truth, order, settings.batch_size, state["losses"], between)
            if not math.isfinite(loss):
                raise RunError(
                    f"training.learning_rate: the loss is no number any more in epoch {epoch}; give a lower rate than "
                    f"{settings.learning_rate:g}"
                )
            plain = member.get_weights()
            trainer.optimizer.finalize_variable_values(trainer.trainable_variables)
            # Copied: on JAX weights and averages would share memory, and asking the network gives its weights' memory
            # away.
            member.set_weights(member.get_weights())
            auc = float(roc_auc_score(val.labels, first_logits(member, val.pixels)))
            if epoch < settings.epochs:
                member.set_weights(plain)
            seconds = round(time.perf_counter() - start, 2)
            entry = {"epoch": epoch, "loss": round(loss, 6), "val_auc": round(auc, 6), "seconds": seconds}
            state = {"history": [*state["history"], entry], "losses": [], "seeds": [], "of": of}
            save_checkpoint(trainer, state, checkpoints)
            show(entry)
            look(lambda: None)  # all is saved
        return list(state["history"])

    history = run_stoppable(train_epochs)
    # Built anew: the kept network computes in single precision, whatever it was trained in.
    finished_member = build_member(settings.model_copy(update={"weights": None}), seed, name)
    finished_member.set_weights(member.get_weights())
    save_network(finished_member, folder, name)
    # Last: a member without it is not finished.
    write_whole(folder / f"{name}.json", json.dumps({"history": history}))
    shutil.rmtree(checkpoints)
    return history


def read_finished(folder: Path, name: str) -> list[Facts] | None:
    """The epochs of a member whose training is over; ``None`` where it is not, or a file of it is damaged."""
    if not (folder / f"{name}.json").exists():
        return None
    try:
        check_network(folder, name)
        return list(read_record(folder / f"{name}.json", history=list)["history"])
    except RunError as error:
        print(f"{name.replace('_', ' ')} is trained again: {error}")
        return None


def describe_truth(images: LabelledImages) -> NDArray[np.float32]:
    """What ``two_questions`` asks: label, its weight, bacteria, its weight; float32 ``(n, 4)``.

    The weights of each question give both of its answers the same sum and have mean 1 over the images asked about; an
    image of unknown subtype, or without pneumonia, has weight 0 in the second.
    """
    asked = np.isfinite(images.bacteria)
    bacteria = np.where(asked, images.bacteria, 0).astype(np.float32)
    second = np.zeros(len(asked), np.float32)
    if len(np.unique(bacteria[asked])) == 2:
        second[asked] = class_weights(bacteria[asked])
    return np.stack([images.labels, class_weights(images.labels), bacteria, second], axis=1)


def class_weights(labels: NDArray[np.float32]) -> NDArray[np.float32]:
    """A weight per image, float32 ``(n,)`` with mean 1, that gives both classes the same sum."""
    share = labels.mean()
    return np.where(labels == 1, 0.5 / share, 0.5 / (1 - share)).astype(np.float32)


def run_epoch(
    trainer: keras.Model,
    truth: NDArray[np.float32],
    order: NDArray[np.int32],
    batch_size: int,
    losses: list[float],
    between: Callable[[], None],
) -> float:
    """One pass over the resident images in the given order; returns the mean loss.

    Args:
        trainer: As it stands after the steps that are done.
        truth: Of all images.
        order: Of their rows.
        batch_size: Rows of a step.
        losses: Summed losses of the steps that are done; those of the others join them.
        between: Called after each step.
    """
    for start in range(len(losses) * batch_size, len(order), batch_size):
        rows = order[start : start + batch_size]
        loss = trainer.train_on_batch(rows, truth[rows])
        losses.append(float(np.ravel(loss)[0]) * len(rows))
        trainer.reset_metrics()
        between()
    return float(np.sum(losses) / len(order))


@contextmanager
def compute_precision() -> Iterator[None]:
    """Layers built inside compute in bfloat16 where a GPU does it faster, with weights in single precision."""
    before = keras.config.dtype_policy()
    if has_gpu():
        keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def has_gpu() -> bool:
    """Whether the backend computes on a GPU."""
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        return bool(torch.cuda.is_available())
    if backend == "jax":
        import jax

        return bool(jax.default_backend() == "gpu")
    return bool(keras.distribution.list_devices("gpu"))


def first_logits(member: keras.Model, small: NDArray[np.uint8], batch_size: int = 64) -> NDArray[np.float64]:
    """The member's logits of pneumonia for uint8 ``(n, side_px, side_px)``: float64 ``(n,)``."""
    parts = [member.predict_on_batch(to_float(small[i : i + batch_size])) for i in range(0, len(small), batch_size)]
    return np.concatenate([ops.convert_to_numpy(part) for part in parts])[:, 0].astype(np.float64)
