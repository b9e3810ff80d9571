"""Whatever lies in place of a network or a checkpoint: it is refused, or left alone; no code in it runs."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_table import FaultTable
from hostile import DAMAGES, bounded_memory, damage, ends_well, hostile, network  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import RunError
from tasks.files import sha256_of_file
from tasks.networks.checkpoints import CHECKPOINT, load_checkpoint, save_checkpoint
from tasks.networks.files import load_checked, load_network, save_network
from tasks.networks.keras_backend import keras

SEEDS = st.integers(0, 2**32 - 1)
KINDS = st.sampled_from(DAMAGES)
MARK = "it-ran"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``run`` with a small network."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "run").mkdir()
    save_network(network(), folder / "run")
    return folder


@given(kind=KINDS, seed=SEEDS)
@hostile
def test_a_damaged_network_is_refused_before_it_is_opened(
    faults: FaultTable, whole: Path, kind: str, seed: int
) -> None:
    path = whole / "run" / "model.keras"
    before = path.read_bytes()
    path.write_bytes(damage(before, kind, seed))
    try:
        same = path.read_bytes() == before
        assert ends_well(faults, lambda: load_network(whole / "run")) == same
    finally:
        path.write_bytes(before)


@given(kind=KINDS, seed=SEEDS)
@hostile
def test_a_damaged_network_whose_checksum_was_made_to_fit_loads_or_is_refused(
    faults: FaultTable, whole: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int
) -> None:
    path = tmp_path_factory.mktemp("forged") / "model.keras"
    path.write_bytes(damage((whole / "run" / "model.keras").read_bytes(), kind, seed))
    ends_well(faults, lambda: load_checked(path, sha256_of_file(path)))
    assert [p.name for p in path.parent.iterdir()] == ["model.keras"]


def repack(
    source: Path, target: Path, change: Callable[[dict[str, bytes]], None], method: int = zipfile.ZIP_STORED
) -> Path:
    """A ``.keras`` file with other members."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target


def with_system_call(members: dict[str, bytes]) -> None:
    config = json.loads(members["config.json"])
    config["config"]["layers"][-1] |= {"module": "os", "class_name": "mkdir", "config": {"path": MARK}}
    members["config.json"] = json.dumps(config).encode()


def with_path_out(members: dict[str, bytes]) -> None:
    for name in ("../../" + MARK, "/tmp/" + MARK, "assets/../../../" + MARK):
        members[name] = b"out"


def without_weights(members: dict[str, bytes]) -> None:
    del members["model.weights.h5"]


def with_other_weights(members: dict[str, bytes]) -> None:
    members["model.weights.h5"] = b"\x80\x04\x95" + b"pickle"


@pytest.mark.parametrize("change", [with_system_call, without_weights, with_other_weights], ids=lambda f: f.__name__)
def test_a_network_that_brings_code_or_lacks_a_part_is_refused_though_its_checksum_fits(
    faults: FaultTable, whole: Path, tmp_path: Path, change: Callable[[dict[str, bytes]], None]
) -> None:
    path = repack(whole / "run" / "model.keras", tmp_path / "model.keras", change)
    assert not ends_well(faults, lambda: load_checked(path, sha256_of_file(path)))
    assert not list(tmp_path.rglob(MARK)) and not Path(MARK).exists()


def test_a_network_with_code_of_its_own_is_refused_and_the_code_does_not_run(
    faults: FaultTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pixels = keras.Input((4,))
    runs = keras.layers.Lambda(lambda x: [__import__("os").makedirs("it-ran", exist_ok=True), x][1])
    keras.Model(pixels, runs(pixels)).save("model.keras")
    Path(MARK).rmdir()
    path = tmp_path / "model.keras"
    assert not ends_well(faults, lambda: load_checked(path, sha256_of_file(path)))
    assert not Path(MARK).exists()
    keras.saving.load_model(path, safe_mode=False)
    assert Path(MARK).exists(), "without the safe mode it would have run"


@pytest.mark.parametrize("name", ["config.json", "more.bin"])
def test_a_network_of_which_far_more_would_come_out_than_it_has_is_refused_before_it_is_opened(
    faults: FaultTable, whole: Path, tmp_path: Path, name: str
) -> None:
    def blow_up(members: dict[str, bytes]) -> None:
        members[name] = members.get(name, b"") + b" " * 100_000_000

    path = repack(whole / "run" / "model.keras", tmp_path / "model.keras", blow_up, zipfile.ZIP_DEFLATED)
    faults.n_cases += 1
    with pytest.raises(RunError, match="unpacks to 100 MB"):
        load_checked(path, sha256_of_file(path))


def test_a_network_with_paths_that_lead_out_writes_nothing_outside(
    faults: FaultTable, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    path = repack(whole / "run" / "model.keras", tmp_path / "a" / "b" / "model.keras", with_path_out)
    ends_well(faults, lambda: load_checked(path, sha256_of_file(path)))
    assert not list(tmp_path.rglob(MARK)) and not Path("/tmp", MARK).exists()


@pytest.mark.parametrize("name", ["model.h5", "model.hdf5", "model.pkl", "saved_model"])
def test_a_network_of_another_kind_of_file_is_refused_by_its_name(
    faults: FaultTable, whole: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes((whole / "run" / "model.keras").read_bytes())
    assert not ends_well(faults, lambda: load_checked(path, sha256_of_file(path)))


def test_an_h5_file_under_the_name_of_a_keras_file_is_refused(faults: FaultTable, tmp_path: Path) -> None:
    network().save(tmp_path / "model.h5")
    path = (tmp_path / "model.h5").rename(tmp_path / "model.keras")
    assert not ends_well(faults, lambda: load_checked(path, sha256_of_file(path)))


@given(kind=KINDS, seed=SEEDS, which=st.sampled_from(["json", "keras"]))
@hostile
def test_a_damaged_checkpoint_is_gone_on_from_or_left_alone(
    faults: FaultTable, tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, kind: str, seed: int, which: str
) -> None:
    (path,) = [checkpoint / CHECKPOINT] if which == "json" else checkpoint.glob("*.keras")
    before, said = path.read_bytes(), json.loads((checkpoint / CHECKPOINT).read_text())
    del said["digest"]
    path.write_bytes(damage(before, kind, seed))
    try:
        faults.n_cases += 1
        found = load_checkpoint(checkpoint, "this")
        assert found is None or found[1] == said, "only what was kept is gone on from"
        assert which == "json" or path.read_bytes() == before or found is None
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    trainer = network()
    trainer.compile(optimizer="adam", loss="mse")
    save_checkpoint(trainer, {"history": [{"epoch": 1}], "of": "this"}, folder)
    return folder


@pytest.mark.parametrize("change", [{"seeds": [[1]]}, {"losses": [0.5]}, {"history": []}, {"more": 1}])
def test_a_checkpoint_whose_record_was_changed_is_left_alone(
    faults: FaultTable, checkpoint: Path, change: dict[str, object]
) -> None:
    faults.n_cases += 1
    before = (checkpoint / CHECKPOINT).read_text()
    (checkpoint / CHECKPOINT).write_text(json.dumps(json.loads(before) | change))
    try:
        assert load_checkpoint(checkpoint, "this") is None
    finally:
        (checkpoint / CHECKPOINT).write_text(before)


def test_a_checkpoint_of_another_training_is_not_gone_on_from(faults: FaultTable, checkpoint: Path) -> None:
    faults.n_cases += 2
    assert load_checkpoint(checkpoint, "this") is not None
    assert load_checkpoint(checkpoint, "another") is None
