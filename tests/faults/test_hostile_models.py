"""Whatever lies in place of a file of a run or the cache: it is refused by name, or done again; nothing in it runs."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fault_table import FaultTable
from hostile import DAMAGES, bounded_memory, damage, ends_well, hostile, network  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from small_run import write_run

from tasks.epochs import load_checkpoint
from tasks.familiarity import FILE as FAMILIAR
from tasks.familiarity import fit_familiarity, load_familiarity, save_familiarity
from tasks.images import PackedImages
from tasks.masks import DeviceMasks, read_scores
from tasks.network_files import load_network, save_network
from tasks.packing import known_files, pack_shard
from tasks.records import PipelineError, RunError
from tasks.run_copies import read_seal
from tasks.scoring import as_packed, read_threshold
from tasks.screener_files import SHIPPED_SCREENER, find_screener, known_readings
from tasks.settings import ScreeningSettings, Settings, StorageSettings
from tasks.shared_files import read_shared
from tasks.stages import read_stage, run_stage
from tasks.storage import inside, read_manifest, sha256_of_file, shards_exist

SEEDS = st.integers(0, 2**32 - 1)
KINDS = st.sampled_from(DAMAGES)
MARK = "it-ran"


class Runs:
    """A pickle of this writes a file when it is loaded."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.place),))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, its cache beside it, a familiarity, and a small network."""
    folder = tmp_path_factory.mktemp("whole")
    write_run(folder / "run", [0.1, 0.5, 0.9], folder / "cache")
    save_network(network(), folder / "run")
    packed = np.random.default_rng(0).integers(0, 255, (24, 224, 224), dtype=np.uint8)
    save_familiarity(fit_familiarity([packed], 0), folder / "run")
    return folder


# -- arrays and tables -------------------------------------------------------------------------------------------------


def read_arrays(run: Path, cache: Path) -> None:
    images = PackedImages(run, cache)
    assert images.read(list(images._rows)).shape[1:] == (224, 224)


def read_masks(run: Path, cache: Path) -> None:
    masks = DeviceMasks(run, cache)
    assert masks.read(list(masks._rows)).shape[1:] == (224, 224)
    read_scores(cache / "shard.npz")


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "run/manifest.parquet": lambda run, cache: read_manifest(run),
    "run/arrays/index.json": read_arrays,
    "run/masks/index.json": read_masks,
    f"run/{FAMILIAR}": lambda run, cache: load_familiarity(run),
    "cache/shard.npz": read_masks,
    "run/model.sha256": lambda run, cache: load_network(run),
}


def read_damaged(faults: FaultTable, whole: Path, name: str, content: bytes) -> bool:
    """Reads a file of the run that now has this content; the file is put back after."""
    path = whole / name
    before, names = path.read_bytes(), sorted(whole.rglob("*"))
    path.write_bytes(content)
    try:
        return ends_well(faults, lambda: READERS[name](whole / "run", whole / "cache"))
    finally:
        path.write_bytes(before)
        assert sorted(whole.rglob("*")) == names


@pytest.mark.parametrize("name", READERS)
@given(kind=KINDS, seed=SEEDS)
@hostile
def test_a_damaged_file_of_a_run_is_read_right_or_refused(
    faults: FaultTable, whole: Path, name: str, kind: str, seed: int
) -> None:
    read_damaged(faults, whole, name, damage((whole / name).read_bytes(), kind, seed))


JSON = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
        st.sampled_from(["../../x", "/etc/passwd", "shard.npy", "s3://b/x", "\x00", "a" * 5_000]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [
                    *("shards", "images", "name", "facts", "parts", "inputs", "seconds", "files", "threshold", "run"),
                    *("history", "model", "sha256", "of", "news", "run_dir", "report", "val", "test", "verdict"),
                ]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)
TEXTS = st.one_of(JSON.map(lambda value: json.dumps(value)), st.just("[" * 100_000), st.text(max_size=20))


def read_all_records(folder: Path) -> list[Callable[[], Any]]:
    """What reads a JSON file named ``record.json``, under each of its roles."""
    settings = Settings(run_dir=str(folder))
    return [
        lambda: read_seal(settings),
        lambda: read_stage(folder, "pack"),
        lambda: as_packed(folder, settings),
        lambda: read_shared(str(folder), "published.json", settings),
        lambda: read_threshold(folder),
        lambda: PackedImages(folder, folder),
        lambda: DeviceMasks(folder, folder),
        lambda: shards_exist(folder / "arrays" / "index.json", folder),
        lambda: known_files(folder / "shelf"),
        lambda: load_checkpoint(folder / "member_1", "x"),
    ]


PLACES: tuple[str, ...] = (
    "run.json",
    "stages/pack.json",
    "published.json",
    "metrics.json",
    "arrays/index.json",
    "masks/index.json",
)
PLACES += ("stages/evaluate.json", "shelf/shard.json", "member_1/checkpoint.json")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    save_network(network(), folder)
    for name in PLACES:
        (folder / name).parent.mkdir(exist_ok=True)
    (folder / "shelf" / "shard.npy").write_bytes(b"")
    return folder


