"""Whatever lies in place of a file of a run or the cache: it is refused by name, or done again; nothing in it runs."""

import io
import json
import os
import random
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

from tasks.devices.files import SHIPPED_SCREENER, find_screener, known_readings
from tasks.errors import PipelineError, RunError
from tasks.files import digest, inside, sha256_of_file
from tasks.networks.checkpoints import load_checkpoint
from tasks.networks.familiarity import FILE as FAMILIAR
from tasks.networks.familiarity import fit_familiarity, load_familiarity, save_familiarity
from tasks.networks.files import load_network, save_network
from tasks.pixels.masks import Masks, read_scores, write_shard
from tasks.pixels.packed import PackedImages
from tasks.pixels.shards import shards_exist
from tasks.preparing.packing import known_files, pack_shard
from tasks.publishing.published import describe_candidate, read_published
from tasks.publishing.rules import Candidate, Published, weigh_candidate
from tasks.runs.bucket import read_seal
from tasks.runs.manifest import read_manifest
from tasks.runs.run import Run
from tasks.runs.stages import read_stage
from tasks.scoring.scores import as_packed, read_threshold
from tasks.settings import PublishingSettings, ScreeningSettings, Settings, StorageSettings

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
    masks = Masks(run, cache)
    assert masks.read(list(masks._rows)).shape[1:] == (224, 224)
    read_scores(cache / "shelf" / "shard.npz")


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "run/manifest.parquet": lambda run, cache: read_manifest(run),
    "run/arrays/index.json": read_arrays,
    "run/masks/index.json": read_masks,
    f"run/{FAMILIAR}": lambda run, cache: load_familiarity(run),
    "cache/shelf/shard.npz": read_masks,
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


FIGURES = {"n": 3, "auc": {"value": 0.9, "low": 0.8, "high": 1.0}}
MODEL = {"run": "one", "run_dir": "runs/one", "model_sha256": "0" * 64, "audit": {"passed": True, "failed": []}}
MODEL |= dict.fromkeys(("val", "val_device_free"), FIGURES | {"images": "a"})
RECORDS: dict[str, Any] = {
    "run.json": {"settings": {"seed": 7}, "seed": 7, "source": {"sha256": "a"}, "seconds": {"fit": 1.0}},
    "stages/pack.json": {"facts": {"n_packed": 2}, "parts": {"inputs": {"padding": False}}, "files": ["a.txt"]},
    "stages/evaluate.json": {"facts": {}, "parts": {"inputs": {"model": "0" * 64}}, "files": []},
    "published.json": MODEL
    | {"published": "2026-01-02", "earlier": [MODEL | {"published": "2026-01-01"}]}
    | {"withdrawn": [MODEL | {"published": "2026-01-01", "withdrawn": "2026-01-02"}]},
    "metrics.json": {"threshold": 0.5, "val": FIGURES, "val_device_free": FIGURES},
    "audit.json": {"verdict": {"model": {"passed": True, "failed": []}}, "split": "val", "n_images": 3},
    "checks/prepared/summary.json": [{"says": "no patient is in two", "success": None, "reason": "none is known"}],
    "arrays/index.json": {"side_px": 224, "shards": [{"name": "shelf/shard.npy"}], "images": {"a": [0, 0]}},
    "masks/index.json": {"shards": [{"name": "shelf/shard.npz"}], "images": {"a": [0, 0]}},
    "shelf/shard.json": {"rows": ["a"], "failed": {"b": "is empty"}},
    "member_1/checkpoint.json": {"history": [{"epoch": 1}], "model": "a.keras", "sha256": "0" * 64, "of": "x"},
}
"""What a run writes, in short, in each of the places where it is read."""


