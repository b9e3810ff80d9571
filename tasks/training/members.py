"""Members: trains one network of the model, epoch by epoch, and resumes a training that was killed.

Pixels lie on the accelerator for the whole training; a step sends row numbers and labels there, nothing else. After
each epoch a checkpoint is kept, and at SIGTERM or Ctrl-C after the step that is being done. Every random choice of an
epoch follows from seed, member and epoch: resumed and unbroken trainings see the same.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
from tasks.networks.classifier import build_member
from tasks.networks.field_augmentation import VaryMasks, VaryOutside
from tasks.networks.files import check_network, save_network
from tasks.networks.keras_backend import keras
from tasks.records import Facts
from tasks.settings import TrainingSettings
from tasks.training.labelled_images import LabelledImages, describe_truth
from tasks.training.settling import first_logits, settle_normalisation

Look = Callable[[Callable[[], None]], None]
"""What ``run_stoppable`` gives: called between two steps, with a function that saves a checkpoint."""

layers, ops = keras.layers, keras.ops
SMOOTHING = 0.1
"""Labels are taken as 0.05 and 0.95: a network that may not be certain keeps its logits apart and finite."""
BACTERIA_SHARE = 0.3
"""Weight of the second question, bacteria or virus, in the loss."""


@dataclass(frozen=True)
class Member:
    """One network of the model.

    Attributes:
        name: Its name.
        seed: Seed of its initial weights, of the order of the images, and of the augmentation.
        folder: Where its finished files go.
    """

    name: str
    seed: int
    folder: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / self.name

    @property
    def record(self) -> Path:
        """The file with its epochs, which only a finished member has."""
        return self.folder / f"{self.name}.json"

    def __str__(self) -> str:
        """``member 1``."""
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Training:
    """The training of a member, as far as it is.

    Attributes:
        trainer: As it stands after the steps that are done.
        settings: The recipe.
        member: The network that is trained.
        state: ``history``, an entry for each finished epoch; ``losses``, summed over the images of a step, of the steps
            since; ``seeds`` of the random layers after these; and which training it is the state ``of``.
    """

    trainer: keras.Model
    settings: TrainingSettings
    member: Member
    state: Facts

    @property
    def epoch(self) -> int:
        """The number of the epoch that is being done, from 1."""
        return len(self.state["history"]) + 1

    def save_steps(self) -> None:
        """Saves a checkpoint within an epoch."""
        self.state["seeds"] = read_seeds(self.trainer)
        save_checkpoint(self.trainer, self.state, self.member.checkpoints)

    def finish_epoch(self, entry: Facts) -> None:
        """Enters the epoch into the history, and saves a checkpoint."""
        self.state.update(history=[*self.state["history"], entry], losses=[], seeds=[])
        save_checkpoint(self.trainer, self.state, self.member.checkpoints)


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


def build_trainer(member: keras.Model, n_images: int, seed: int, field: str = "whole") -> keras.Model:
    """Row numbers of resident images to a member's logits, through the augmentation."""
    rows = keras.Input((), dtype="int32", name="rows")
    side_px = member.inputs[0].shape[1]
    x = ResidentImages(n_images, side_px, dtype="float32", name="resident")(rows)
    for i, kind in enumerate((ExposureShift, DetailShift, BorderBlank), start=1):
        x = kind(seed=seed + i, dtype="float32")(x)
    frame = FramingShift(seed=seed + 4, dtype="float32")
    if field == "whole":
        return keras.Model(rows, member(frame(x)), name="trainer")
    lungs = ResidentImages(n_images, side_px, dtype="float32", name="resident_lungs")(rows)
    lungs = FramingShift(degrees=4.0, scale=0.1, shift=0.04, seed=seed + 5, dtype="float32")(lungs)
    lungs = VaryMasks(seed=seed + 6, dtype="float32")(lungs)
    if field == "varied":
        x = VaryOutside(seed=seed + 7, dtype="float32")([x, lungs])
        return keras.Model(rows, member(frame(x)), name="trainer")
    x, lungs = ops.split(frame(layers.Concatenate()([x, lungs])), 2, axis=-1)
    return keras.Model(rows, member([x, lungs]), name="trainer")


