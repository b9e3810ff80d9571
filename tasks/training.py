"""Train: fits the network on the training rows, from scratch.

Reads ``manifest.parquet`` and the packed arrays; writes ``model.keras``, ``model.sha256`` and ``history.csv``. After
each epoch a checkpoint is kept beside the cache entry, so that a killed training goes on from its last whole epoch.
Every random choice of an epoch follows from the seed and the epoch's number: resumed and unbroken runs see the same.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import Progress
from tasks.images import PackedImages, to_float
from tasks.provenance import BACKENDS, find_backend
from tasks.records import Facts, RunError
from tasks.retries import outside_failed
from tasks.settings import Settings, TrainingSettings
from tasks.storage import read_manifest, run_folder, run_stage


@task(name="fit", cache_policy=NO_CACHE, retries=1, retry_delay_seconds=5, retry_condition_fn=outside_failed)
def fit(settings: Settings) -> Facts:
    """Trains the network on the usable training images; the best epoch by validation AUC is kept."""
    run = run_folder(settings)
    manifest = read_manifest(run)
    backend = find_backend()

    def make(out: Path) -> Facts:
        return train_network(manifest, PackedImages(run), settings.training, settings.seed, out)

    inputs = {
        "rows": used_rows(manifest).to_csv(index=False),
        "arrays": json.loads((run / "arrays" / "index.json").read_text())["shards"],
        "training": settings.training.model_dump(),
        "seed": settings.seed,
        "backend": backend,
    }
    facts = run_stage(
        settings,
        "fit",
        module=__name__,
        inputs=inputs,
        make=make,
        packages=("keras", BACKENDS[backend]),
        resumable=True,
    )
    print(
        f"trained on {facts['n_train']:,} images for {facts['epochs']} epochs; "
        f"best validation AUC {facts['best_auc']:.4f} in epoch {facts['best_epoch']}"
        + (" (taken from the cache)" if facts["reused"] else "")
    )
    return facts


def used_rows(manifest: pd.DataFrame) -> pd.DataFrame:
    """Rows that training reads: usable rows of train and val, by path."""
    rows = manifest[manifest["split"].isin(["train", "val"]) & (manifest["excluded"].fillna("") == "")]
    return rows[["image_id", "sha256", "label", "split"]]


def train_network(
    manifest: pd.DataFrame, images: PackedImages, settings: TrainingSettings, seed: int, folder: Path
) -> Facts:
    """Trains, going on from a checkpoint in ``folder`` if there is one, and writes the model there.

    The weights that are judged and kept are a moving average over about one epoch (Izmailov et al. 2018 and Polyak
    show why averages generalise better); training itself goes on from the plain ones.

    Raises:
        RunError: If train or val lacks a class.
    """
    from sklearn.metrics import roc_auc_score

    from tasks.epochs import build_optimizer, reseed, save_checkpoint
    from tasks.keras_backend import keras
    from tasks.networks import build_network, predict, save_network

    rows = used_rows(manifest)
    train, val = (rows[rows["split"] == name] for name in ("train", "val"))
    for name, part in (("train", train), ("val", val)):
        if part["label"].nunique() < 2:
            raise RunError(f"manifest: the {name} split has images of one class only; bring more patients")
    pixels = images.read(list(train["image_id"]))
    val_pixels = images.read(list(val["image_id"]))
    labels, val_labels = (part["label"].to_numpy(np.float32) for part in (train, val))
    weights = class_weights(labels)

    checkpoint = folder / "checkpoint.json"
    if checkpoint.exists():
        state = json.loads(checkpoint.read_text())
        model = keras.saving.load_model(folder / state["model"], safe_mode=True)
        print(f"going on after epoch {len(state['history'])} from {folder}")
    else:
        state = {"history": [], "best_auc": -1.0, "best_epoch": 0}
        model = build_network(settings, seed)
        model.compile(
            optimizer=build_optimizer(settings.learning_rate, settings.epochs, len(labels), settings.batch_size),
            loss="binary_crossentropy",
        )
    progress = Progress("training", f"Training, at most {settings.epochs} epochs")
    for epoch in range(len(state["history"]) + 1, settings.epochs + 1):
        if epoch - state["best_epoch"] > settings.patience:
            break
        start = time.perf_counter()
        reseed(model, seed, epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(labels))
        loss = run_epoch(model, pixels, labels, weights, order, settings.batch_size)
        plain = model.get_weights()
        model.optimizer.finalize_variable_values(model.trainable_variables)
        auc = float(roc_auc_score(val_labels, predict(model, val_pixels)))
        if auc > state["best_auc"]:
            state |= {"best_auc": auc, "best_epoch": epoch}
            model.save(folder / f"best-{epoch}.keras")
        model.set_weights(plain)
        seconds = round(time.perf_counter() - start, 2)
        state["history"].append({"epoch": epoch, "loss": round(loss, 6), "val_auc": round(auc, 6), "seconds": seconds})
        save_checkpoint(model, state, folder)
        progress.show(epoch, settings.epochs)
        print(f"epoch {epoch} of {settings.epochs}: loss {loss:.4f}, validation AUC {auc:.4f}, {seconds:.1f} s")
    progress.show(1, 1)
    best = keras.saving.load_model(folder / f"best-{state['best_epoch']}.keras", compile=False, safe_mode=True)
    checksum = save_network(best, folder)
    pd.DataFrame(state["history"]).to_csv(folder / "history.csv", index=False)
    for leftover in [checkpoint, *folder.glob("best-*.keras"), *folder.glob("checkpoint-*.keras")]:
        leftover.unlink()
    return {
        "n_train": len(labels),
        "n_train_pneumonia": int(labels.sum()),
        "n_val": len(val_labels),
        "epochs": len(state["history"]),
        "best_auc": state["best_auc"],
        "best_epoch": state["best_epoch"],
        "n_weights": int(best.count_params()),
        "model_sha256": checksum,
        "backend": keras.backend.backend(),
    }


def class_weights(labels: NDArray[np.float32]) -> NDArray[np.float32]:
    """A weight per image, float32 ``(n,)`` with mean 1, that gives both classes the same sum."""
    share = labels.mean()
    return np.where(labels == 1, 0.5 / share, 0.5 / (1 - share)).astype(np.float32)


def run_epoch(
    model: Any,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.float32],
    weights: NDArray[np.float32],
    order: NDArray[np.intp],
    batch_size: int,
) -> float:
    """One pass in the given order over uint8 ``(n, 224, 224)``; returns the mean loss."""
    losses = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        loss = model.train_on_batch(to_float(pixels[rows]), labels[rows, None], sample_weight=weights[rows])
        losses.append(float(np.ravel(loss)[0]) * len(rows))
        model.reset_metrics()
    return float(np.sum(losses) / len(order))
