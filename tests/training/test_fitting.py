"""Training: learns what there is to learn, and a killed one ends as an unbroken one."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import tasks.training.members
from tasks.errors import RunError
from tasks.networks.classifier import build_member, shrink
from tasks.networks.keras_backend import keras
from tasks.networks.twin import used_rows
from tasks.pixels.greys import to_float
from tasks.pixels.masks import Masks, write_shard
from tasks.pixels.packed import PackedImages
from tasks.settings import TrainingSettings
from tasks.training.fitting import train_network
from tasks.training.labelled_images import LabelledImages, class_weights, describe_truth, shrink_packed
from tasks.training.members import build_trainer

SETTINGS = TrainingSettings(epochs=3, n_models=2, side_px=32, width=4, batch_size=8, field="whole")


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
        "shards": [{"name": "shard.npy"}],
        "images": {image: [0, i] for i, image in enumerate(ids)},
    }
    (folder / "arrays" / "index.json").write_text(json.dumps(index))
    manifest = pd.DataFrame(
        {
            "image_id": ids,
            "sha256": ids,
            "label": labels,
            "subtype": [("normal", ("bacteria", "virus")[i // 2 % 2])[label] for i, label in enumerate(labels)],
            "split": ["val" if i >= 28 else "train" for i in range(40)],
            "excluded": ["" if i != 3 else "shows a medical device (reviewed)" for i in range(40)],
        }
    )
    return manifest, PackedImages(folder, folder)


@pytest.fixture(scope="module")
def lungs(data: tuple[pd.DataFrame, PackedImages], tmp_path_factory: pytest.TempPathFactory) -> Masks:
    """The masks of the 40 images' lungs: where the patch may be."""
    folder = tmp_path_factory.mktemp("lungs_run")
    masks = np.zeros((40, 224, 224), np.uint8)
    masks[:, 50:170, 110:210] = 255
    write_shard(folder / "shard.npz", masks)
    (folder / "lungs").mkdir()
    index = {"shards": [{"name": "shard.npz"}], "images": {name: [0, i] for i, name in enumerate(data[0]["image_id"])}}
    (folder / "lungs" / "index.json").write_text(json.dumps(index))
    return Masks(folder, folder, "lungs")


def members_of(folder: Path) -> list[list[np.ndarray]]:
    paths = sorted((folder / "members").glob("*.keras"))
    return [keras.saving.load_model(path, compile=False).get_weights() for path in paths]