def compile_trainer(settings: TrainingSettings, n_images: int) -> keras.Model:
    """A trainer with its optimiser and loss; members use it in turn, so that its step is compiled once."""
    with compute_precision():
        trainer = build_trainer(build_member(settings, seed=0, name="member"), n_images, 0, settings.field)
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
    splits: Mapping[str, LabelledImages],
    settings: TrainingSettings,
    member: Member,
    show: Callable[[Facts], None],
) -> list[Facts]:
    """Trains one network into ``<name>.keras`` in a folder; resumes what a killed training left there.

    What is kept is a moving average of the weights over about an epoch, as it stands after the last epoch: with a rate
    that has come down by then, the average generalises better than any single step (Izmailov et al. 2018), and nothing
    has to be picked by validation, where the best epochs differ by chance. Training itself keeps the plain weights.

    Args:
        trainer: From ``compile_trainer``, in any state.
        splits: ``train``, what is learnt from; and ``val``, what is measured after each epoch, for people to see:
            nothing is chosen by it.
        settings: The recipe.
        member: Name, seed and place of the network.
        show: Called with the entry of each epoch.

    Returns:
        An entry ``epoch, loss, val_auc, seconds`` for each epoch.

    Raises:
        RunError: If the loss is no number any more.
    """
    if (finished := read_finished(member)) is not None:
        shutil.rmtree(member.checkpoints, ignore_errors=True)  # of a process that was killed just before it did so
        return finished
    training = start_training(trainer, settings, member, len(splits["train"].labels))
    training.trainer.get_layer("resident").put(splits["train"].pixels)
    if settings.field != "whole":
        training.trainer.get_layer("resident_lungs").put(splits["train"].lungs)
    truth = describe_truth(splits["train"])

    def train_epochs(look: Look) -> None:
        while training.epoch <= settings.epochs:
            start, epoch = time.perf_counter(), training.epoch
            loss = run_epoch(training, truth, look)
            if not math.isfinite(loss):
                raise RunError(
                    f"training.learning_rate: the loss is no number any more in epoch {epoch}; give a lower rate than "
                    f"{settings.learning_rate:g}"
                )
            auc = average_weights(training, splits)
            seconds = round(time.perf_counter() - start, 2)
            entry = {"epoch": epoch, "loss": round(loss, 6), "val_auc": round(auc, 6), "seconds": seconds}
            training.finish_epoch(entry)
            show(entry)
            look(lambda: None)  # all is saved

    run_stoppable(train_epochs)
    return keep_member(training)


def read_finished(member: Member) -> list[Facts] | None:
    """The epochs of a member whose training is over; ``None`` where it is not, or a file of it is damaged."""
    if not member.record.exists():
        return None
    try:
        check_network(member.folder, member.name)
        return list(read_record(member.record, history=list)["history"])
    except RunError as error:
        print(f"{member} is trained again: {error}")
        return None


def start_training(trainer: keras.Model, settings: TrainingSettings, member: Member, n_train: int) -> Training:
    """The training that a checkpoint of the member holds, or a new one with the given trainer."""
    member.checkpoints.mkdir(parents=True, exist_ok=True)
    of = digest([settings.model_dump(), member.seed, member.name, n_train])
    if (kept := load_checkpoint(member.checkpoints, of)) is not None:
        trainer, state = kept
        after = f"epoch {len(state['history'])}" + (f" and {len(state['losses'])} steps" if state["losses"] else "")
        print(f"{member}: resuming after {after} from {member.checkpoints}")
    else:
        state = {"history": [], "losses": [], "seeds": [], "of": of}
        start_afresh(trainer, settings, member.seed)
    return Training(trainer, settings, member, state)


def average_weights(training: Training, splits: Mapping[str, LabelledImages]) -> float:
    """Gives the network the averaged weights after the last epoch, and before that for as long as they are measured.

    After the last one its normalisation is settled too.

    Returns:
        Their AUC on validation.
    """
    trainer, network = training.trainer, training.trainer.get_layer("member")
    plain = network.get_weights()
    trainer.optimizer.finalize_variable_values(trainer.trainable_variables)
    # Copied: on JAX weights and averages would share memory, and asking the network gives its weights' memory away.
    network.set_weights(network.get_weights())
    if training.epoch == training.settings.epochs:
        settle_normalisation(network, splits["train"], training.member.seed)
    auc = float(roc_auc_score(splits["val"].labels, first_logits(network, splits["val"])))
    if training.epoch < training.settings.epochs:
        network.set_weights(plain)
    return auc


def keep_member(training: Training) -> list[Facts]:
    """Saves the network of a training that is over, and removes its checkpoints; returns the entries of its epochs."""
    member, history = training.member, list(training.state["history"])
    # Built anew: the kept network computes in single precision, whatever it was trained in.
    network = build_member(training.settings.model_copy(update={"weights": None}), member.seed, member.name)
    network.set_weights(training.trainer.get_layer("member").get_weights())
    save_network(network, member.folder, member.name)
    # Last: a member without it is not finished.
    write_whole(member.record, json.dumps({"history": history}))
    shutil.rmtree(member.checkpoints)
    return history


def run_epoch(training: Training, truth: NDArray[np.float32], look: Look) -> float:
    """One pass over the resident images in random order, from the step where it stands; returns the mean loss.

    Args:
        training: The losses of the steps join its state.
        truth: Of all images.
        look: Called after each step.
    """
    trainer, losses = training.trainer, training.state["losses"]
    seed, batch_size = training.member.seed, training.settings.batch_size
    order = np.random.default_rng([seed, training.epoch]).permutation(len(truth)).astype(np.int32)
    if losses:
        put_seeds(trainer, training.state["seeds"])
    else:
        reseed(trainer, seed, training.epoch)
    for start in range(len(losses) * batch_size, len(order), batch_size):
        rows = order[start : start + batch_size]
        loss = trainer.train_on_batch(rows, truth[rows])
        losses.append(float(np.ravel(loss)[0]) * len(rows))
        trainer.reset_metrics()
        look(training.save_steps)
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
