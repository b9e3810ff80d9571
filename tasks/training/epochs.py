"""Epochs: the loop by which screener and segmenter are trained, and the files that a training ends with.

After each epoch a checkpoint is kept, so that a killed training resumes from its last whole epoch. What is kept of the
weights is their moving average over about an epoch.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from tasks.errors import SettingsError
from tasks.files import digest, write_json
from tasks.records import Facts
from tasks.runs.artifacts import Progress
from tasks.runs.provenance import BACKENDS, describe_hardware, find_backend
from tasks.settings import Section


class CourseRecipe(Section):
    """What the recipes of both networks have."""

    epochs: int = Field(20, ge=1, le=1_000, description="Passes over all readings and as many fresh drawings.")
    batch_size: int = Field(32, ge=1, le=4_096, description="Images in one optimisation step.")
    learning_rate: float = Field(1.5e-3, gt=0, le=1, description="Peak learning rate of the cosine schedule (AdamW).")


class Shown(Protocol):
    """Pictures of an epoch, with the truth about them."""

    def __len__(self) -> int: ...

    def feed(self, rows: NDArray[Any]) -> list[NDArray[np.float32]]:
        """The inputs of the trainer for some of the pictures."""


@dataclass(frozen=True)
class Course:
    """The training of a network, as far as it is.

    Attributes:
        recipe: How it is trained.
        seed: Of every random choice.
        folder: Of its files, checkpoints among them.
        trainer: A network from the inputs that a lesson feeds to the loss of each picture, ``(n, 1)``.
        state: ``history``, an entry for each finished epoch, and which training it is the state ``of``.
    """

    recipe: CourseRecipe
    seed: int
    folder: Path
    trainer: Any
    state: Facts

    @property
    def history(self) -> list[Facts]:
        """The entries of the finished epochs."""
        return list(self.state["history"])

    def train(self, title: str, compose: Callable[[np.random.Generator], Shown], judge: Callable[[], Facts]) -> None:
        """Trains to the last epoch.

        Args:
            title: The network's name for people.
            compose: The pictures of an epoch, by its generator.
            judge: A figure of the network with the averaged weights, by its name; nothing is chosen by it here.
        """
        from tasks.networks.checkpoints import reseed, save_checkpoint

        trainer, epochs = self.trainer, self.recipe.epochs
        progress = Progress(title, f"Training the {title}, {epochs} epochs")
        for epoch in range(len(self.history) + 1, epochs + 1):
            start = time.perf_counter()
            reseed(trainer, self.seed, epoch)
            rng = np.random.default_rng([self.seed, epoch])
            loss = run_epoch(trainer, compose(rng), self.recipe.batch_size, rng)
            plain = trainer.get_weights()
            trainer.optimizer.finalize_variable_values(trainer.trainable_variables)
            figures = {name: round(value, 6) for name, value in judge().items()}
            if epoch < epochs:
                trainer.set_weights(plain)
            seconds = round(time.perf_counter() - start, 2)
            self.state["history"].append({"epoch": epoch, "loss": round(loss, 6), **figures, "seconds": seconds})
            save_checkpoint(trainer, self.state, self.folder)
            progress.show(epoch, epochs)
            judged = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            print(f"epoch {epoch} of {epochs}: loss {loss:.4f}, {judged}, {seconds:.1f} s")

    def describe(self, command: str) -> Facts:
        """What a card says of the training; ``command`` is the command line without seed and recipe."""
        from importlib.metadata import version

        changed = self.recipe.model_dump(exclude_defaults=True)
        flags = " ".join(f"--recipe.{name.replace('_', '-')} {value}" for name, value in changed.items())
        return {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "command": f"python -m {command} --seed {self.seed} {flags}".rstrip(),
            "seed": self.seed,
            "recipe": self.recipe.model_dump(),
            "seconds": round(sum(epoch["seconds"] for epoch in self.history), 1),
            "hardware": describe_hardware(),
            "versions": {name: version(name) for name in ("keras", BACKENDS[find_backend()], "numpy")},
        }

    def finish(self, network: Any, card: Facts, rows: pd.DataFrame, table: str) -> Facts:
        """Writes the files of the trained network, and removes its checkpoints.

        Args:
            network: To be kept.
            card: What ``card.json`` shall hold.
            rows: ``sha256`` and ``part`` of the images.
            table: Name of the table that lists these.

        Returns:
            The card with the checksum of the network.
        """
        from tasks.networks.checkpoints import CHECKPOINT
        from tasks.networks.files import save_network

        card = {**card, "model_sha256": save_network(network, self.folder)}
        pd.DataFrame(self.history).to_csv(self.folder / "history.csv", index=False)
        rows.assign(sha256=rows["sha256"].str[:16])[["sha256", "part"]].to_csv(self.folder / table, index=False)
        write_json(self.folder / "card.json", card)
        for leftover in [self.folder / CHECKPOINT, *self.folder.glob("checkpoint-*.keras")]:
            leftover.unlink()
        return card


def start_course(recipe: CourseRecipe, seed: int, n_shown: int, folder: Path, build: Callable[[], Any]) -> Course:
    """The training that a checkpoint in ``folder`` holds, or a new one of the trainer that ``build`` gives.

    Args:
        recipe: How it is trained.
        seed: Of every random choice.
        n_shown: Pictures in an epoch.
        folder: Made if needed.
        build: Builds the trainer; see ``Course``.

    Raises:
        SettingsError: If an epoch has fewer pictures than a batch.
    """
    from tasks.networks.checkpoints import build_optimizer, load_checkpoint, mean_of_losses

    if n_shown < recipe.batch_size:
        raise SettingsError(f"recipe.batch_size: {recipe.batch_size} is more than the {n_shown} pictures of an epoch")
    folder.mkdir(parents=True, exist_ok=True)
    of = digest([recipe.model_dump(), seed, n_shown])
    if (kept := load_checkpoint(folder, of)) is not None:
        print(f"resuming after epoch {len(kept[1]['history'])} from {folder}")
        return Course(recipe, seed, folder, *kept)
    trainer = build()
    optimizer = build_optimizer(recipe.learning_rate, recipe.epochs, n_shown, recipe.batch_size)
    trainer.compile(optimizer=optimizer, loss=mean_of_losses)
    return Course(recipe, seed, folder, trainer, {"history": [], "of": of})


def run_epoch(trainer: Any, shown: Shown, batch_size: int, rng: np.random.Generator) -> float:
    """One pass over pictures in random order; returns the mean loss."""
    order = rng.permutation(len(shown))
    losses = []
    for start in range(0, len(order) - batch_size + 1, batch_size):
        rows = order[start : start + batch_size]
        loss = trainer.train_on_batch(shown.feed(rows), np.zeros((len(rows), 1), np.float32))
        losses.append(float(np.ravel(loss)[0]))
        trainer.reset_metrics()
    return float(np.mean(losses))
