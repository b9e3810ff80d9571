"""A source that changes, vanishes or grows while it is read, and one that may only be read.

What is recorded is the checksum of what was packed, or the run refuses and names the file; never a mixture, and nothing
that later runs would take from the cache.
"""

import hashlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from fault_table import FaultTable
from PIL import Image
from stage_steps import ingest_all, pack_all, screen_all

from tasks.errors import PipelineError, SourceError
from tasks.files import REPOSITORY, digest, sha256_of_file
from tasks.pixels.decoding import decode
from tasks.pixels.packed import PackedImages
from tasks.runs.manifest import read_manifest
from tasks.runs.stages import read_stage
from tasks.settings import Settings

CHANGES, READ_ONLY = "source that changes while it is read", "read-only source"
N_IMAGES = 40
N_TURNS = 60
CONTENTS: dict[str, bytes] = {}
"""All that was ever in a file of a source here, by its checksum."""


def draw(path: Path, seed: int) -> None:
    """Puts noise in place of a picture, in one step as a copying program would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 60), dtype=np.uint8)
    Image.fromarray(pixels).save(path.with_suffix(".new.png"))
    data = path.with_suffix(".new.png").read_bytes()
    CONTENTS[hashlib.sha256(data).hexdigest()] = data
    os.replace(path.with_suffix(".new.png"), path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for i in range(N_IMAGES):
        split, label = ("train", "test")[i % 8 < 2], ("NORMAL", "PNEUMONIA")[i % 2]
        draw(folder / split / label / f"person{i}_virus_{i}.png", i)
    return folder


@pytest.fixture
def settings(source: Path, tmp_path: Path) -> Settings:
    kept = {"cache": str(tmp_path / "cache"), "raw": str(tmp_path / "raw")}
    return Settings(source=str(source), run_dir=str(tmp_path / "run"), storage=kept)


def check_recorded(settings: Settings) -> None:
    """The manifest's checksums are of the bytes that were packed, and the source's one is made of just these."""
    run = Path(str(settings.run_dir))
    manifest = read_manifest(run)
    sums = dict(zip(manifest["path"], manifest["sha256"], strict=True))
    tables = read_stage(run, "ingest").facts["table_sha256"]
    assert read_stage(run, "ingest").facts["sha256"] == digest({**sums, **tables})
    packed = PackedImages(run, Path(settings.storage.cache))
    for row in manifest[manifest["excluded"] == ""].to_dict("records"):
        np.testing.assert_array_equal(packed.read([row["image_id"]])[0], decode(CONTENTS[row["sha256"]]))


def between(monkeypatch: pytest.MonkeyPatch, name: str, happens: Callable[[], None]) -> None:
    """Has something happen to the source, once, just before a step of ingestion or packing."""
    module, _, function = name.rpartition(".")
    real = getattr(sys.modules[module], function)
    turns: list[int] = []

    def first(*arguments: object, **named: object) -> object:
        if not turns:
            turns.append(1)
            happens()
        return real(*arguments, **named)

    monkeypatch.setattr(sys.modules[module], function, first)


CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "changed before it is listed": (
        "tasks.preparing.ingestion.read_file",
        lambda path: draw(path, 999),
        "changed while",
    ),
    "gone before it is listed": ("tasks.preparing.ingestion.read_file", lambda path: path.unlink(), "cannot be read"),
    "changed before it is packed": (
        "tasks.preparing.packing.open_source",
        lambda path: draw(path, 999),
        "changed while",
    ),
    "gone before it is packed": ("tasks.preparing.packing.open_source", lambda path: path.unlink(), "cannot be read"),
    "gone before its checksum": ("tasks.sources.checksums.open_source", lambda path: path.unlink(), "cannot be read"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_changes_or_goes_is_refused_by_name_and_put_back_it_runs_as_before(
    case: str, faults: FaultTable, settings: Settings, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, happens, reason = CASES[case]
    path = source / "train" / "PNEUMONIA" / "person39_virus_39.png"
    before = path.read_bytes()
    with faults.attempt(CHANGES) as attempt:
        between(monkeypatch, step, lambda: happens(path))
        with pytest.raises(SourceError, match=rf"{path.name} {reason}"):
            pack_all(settings, ingest_all(settings)["folder"])
        monkeypatch.undo()
        path.write_bytes(before)
        pack_all(settings, ingest_all(settings)["folder"])
        check_recorded(settings)
        sums = {p.relative_to(source).as_posix(): sha256_of_file(p) for p in source.rglob("*.png")}
        attempt.whole(read_stage(Path(str(settings.run_dir)), "ingest").facts["sha256"] == digest(sums), "a mixture")


@pytest.mark.parametrize("happens", ["changes", "comes"])
def test_a_review_table_that_is_not_the_one_of_the_checksum_is_refused_by_name(
    happens: str, faults: FaultTable, settings: Settings, source: Path
) -> None:
    table, rows = source / "device_review.csv", [p.relative_to(source).as_posix() for p in source.rglob("*.png")]
    text = "path,device\n" + "".join(f"{row},0\n" for row in rows)
    if happens == "changes":
        table.write_text(text)
    with faults.attempt(CHANGES):
        folder = ingest_all(settings)["folder"]
        pack_all(settings, folder)
        table.write_text(text.replace(",0\n", ",1\n"))
        with pytest.raises(SourceError, match=r"device_review\.csv changed while the source was read; run again"):
            screen_all(settings, folder)


def test_a_file_that_comes_while_a_source_is_read_is_left_to_the_next_run(
    faults: FaultTable, settings: Settings, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faults.attempt(CHANGES):
        new = source / "train" / "NORMAL" / "person90_virus_90.png"
        between(monkeypatch, "tasks.preparing.ingestion.read_file", lambda: draw(new, 90))
        pack_all(settings, ingest_all(settings)["folder"])
        assert len(read_manifest(Path(str(settings.run_dir)))) == N_IMAGES
        check_recorded(settings)
        pack_all(settings, ingest_all(settings)["folder"])
        assert len(read_manifest(Path(str(settings.run_dir)))) == N_IMAGES + 1
        check_recorded(settings)


@pytest.mark.parametrize("step", ["plan_layout", "show_bytes"])
def test_a_zip_that_is_replaced_while_it_is_read_is_refused_by_name(
    step: str, faults: FaultTable, settings: Settings, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "set"), "zip", source))
    zipped = settings.model_copy(update={"source": str(archive)})
    draw(source / "train" / "PNEUMONIA" / "person39_virus_39.png", 999)
    other = Path(shutil.make_archive(str(tmp_path / "other"), "zip", source))
    with faults.attempt(CHANGES) as attempt:
        between(monkeypatch, f"tasks.sources.fetching.{step}", lambda: os.replace(other, archive))
        with pytest.raises(SourceError, match=r"set\.zip changed while it was read; run again"):
            ingest_all(zipped)
        attempt.whole(not list((tmp_path / "raw").glob("set-*")), "a mixture was left in the folder of raw data")
        folder = ingest_all(zipped)["folder"]
        assert sha256_of_file(Path(folder, "train/PNEUMONIA/person39_virus_39.png")) == sha256_of_file(
            source / "train" / "PNEUMONIA" / "person39_virus_39.png"
        )


@pytest.mark.long
def test_a_source_that_never_stops_changing_gives_one_whole_reading_or_a_refusal_by_name(
    faults: FaultTable, settings: Settings, source: Path, tmp_path: Path
) -> None:
    """Another thread rewrites, removes and adds files at random moments, some within a reading."""
    start = time.perf_counter()
    ingest_all(settings)
    pace = time.perf_counter() - start
    stop, draws = threading.Event(), random.Random(8)
    paths = sorted(source.rglob("*.png"))

    def change() -> None:
        while not stop.wait(draws.uniform(0, pace)):  # about a quarter of the readings is refused
            path = draws.choice(paths)
            if draws.random() < 0.2:
                path.unlink(missing_ok=True)
            else:
                draw(path, draws.randrange(10**6))

    thread = threading.Thread(target=change)
    thread.start()
    n_refused = 0
    try:
        for turn in range(N_TURNS):
            run = settings.model_copy(update={"run_dir": str(tmp_path / "runs" / str(turn))})
            with faults.attempt(CHANGES):
                try:
                    pack_all(run, ingest_all(run)["folder"])
                    check_recorded(run)
                except PipelineError as error:
                    n_refused += 1
                    assert "source: " in str(error) and ".png" in str(error)
    finally:
        stop.set()
        thread.join()
    assert 0 < n_refused < N_TURNS, "all of one kind show nothing"


# -- a source that may only be read ------------------------------------------------------------------------------------


@pytest.fixture
def read_only(source: Path) -> Iterator[Path]:
    """The source where nobody may write, not even root: mounted once more, read-only."""
    mount = ["mount", "--bind", str(source), str(source)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a folder cannot be mounted read-only here ({done.stderr.strip()})")
    subprocess.run(["mount", "-o", "remount,bind,ro", str(source)], check=True)
    try:
        yield source
    finally:
        subprocess.run(["umount", "--lazy", str(source)], check=True)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_source_is_read_where_nobody_may_write(
    kind: str, faults: FaultTable, settings: Settings, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = Path(settings.source)
    if kind == "zip":
        archive = Path(shutil.make_archive(str(tmp_path / "set"), "zip", source))
        shutil.rmtree(source)
        source.mkdir()
        settings = settings.model_copy(update={"source": str(shutil.move(archive, source))})
    folder = request.getfixturevalue("read_only")
    with pytest.raises(OSError, match="Read-only"):
        (folder / "new").touch()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with faults.attempt(READ_ONLY):
        pack_all(settings, ingest_all(settings)["folder"])
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        assert len(read_manifest(Path(str(settings.run_dir)))) == N_IMAGES


def test_a_folder_of_the_source_that_may_not_be_listed_is_named_and_not_taken_for_empty(
    faults: FaultTable, source: Path
) -> None:
    """As another user, since root may list everything."""
    if os.getuid() != 0:
        pytest.skip("needs root, to become somebody else")
    with TemporaryDirectory() as folder, faults.attempt(READ_ONLY):
        there = Path(folder, "source")
        shutil.copytree(source, there)
        Path(folder).chmod(0o755)
        (there / "train" / "NORMAL").chmod(0o700)
        code = "import os, sys; from tasks.settings import Settings; from tasks.sources.fetching import fetch_source\n"
        code += "os.setuid(65534); fetch_source(Settings(source=sys.argv[1]))"
        command = [sys.executable, "-c", code, str(there)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert f"SourceError: source: {there / 'train' / 'NORMAL'} cannot be read (Permission denied)" in done.stderr


def test_times_of_files_in_the_future_or_long_ago_change_nothing(
    faults: FaultTable, settings: Settings, source: Path, tmp_path: Path
) -> None:
    pack_all(settings, ingest_all(settings)["folder"])
    other = settings.model_copy(update={"run_dir": str(tmp_path / "other")})
    with faults.attempt("clock that jumps"):
        for i, path in enumerate(sorted([*source.rglob("*.png"), *(tmp_path / "cache").rglob("*")])):
            moment = time.time() + (86_400 * 365 if i % 2 else -86_400 * 365 * 30)
            os.utime(path, (moment, moment))
        facts = ingest_all(other)
        assert facts["reused"] and pack_all(other, facts["folder"])["reused"]
