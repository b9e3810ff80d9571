"""Two runs at once, in the same run folder or with the same cache: one waits, and each result is that of one run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from broken_runs import BEFORE_TRAINING, PATIENCE_S, Place, broken_files, copy_place, epochs_done, started
from fault_table import FaultTable
from PIL import Image
from pipeline_runs import compare_runs

from flows.engine.run_folders import own_run_folder
from tasks.files import REPOSITORY, sha256_of_file
from tasks.runs.run import Run
from tasks.settings import Settings

SAME_RUN, SAME_CACHE = "two runs at once in one run folder", "two runs at once with one cache"
WAITED = "is making"


def require_one_waited(said: list[str]) -> None:
    nothing, told = sorted(said)
    assert not nothing and re.fullmatch(r"another run \([\w ]+\) is making run; waiting for it\n", told), told


def run_both(one: tuple[Place, list[str]], two: tuple[Place, list[str]], api: str) -> list[str]:
    """Starts two at once and waits for both, which have to end well; what each of them said."""
    with started(*one, api) as first, started(*two, api) as second:
        logs = [one[0].last_log, two[0].last_log]
        if logs[0] == logs[1]:
            logs[0] = logs[0].with_name("000.log")
        for process in (first, second):
            process.wait(PATIENCE_S)
    said = [log.read_text() for log in logs]
    assert (first.returncode, second.returncode) == (0, 0), said[0][-2000:] + said[1][-2000:]
    return said


def do_twice(code: str, folder: Path, *arguments: str) -> list[str]:
    """Runs code in two processes that begin it together, once both have imported what they need; what each said."""
    together = f"""
import sys, time
from pathlib import Path
{code}
Path(sys.argv[1], sys.argv[2] + ".ready").touch()
while len(list(Path(sys.argv[1]).glob("*.ready"))) < 2:
    time.sleep(0.01)
do()
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", together, str(folder), name, *arguments],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    said = [process.communicate(timeout=PATIENCE_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return said


def test_a_flow_does_not_wait_for_the_one_that_called_it(tmp_path: Path) -> None:
    settings = Settings(run_dir=str(tmp_path / "run"))
    with own_run_folder(Run(settings)), own_run_folder(Run(settings)):
        (tmp_path / "run" / "record.txt").touch()


def test_a_cache_in_the_run_folder_keeps_the_work_that_is_to_be_gone_on_from(tmp_path: Path) -> None:
    begun, cut = tmp_path / "run" / "cache" / "fit" / "key.partial" / "checkpoint.json", tmp_path / "run" / "x.partial"
    begun.parent.mkdir(parents=True)
    begun.touch()
    cut.touch()
    with own_run_folder(Run(Settings(run_dir=str(tmp_path / "run")))):
        assert begun.exists() and not cut.exists()


def test_a_run_folder_is_held_by_one_process_and_the_other_waits_and_says_so(
    faults: FaultTable, tmp_path: Path
) -> None:
    code = """
from flows.engine.run_folders import own_run_folder
from tasks.runs.run import Run
from tasks.settings import Settings
def do():
    with own_run_folder(Run(Settings(run_dir=sys.argv[3]))):
        for _ in range(20):
            with Path(sys.argv[3], "record.txt").open("a") as stream:
                stream.write(sys.argv[2])
            time.sleep(0.05)
"""
    with faults.attempt(SAME_RUN):
        said = do_twice(code, tmp_path, str(tmp_path / "run"))
        record = (tmp_path / "run" / "record.txt").read_text()
        assert record in ("a" * 20 + "b" * 20, "b" * 20 + "a" * 20)
        require_one_waited(said)
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["record.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latest", "."])
def test_a_run_folder_is_held_under_each_of_its_names(faults: FaultTable, tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "latest").symlink_to("run")
    code = """
import os
import re
from flows.engine.run_folders import own_run_folder
from tasks.runs.run import Run
from tasks.settings import Settings
def do():
    folder = Path(sys.argv[3]).absolute()
    os.chdir(folder.parent / "latest")
    with own_run_folder(Run(Settings(run_dir=str(folder) if sys.argv[2] == "a" else sys.argv[4]))):
        part = folder / f"{sys.argv[2]}.partial"
        part.touch()
        for _ in range(20):
            with Path(folder, "record.txt").open("a") as stream:
                stream.write(sys.argv[2])
            time.sleep(0.05)
        part.unlink()
"""
    with faults.attempt(SAME_RUN) as attempt:
        other = name if name == "." else str(tmp_path / name)
        said = do_twice(code, tmp_path, str(tmp_path / "run"), other)
        record = (tmp_path / "run" / "record.txt").read_text()
        attempt.whole(record in ("a" * 20 + "b" * 20, "b" * 20 + "a" * 20), "both worked at once")
        require_one_waited(said)


