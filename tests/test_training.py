"""Training: learns what there is to learn, and a killed one ends as an unbroken one."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tasks.images import PackedImages
from tasks.networks import load_network, predict
from tasks.records import RunError
from tasks.settings import TrainingSettings
from tasks.training import class_weights, train_network, used_rows

SETTINGS = TrainingSettings(epochs=3, side_px=32, width=4, batch_size=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, PackedImages]:
    """40 images whose label is the side of a bright patch; packed as a run has them."""
    folder = tmp_path_factory.mktemp("arrays_run")
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    pixels = rng.integers(0, 60, (40, 224, 224), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[60:160, 120 : 200 if label else 130] += 120
    np.save(folder / "shard.npy", pixels)
    ids = [f"{i:016x}" for i in range(40)]
    (folder / "arrays").mkdir()
    index = {
        "shards": [{"address": str(folder / "shard.npy")}],
        "images": {image: [0, i] for i, image in enumerate(ids)},
    }
    (folder / "arrays" / "index.json").write_text(json.dumps(index))
    manifest = pd.DataFrame(
        {
            "image_id": ids,
            "sha256": ids,
            "label": labels,
            "split": ["val" if i >= 28 else "train" for i in range(40)],
            "excluded": ["" if i != 3 else "shows a medical device (reviewed)" for i in range(40)],
        }
    )
    return manifest, PackedImages(folder)


def test_a_killed_training_ends_like_an_unbroken_one(
    data: tuple[pd.DataFrame, PackedImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, images = data
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    train_network(manifest, images, SETTINGS, 7, whole)

    import tasks.training as training

    run_epoch, calls = training.run_epoch, []

    def killed_in_the_third(*arguments: object) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_epoch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "run_epoch", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        train_network(manifest, images, SETTINGS, 7, broken)
    assert json.loads((broken / "checkpoint.json").read_text())["history"][-1]["epoch"] == 2
    train_network(manifest, images, SETTINGS, 7, broken)

    assert len(calls) == 4, "two whole epochs, the killed one, and only that one again"
    pixels = images.read(list(manifest["image_id"]))
    np.testing.assert_allclose(predict(load_network(broken), pixels), predict(load_network(whole), pixels), atol=1e-4)
    for column in ("epoch", "loss", "val_auc"):
        one, two = (pd.read_csv(folder / "history.csv")[column] for folder in (whole, broken))
        np.testing.assert_allclose(one, two, atol=1e-4)
    assert sorted(p.name for p in broken.iterdir()) == ["history.csv", "model.keras", "model.sha256"]


def test_training_stops_when_validation_no_longer_improves(
    data: tuple[pd.DataFrame, PackedImages], tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 30, "patience": 2, "learning_rate": 1e-2})
    facts = train_network(*data, settings, 7, tmp_path)
    assert facts["epochs"] < 30
    assert facts["epochs"] - facts["best_epoch"] == 2
    assert facts["best_auc"] == pytest.approx(pd.read_csv(tmp_path / "history.csv")["val_auc"].max(), abs=1e-6)


def test_excluded_rows_and_test_rows_are_not_used(data: tuple[pd.DataFrame, PackedImages]) -> None:
    manifest = data[0].assign(split=["test" if i < 2 else split for i, split in enumerate(data[0]["split"])])
    used = set(used_rows(manifest)["image_id"])
    assert used == set(manifest["image_id"]) - set(manifest["image_id"][[0, 1, 3]])


def test_class_weights_give_both_classes_the_same_sum() -> None:
    labels = np.array([1, 1, 1, 0], np.float32)
    weights = class_weights(labels)
    assert weights[labels == 1].sum() == pytest.approx(weights[labels == 0].sum())
    assert weights.mean() == pytest.approx(1)


def test_one_class_in_validation_is_refused_in_words(data: tuple[pd.DataFrame, PackedImages], tmp_path: Path) -> None:
    manifest = data[0][(data[0]["split"] == "train") | (data[0]["label"] == 1)]
    with pytest.raises(RunError, match="val split has images of one class only"):
        train_network(manifest, data[1], SETTINGS, 7, tmp_path)