def read_all_records(folder: Path) -> dict[str, Callable[[], Any]]:
    """What reads the records of ``RECORDS``, by the place where one is read."""
    settings = Settings(run_dir=str(folder))

    def look_at_published() -> None:
        published = read_published(str(folder), settings)
        assert published is not None
        for one in (published, *published.earlier, *published.withdrawn):
            str(one)
        weigh_candidate(Candidate.model_validate(MODEL), published, PublishingSettings())

    def weigh(candidate: Candidate) -> None:
        weigh_candidate(candidate, Published.model_validate(RECORDS["published.json"]), PublishingSettings())

    def look_at_metrics() -> None:
        read_threshold(folder)
        weigh(describe_candidate(folder, "runs/one"))

    return {
        "run.json": lambda: read_seal(Run(settings)),
        "stages/pack.json": lambda: [read_stage(folder, "pack"), as_packed(folder, settings)],
        "stages/evaluate.json": lambda: read_threshold(folder),
        "published.json": look_at_published,
        "metrics.json": look_at_metrics,
        "audit.json": lambda: weigh(describe_candidate(folder, "runs/one")),
        "checks/prepared/summary.json": lambda: weigh(describe_candidate(folder, "runs/one")),
        "arrays/index.json": lambda: [
            PackedImages(folder, folder).read(["a"]),
            shards_exist(folder / "arrays" / "index.json", folder),
        ],
        "masks/index.json": lambda: Masks(folder, folder).read(["a"]),
        "shelf/shard.json": lambda: known_files(folder / "shelf"),
        "member_1/checkpoint.json": lambda: load_checkpoint(folder / "member_1", "x"),
    }


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the records, and with the files that are read beside them."""
    folder = tmp_path_factory.mktemp("records")
    for name in RECORDS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    RECORDS["stages/evaluate.json"]["parts"]["inputs"]["model"] = save_network(network(), folder)
    np.save(folder / "shelf" / "shard.npy", np.zeros((1, 224, 224), np.uint8))
    write_shard(folder / "shelf" / "shard.npz", np.zeros((1, 224, 224), np.uint8), scores=np.zeros(1, np.float32))
    (folder / "predictions.csv").write_text("path,split,label,has_device\na,val,1,False\n")
    for name, record in RECORDS.items():
        if name == "member_1/checkpoint.json":
            record["sha256"] = save_network(network(), folder / "member_1", "a")
            record["digest"] = digest(record)
        (folder / name).write_text(json.dumps(record))
    return folder


def test_the_records_that_are_spoiled_here_are_read_as_long_as_they_are_whole(
    faults: FaultTable, records: Path
) -> None:
    for name, read in read_all_records(records).items():
        assert ends_well(faults, read), name
    assert load_checkpoint(records / "member_1", "x") is not None


def spoil(record: Any, value: Any, seed: int) -> Any:
    """A record in which another value, or nothing, stands in one place."""
    dice, record = random.Random(seed), json.loads(json.dumps(record))
    parents: list[Any] = [record]
    for parent in parents:
        children = parent.values() if isinstance(parent, dict) else parent
        parents += [child for child in children if child and isinstance(child, dict | list)]
    places = [(p, key) for p in parents for key in (p if isinstance(p, dict) else range(len(p)))]
    parent, key = dice.choice(places)
    if dice.random() < 0.2:
        del parent[key]
    else:
        parent[key] = value
    return record


@pytest.mark.parametrize("name", RECORDS)
@given(value=JSON, seed=SEEDS)
@hostile
def test_any_json_in_place_of_a_part_of_a_record_is_read_or_refused(
    faults: FaultTable, records: Path, name: str, value: Any, seed: int
) -> None:
    before = (records / name).read_text()
    text = json.dumps(spoil(json.loads(before), value, seed))
    (records / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        ends_well(faults, read_all_records(records)[name])
    finally:
        (records / name).write_text(before)


@given(text=TEXTS)
@hostile
def test_any_text_in_place_of_a_record_is_read_or_refused(faults: FaultTable, records: Path, text: str) -> None:
    for name, read in read_all_records(records).items():
        before = (records / name).read_text()
        (records / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            ends_well(faults, read)
        finally:
            (records / name).write_text(before)


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
        return Run(settings).stage("pack", given={}, make=make)

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
        assert not ends_well(faults, lambda: Run(settings).stage("pack", given={}, make=lambda out: {"n": 1}))
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


@pytest.mark.parametrize("name", [f"run/{FAMILIAR}", "cache/shelf/shard.npz", "cache/shelf/shard.npy"])
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
    from tasks.devices.screener import load_screener

    path = screener / name
    before = path.read_bytes()
    path.write_bytes(damage(before, kind, seed))
    same = path.read_bytes() == before

    def use() -> None:
        found = find_screener(ScreeningSettings(screener=str(screener)).screener)
        known_readings(found.folder)
        load_screener(found.folder)

    try:
        if name == "readings.csv":
            ends_well(faults, lambda: known_readings(screener))
        else:
            used = ends_well(faults, use)
            assert used or not same
            assert not used or name == "model.sha256" or same, "a network that is not the one of the checksum was used"
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
