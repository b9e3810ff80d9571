"""Train: fits the members of a network on its training rows.

Reads ``manifest.parquet`` and the packed arrays; writes ``members/member_1.keras`` and so on, and ``history.csv`` with
a row per member and epoch; those of the unscreened twin into ``unfiltered/``. A killed training resumes from its last
whole epoch.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from tasks.files import read_record
from tasks.networks.twin import stage_name, used_rows, work_folder
from tasks.pixels.masks import Masks
from tasks.pixels.packed import PackedImages
from tasks.records import MODEL, TITLES, Facts
from tasks.runs.artifacts import Progress
from tasks.runs.provenance import BACKENDS, checksum_of_weights, find_backend
from tasks.runs.retries import outside_failed
from tasks.runs.run import Run
from tasks.runs.stages import stage_task
from tasks.settings import TrainingSettings


@stage_task("fit", task_run_name="fit {name}", retries=1, retry_condition_fn=outside_failed)
def fit(run: Run, name: str = MODEL) -> Facts:
    """Trains the members of the model, or of its twin, on the usable training images."""
    rows = used_rows(run.manifest(), name, run.settings.seed)
    backend = find_backend()
    reads_lungs = run.settings.training.field != "whole"

    def make(out: Path) -> Facts:
        return train_network(
            rows,
            run.images(),
            run.settings.training,
            run.settings.seed,
            work_folder(out, name),
            run.lungs() if reads_lungs else None,
        )

    given = {
        "rows": rows.to_csv(index=False),
        "arrays": read_record(run.folder / "arrays" / "index.json", shards=list)["shards"],
        "lungs": read_record(run.folder / "lungs" / "index.json", shards=list)["shards"] if reads_lungs else [],
        "training": run.settings.training.model_dump(),
        "weights": checksum_of_weights(run.settings.training),
        "seed": run.settings.seed,
        "backend": backend,
    }
    facts = run.stage(
        stage_name("fit", name),
        given=given,
        make=make,
        packages=("keras", BACKENDS[backend]),
        resumable=True,
    )
    aucs = facts["val_aucs"]
    networks = "1 network" if len(aucs) == 1 else f"{len(aucs)} networks"
    print(
        f"trained {networks} of {TITLES[name]} on {facts['n_train']:,} images for {facts['epochs']} epochs; validation "
        "AUC " + ", ".join(f"{auc:.4f}" for auc in aucs)
    )
    return facts


def train_network(
    rows: pd.DataFrame,
    images: PackedImages,
    settings: TrainingSettings,
    seed: int,
    folder: Path,
    lungs: Masks | None = None,
) -> Facts:
    """Trains what ``folder`` does not hold yet, and writes the files of the stage there.

    Args:
        rows: As from ``tasks.networks.twin.used_rows``.
        images: Their pixels.
        settings: The recipe.
        seed: Seed of the first member.
        folder: Made if needed.
        lungs: The masks of the lungs, where ``training.field`` needs them.

    Raises:
        RunError: If train or val lacks a class.
    """
    from tasks.networks.keras_backend import keras
    from tasks.training.labelled_images import read_split
    from tasks.training.members import Member, compile_trainer, train_member

    folder.mkdir(exist_ok=True)
    splits = {split: read_split(rows, split, images, lungs, settings) for split in ("train", "val")}
    train = splits["train"]
    n_epochs = settings.n_models * settings.epochs
    progress = Progress("training", f"Training, {n_epochs} epochs")
    trainer = compile_trainer(settings, len(train.labels))
    history: list[Facts] = []
    for number in range(1, settings.n_models + 1):
        prefix = f"member {number} of {settings.n_models}, epoch"

        def show(entry: Facts, prefix: str = prefix, before: int = len(history)) -> None:
            progress.show(before + entry["epoch"], n_epochs)
            print(
                f"{prefix} {entry['epoch']} of {settings.epochs}: loss {entry['loss']:.4f}, validation AUC "
                f"{entry['val_auc']:.4f}, {entry['seconds']:.1f} s"
            )

        # Far apart: layers of a member take the numbers that follow its seed.
        member_seed = (seed + 1_000 * (number - 1)) % 2**31
        member = Member(f"member_{number}", member_seed, folder / "members")
        epochs = train_member(trainer, splits, settings, member, show)
        history += [{"member": number, **entry} for entry in epochs]
    pd.DataFrame(history).to_csv(folder / "history.csv", index=False)
    return {
        "n_train": len(train.labels),
        "n_train_pneumonia": int(train.labels.sum()),
        "n_train_subtype_known": int(np.isfinite(train.bacteria).sum()),
        "n_val": len(splits["val"].labels),
        "n_models": settings.n_models,
        "epochs": settings.epochs,
        "val_aucs": [entry["val_auc"] for entry in history if entry["epoch"] == settings.epochs],
        "backend": keras.backend.backend(),
    }