@pytest.mark.slow
def test_a_training_of_a_screener_waits_for_the_one_that_works_in_its_run_folder(
    faults: FaultTable, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    code = """
from types import SimpleNamespace
import flows.train_screener as flow
from tasks.settings import Settings
def work(*_):
    for _ in range(10):
        with Path(sys.argv[3], "record.txt").open("a") as stream:
            stream.write(sys.argv[2])
        time.sleep(0.05)
flow.bring_run = flow.read_source = flow.fit_screener = work
def do():
    flow.train_screener.fn(Settings(run_dir=sys.argv[3]))
"""
    with faults.attempt(SAME_RUN) as attempt:
        said = do_twice(code, tmp_path, str(tmp_path / "run"))
        record = (tmp_path / "run" / "record.txt").read_text()
        attempt.whole(record in ("a" * 30 + "b" * 30, "b" * 30 + "a" * 30), "both worked at once")
        require_one_waited(said)


@pytest.mark.slow
def test_a_shard_that_two_processes_want_to_pack_is_packed_by_one(faults: FaultTable, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (900, 900), dtype=np.uint8)).save(tmp_path / "set" / f"{i}.png")
    code = """
from tasks.preparing.packing import pack_shard
from tasks.files import sha256_of_file
files = {sha256_of_file(path): path.name for path in Path(sys.argv[3]).iterdir()}
def do():
    pack_shard(Path(sys.argv[3]), files, Path(sys.argv[4]), padding=False, max_side_px=1_000)
"""
    shelf = tmp_path / "shelf"
    with faults.attempt(SAME_CACHE) as attempt:
        said = do_twice(code, tmp_path, str(tmp_path / "set"), str(shelf))
        assert sorted(bool(text) for text in said) == [False, True] and WAITED in "".join(said)
        (shard,) = shelf.glob("*.npy")
        attempt.whole(np.load(shard).shape == (20, 224, 224), "a half-written shard")
        assert sorted(path.suffix for path in shelf.iterdir()) == [".json", ".npy"]


@pytest.mark.long
def test_the_same_command_given_twice_at_once_is_done_once_and_ends_like_one(
    faults: FaultTable, api: str, finished_run: Path, workspace: Path, tmp_path: Path
) -> None:
    place = copy_place(workspace, tmp_path, BEFORE_TRAINING)
    with faults.attempt(SAME_RUN) as attempt:
        said = run_both((place, place.flags()), (place, place.flags()), api)
        assert sorted(WAITED in text for text in said) == [False, True]
        assert max(epochs_done("".join(said)).values()) == 1
        compare_runs(attempt, place.run, finished_run)
        attempt.whole(not broken_files(place.folder), f"half-written: {broken_files(place.folder)}")


@pytest.mark.long
def test_two_different_runs_that_are_given_one_folder_never_leave_a_mixture(
    faults: FaultTable, api: str, finished_run: Path, workspace: Path, tmp_path: Path
) -> None:
    place = copy_place(workspace, tmp_path, BEFORE_TRAINING)
    with faults.attempt(SAME_RUN) as attempt:
        said = run_both((place, place.flags()), (place, place.flags("--training.learning-rate", "0.0005")), api)
        assert sorted(WAITED in text for text in said) == [False, True]
        rate = json.loads((place.run / "run.json").read_text())["settings"]["training"]["learning_rate"]
        for path in sorted((place.run / "stages").glob("*.json")):
            record = json.loads(path.read_text())
            attempt.whole(record["parts"]["given"].get("training", {}).get("learning_rate", rate) == rate, path.name)
            for name in record["files"]:
                later = ("manifest.parquet", "excluded.csv")  # a later stage writes the manifest on
                entry = place.cache / record["entry"] / name
                attempt.whole(
                    name in later or sha256_of_file(place.run / name) == sha256_of_file(entry),
                    f"{name} is not of the run that sealed the folder",
                )


@pytest.mark.long
def test_two_runs_that_need_the_same_finished_work_at_once_make_it_once(
    faults: FaultTable, api: str, finished_run: Path, workspace: Path, tmp_path: Path
) -> None:
    one = copy_place(workspace, tmp_path / "one", ["masks"])
    two = Place(tmp_path / "two", tmp_path / "two" / "logs")
    flags = [*one.flags(), "--run-dir", str(two.run)]
    with faults.attempt(SAME_CACHE) as attempt:
        said = run_both((one, one.flags()), (two, flags), api)
        assert WAITED in "".join(said)
        assert max(epochs_done("".join(said)).values()) == 1, "an epoch was done by both"
        for place in (one, two):
            compare_runs(attempt, place.run, finished_run)
        entries = [path.parent.name for path in one.cache.glob("*/*/stage.json")]
        assert sorted(entries) == sorted(set(entries)), "work was done twice under two names"
        attempt.whole(not broken_files(tmp_path), f"half-written: {broken_files(tmp_path)}")