@pytest.mark.slow
def test_a_training_that_sees_lungs_alone_resumes_with_their_masks(
    data: tuple[pd.DataFrame, PackedImages], lungs: Masks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS.model_copy(update={"field": "lungs", "n_models": 1, "epochs": 2})
    run_epoch, calls = tasks.training.members.run_epoch, []

    def killed(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_epoch(*arguments)

    monkeypatch.setattr(tasks.training.members, "run_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        train_network(*data, settings, 7, tmp_path, lungs)
    train_network(*data, settings, 7, tmp_path, lungs)
    assert list(pd.read_csv(tmp_path / "history.csv")["epoch"]) == [1, 2]
    assert len(calls) == 3, "two whole epochs, and one that was killed"


@pytest.fixture(scope="module")
def unbroken(
    data: tuple[pd.DataFrame, PackedImages], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A training that nothing disturbed: its folder and facts."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, train_network(*data, SETTINGS, 7, folder)


@pytest.mark.slow
def test_a_killed_training_ends_like_an_unbroken_one(
    data: tuple[pd.DataFrame, PackedImages],
    unbroken: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest, images = data
    (whole, facts), broken = unbroken, tmp_path / "broken"

    run_epoch, calls = tasks.training.members.run_epoch, []

    def killed(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) in (3, 6):  # in the last epoch of the first member, in the second of the second
            raise KeyboardInterrupt
        return run_epoch(*arguments)

    monkeypatch.setattr(tasks.training.members, "run_epoch", killed)
    for member, epoch in (("member_1", 2), ("member_2", 1)):
        with pytest.raises(KeyboardInterrupt):
            train_network(manifest, images, SETTINGS, 7, broken)
        checkpoint = json.loads((broken / "members" / member / "checkpoint.json").read_text())
        assert checkpoint["history"][-1]["epoch"] == epoch
    assert train_network(manifest, images, SETTINGS, 7, broken) == facts

    assert len(calls) == 8, "six whole epochs, and two that were killed"
    for one, two in zip(members_of(broken), members_of(whole), strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    for column in ("member", "epoch", "loss", "val_auc"):
        one, two = (pd.read_csv(folder / "history.csv")[column] for folder in (whole, broken))
        np.testing.assert_allclose(one, two, atol=1e-4)
    files = sorted(path.relative_to(broken).as_posix() for path in broken.rglob("*"))
    members = [f"members/member_{number}.{suffix}" for number in (1, 2) for suffix in ("json", "keras", "sha256")]
    assert files == ["history.csv", "members", *members]


class Stopped(BaseException):
    """What SIGTERM does here, as in Prefect's engine: it raises."""


@pytest.mark.slow
def test_a_training_told_to_stop_saves_after_the_step_and_goes_on_without_repeating_one(
    data: tuple[pd.DataFrame, PackedImages],
    unbroken: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (whole, facts), broken = unbroken, tmp_path / "broken"
    steps: list[int] = []
    step, n_steps = keras.Model.train_on_batch, 4  # in an epoch

    def told(self: Any, *arguments: Any) -> Any:
        steps.append(1)
        if len(steps) in (1, 6, 12, 15):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    def stop(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(keras.Model, "train_on_batch", told)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        for member in (1, 1, 1, 2):
            with pytest.raises(Stopped):
                train_network(*data, SETTINGS, 7, broken)
            assert signal.getsignal(signal.SIGTERM) is stop
            checkpoint = json.loads((broken / "members" / f"member_{member}" / "checkpoint.json").read_text())
            n_saved = len(checkpoint["history"]) * n_steps + len(checkpoint["losses"])
            assert n_saved + (member - 1) * SETTINGS.epochs * n_steps == len(steps), "a step was lost"
        assert train_network(*data, SETTINGS, 7, broken) == facts
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(steps) == n_steps * SETTINGS.epochs * SETTINGS.n_models, "a step was done twice"
    for one, two in zip(members_of(broken), members_of(whole), strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    for column in ("member", "epoch", "loss", "val_auc"):
        one, two = (pd.read_csv(folder / "history.csv")[column] for folder in (whole, broken))
        np.testing.assert_allclose(one, two, atol=1e-4)


@pytest.mark.slow
def test_a_training_killed_between_its_last_epoch_and_its_end_trains_nothing_again(
    data: tuple[pd.DataFrame, PackedImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = SETTINGS.model_copy(update={"n_models": 1})
    monkeypatch.setattr(tasks.training.members, "write_whole", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train_network(*data, one, 7, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(tasks.training.members, "run_epoch", lambda *_: pytest.fail("an epoch was done again"))
    facts = train_network(*data, one, 7, tmp_path)
    assert facts["val_aucs"] == [pd.read_csv(tmp_path / "history.csv")["val_auc"].iloc[-1]]


@pytest.mark.slow
def test_members_differ_and_each_learns_the_bright_side(
    data: tuple[pd.DataFrame, PackedImages], tmp_path: Path
) -> None:
    facts = train_network(*data, SETTINGS.model_copy(update={"epochs": 12}), 7, tmp_path)
    first, second = members_of(tmp_path)
    assert np.abs(first[0] - second[0]).max() > 1e-3
    assert min(facts["val_aucs"]) == 1.0


@pytest.mark.slow
def test_the_weights_that_are_kept_are_an_average_of_those_trained(
    data: tuple[pd.DataFrame, PackedImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averages: list[np.ndarray] = []
    step, momentum = keras.Model.train_on_batch, 1 - 1 / 4  # an epoch has four steps

    def watched(self: Any, *arguments: Any) -> Any:
        loss = step(self, *arguments)
        plain = self.get_layer("member").get_weights()[0]
        averages.append(momentum * averages[-1] + (1 - momentum) * plain if averages else plain)
        return loss

    monkeypatch.setattr(keras.Model, "train_on_batch", watched)
    train_network(*data, SETTINGS.model_copy(update={"n_models": 1}), 7, tmp_path)
    assert len(averages) == 4 * SETTINGS.epochs
    np.testing.assert_allclose(members_of(tmp_path)[0][0], averages[-1], atol=1e-5)


@pytest.mark.slow
def test_a_training_killed_while_it_clears_up_goes_on_and_leaves_no_checkpoint(
    data: tuple[pd.DataFrame, PackedImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = SETTINGS.model_copy(update={"n_models": 1})
    monkeypatch.setattr(
        "tasks.training.members.shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        train_network(*data, one, 7, tmp_path)
    monkeypatch.undo()
    facts = train_network(*data, one, 7, tmp_path)
    assert train_network(*data, one, 7, tmp_path) == facts, "a whole training is taken as it is"
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["history.csv", "member_1.json", "member_1.keras", "member_1.sha256"]


def test_a_rate_that_is_far_too_high_is_refused_by_name(
    data: tuple[pd.DataFrame, PackedImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.training.members, "run_epoch", lambda *_: float("nan"))
    with pytest.raises(RunError, match=r"training\.learning_rate: the loss is no number any more in epoch 1"):
        train_network(*data, SETTINGS, 7, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_one_training_step_on_each_installed_backend(backend: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", ONE_STEP, str(tmp_path)],
        env={**os.environ, "KERAS_BACKEND": backend},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["backend"] == backend
    assert said["changed"] > 1e-6
    assert 0.2 < said["loss"] < 5
    assert 0 < said["said"][0] == said["said"][1] < 1


ONE_STEP = """
import json, sys
from pathlib import Path
import numpy as np
from tasks.networks.keras_backend import keras
from tasks.training.labelled_images import LabelledImages
from tasks.training.members import Member, compile_trainer, train_member
from tasks.networks.classifier import answer, build_member, join_members
from tasks.settings import TrainingSettings
pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32), dtype=np.uint8)
lesson = LabelledImages(pixels, np.array([0, 1] * 4, np.float32), np.array([np.nan, 1, np.nan, 0] * 2, np.float32))
settings = TrainingSettings(side_px=32, width=4, epochs=1, batch_size=8, learning_rate=1e-2, field="whole")
folder = Path(sys.argv[1])
trainer = compile_trainer(settings, 8)
entries = train_member(
    trainer, {"train": lesson, "val": lesson}, settings, Member("member_1", 1, folder), lambda entry: None
)
member = keras.saving.load_model(folder / "member_1.keras", compile=False)
changed = float(np.abs(member.get_weights()[0] - build_member(settings, 1).get_weights()[0]).max())
said = answer(join_members([member]), np.zeros((2, 224, 224), np.uint8)).probability.tolist()
print(json.dumps({"backend": keras.backend.backend(), "changed": changed, "loss": entries[0]["loss"], "said": said}))
"""


def test_bacteria_are_asked_about_only_where_the_subtype_is_known() -> None:
    labels, bacteria = np.array([0, 1, 1, 1, 1], np.float32), np.array([np.nan, 1, 1, 0, np.nan], np.float32)
    truth = describe_truth(LabelledImages(np.zeros((5, 2, 2), np.uint8), labels, bacteria))
    np.testing.assert_array_equal(truth[:, 0], labels)
    np.testing.assert_allclose(truth[:, 3], [0, 0.75, 0.75, 1.5, 0])
    nothing = describe_truth(LabelledImages(np.zeros((5, 2, 2), np.uint8), labels, np.full(5, np.nan, np.float32)))
    assert (nothing[:, 3] == 0).all()


def test_pixels_are_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    trainer = build_trainer(build_member(SETTINGS, 1), 2_000, 1)
    trainer.get_layer("resident").put(np.random.default_rng(0).integers(0, 256, (2_000, 32, 32), dtype=np.uint8))
    trainer.save(tmp_path / "trainer.keras")
    assert (tmp_path / "trainer.keras").stat().st_size < 1_000_000, "the pixels alone are 2 MB"


def test_shrunk_pixels_are_what_the_kept_model_makes_of_them() -> None:
    packed = np.random.default_rng(0).integers(0, 256, (3, 224, 224), dtype=np.uint8)
    small = shrink_packed(packed, 64, batch_size=2)
    expected = keras.ops.convert_to_numpy(shrink(64)(to_float(packed)))[..., 0]
    assert np.abs(small / 255 - expected).max() <= 0.5 / 255 + 1e-6


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