@given(text=TEXTS)
@hostile
def test_any_json_in_place_of_a_record_is_read_or_refused(faults: FaultTable, records: Path, text: str) -> None:
    for name in PLACES:
        (records / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    for read in read_all_records(records):
        ends_well(faults, read)


@given(text=TEXTS)
@hostile
def test_a_stage_whose_record_in_the_cache_is_garbage_is_done_again(
    faults: FaultTable, tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.mktemp("stage")
    settings = Settings(run_dir=str(folder / "run"), storage=StorageSettings(cache=str(folder / "cache")))

    def make(out: Path) -> dict[str, Any]:
        (out / "a.txt").write_text("whole")
        return {"n": 1}

    def do() -> dict[str, Any]:
        return run_stage(settings, "pack", module="tasks.records", inputs={}, make=make)

    do()
    (record,) = (folder / "cache").rglob("stage.json")
    (folder / "run" / "a.txt").write_text("half")
    record.write_text(text, encoding="utf-8", errors="surrogatepass")
    (folder / "run" / "a.txt").unlink()
    if ends_well(faults, do):
        assert (folder / "run" / "a.txt").read_text() == "whole"


def test_a_record_that_names_files_outside_of_the_run_removes_none(faults: FaultTable, tmp_path: Path) -> None:
    settings = Settings(run_dir=str(tmp_path / "run"), storage=StorageSettings(cache=str(tmp_path / "cache")))
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (tmp_path / "run" / "stages").mkdir(parents=True)
    for name in ("../outside.txt", str(outside), "a/../../outside.txt"):
        (tmp_path / "run" / "stages" / "pack.json").write_text(json.dumps({"files": [name]}))
        assert not ends_well(
            faults, lambda: run_stage(settings, "pack", module="tasks.records", inputs={}, make=lambda out: {"n": 1})
        )
        assert outside.read_text() == "mine"
    with pytest.raises(RunError, match="leads out"):
        inside(tmp_path, "../x")


@given(kind=KINDS, seed=SEEDS)
@hostile
def test_packed_pixels_that_are_not_what_was_packed_are_never_used(
    faults: FaultTable, tmp_path_factory: pytest.TempPathFactory, whole: Path, kind: str, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("shelf")
    files = {}
    for i, data in enumerate(PNGS):
        (folder / f"{i}.png").write_bytes(data)
        files[sha256_of_file(folder / f"{i}.png")] = f"{i}.png"
    name = pack_shard(folder, files, folder / "shelf", padding=False, max_side_px=5_000)
    run = folder / "run"
    (run / "arrays").mkdir(parents=True)
    places = {"a": [0, 0], "b": [0, 1]}
    (run / "arrays" / "index.json").write_text(
        json.dumps({"shards": [{"name": f"shelf/{name}.npy"}], "images": places})
    )
    right = PackedImages(run, folder).read(["a", "b"])
    shard = folder / "shelf" / f"{name}.npy"
    before = shard.read_bytes()
    shard.write_bytes(damage(before, kind, seed))
    got: list[Any] = []
    if ends_well(faults, lambda: got.append(PackedImages(run, folder).read(["a", "b"]))):
        assert np.array_equal(got[0], right)


def make_png(seed: int) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


PNGS = (make_png(0), make_png(1))


# -- pickles and screeners ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"run/{FAMILIAR}", "cache/shard.npz", "cache/shard.npy"])
def test_a_pickle_in_an_array_is_never_loaded(faults: FaultTable, whole: Path, tmp_path: Path, name: str) -> None:
    mark, stream = tmp_path / MARK, io.BytesIO()
    objects = np.array([Runs(mark)], dtype=object)
    if name.endswith(".npy"):
        np.save(stream, objects, allow_pickle=True)
    else:
        fields = ("mean", "axes", "spreads", "rest", "turned", "bound", "scores", "masks")
        np.savez(stream, allow_pickle=True, **dict.fromkeys(fields, objects))
    path = whole / name
    before = path.read_bytes()
    path.write_bytes(stream.getvalue())
    try:
        reader = READERS.get(name, read_arrays)
        assert not ends_well(faults, lambda: reader(whole / "run", whole / "cache"))
    finally:
        path.write_bytes(before)
    assert not mark.exists()


@given(kind=KINDS, seed=SEEDS, name=st.sampled_from(["model.keras", "model.sha256", "readings.csv"]))
@hostile
def test_a_damaged_screener_is_used_as_it_is_or_refused(
    faults: FaultTable, screener: Path, kind: str, seed: int, name: str
) -> None:
    from tasks.screener import load_screener

    path = screener / name
    before = path.read_bytes()
    path.write_bytes(damage(before, kind, seed) if name != "model.keras" else damage(before[:2_000], kind, seed))

    def use() -> None:
        found = find_screener(ScreeningSettings(screener=str(screener)).screener)
        known_readings(found.folder)
        load_screener(found.folder)

    try:
        if name == "readings.csv":
            ends_well(faults, lambda: known_readings(screener))
        else:
            ends_well(faults, use)
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def screener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    folder = tmp_path_factory.mktemp("screener") / "screener"
    shutil.copytree(SHIPPED_SCREENER, folder)
    rows = (folder / "readings.csv").read_text().splitlines()[:50]
    (folder / "readings.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_a_manifest_that_lacks_a_column_is_refused_by_name(faults: FaultTable, tmp_path: Path) -> None:
    pd.DataFrame({"path": ["a"]}).to_parquet(tmp_path / "manifest.parquet")
    assert not ends_well(faults, lambda: read_manifest(tmp_path))
    with pytest.raises(PipelineError, match=r"manifest\.parquet"):
        read_manifest(tmp_path)
