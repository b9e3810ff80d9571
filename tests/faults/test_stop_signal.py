"""SIGTERM, as a machine sends that is taken away: training saves and stops at once, and the next run goes on there."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from broken_runs import (
    BEFORE_TRAINING,
    EXPLAINED,
    broken_files,
    copy_place,
    epochs_done,
    finish,
    finished_work,
    started,
    steps_saved,
    wait_seconds,
    wait_until,
)
from fault_table import FaultTable
from pipeline_runs import compare_runs
from recipe import LONG_EPOCHS, to_flags

FAULT = "SIGTERM to a command-line run"
STOPPED = "stopped; the same command with the same --run-dir resumes from here"
LONGEST_S = 60.0
"""Far more than the seconds that it takes: a busy machine is no failure."""


def stop(process: subprocess.Popen[bytes], log: Path) -> str:
    """Sends SIGTERM: it ends within seconds, and its log, which is returned, says how to go on."""
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(600)
    said = log.read_text()
    assert time.monotonic() - told < LONGEST_S
    assert process.returncode == 143, said[-2000:]
    assert said.strip().splitlines()[-1] == STOPPED
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("n_stops", [pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.long)])
def test_a_training_that_is_told_to_stop_within_an_epoch_saves_its_steps_and_goes_on_from_there(
    n_stops: int, faults: FaultTable, api: str, finished_run: Path, workspace: Path, tmp_path: Path
) -> None:
    """Ten steps an epoch, and more epochs than the stops can use; a signal that came between two is sent again.

    After several stops the run is compared with an undisturbed one.
    """
    more = to_flags({"training": LONG_EPOCHS | {"batch_size": 2, "epochs": 12}})
    place = copy_place(workspace, tmp_path / "stopped", BEFORE_TRAINING)
    steps: list[int] = []
    while len(steps) < n_stops or not any(steps):
        assert len(steps) < n_stops + 3, "no signal came within an epoch, or none saved its steps"
        with faults.attempt(FAULT) as attempt:
            with started(place, place.flags(*more), api) as process:
                log = place.last_log
                assert wait_until(process, lambda log=log: "member 1 of 1, epoch" in log.read_text())  # type: ignore[misc]
                wait_seconds(process, 0.1 * len(steps))
                stop(process, log)
            attempt.whole(not broken_files(place.folder), f"half-written: {broken_files(place.folder)}")
            steps.append(steps_saved(place.cache))
    before = finished_work(place)
    with faults.attempt(FAULT) as attempt:
        exit_code, said = finish(place, place.flags(*more), api)
        attempt.kept(exit_code == 0, said[-2000:])
        attempt.kept(before.items() <= finished_work(place).items(), "finished work was done again")
        assert max(epochs_done(place.log).values()) == 1, "an epoch was repeated"
        assert re.search(rf"resuming after epoch \d+ and {next(filter(None, steps))} steps from", place.log)
        if n_stops > 1:
            whole = copy_place(workspace, tmp_path / "whole", BEFORE_TRAINING)
            exit_code, said = finish(whole, whole.flags(*more), api)
            assert exit_code == 0, said[-2000:]
            compare_runs(attempt, place.run, whole.run)


@pytest.mark.long
@pytest.mark.parametrize("after", ["check-source", "check-prepared", "evaluate"])
def test_a_run_that_is_told_to_stop_in_another_stage_says_how_to_go_on(
    after: str, faults: FaultTable, api: str, finished_run: Path, workspace: Path, tmp_path: Path
) -> None:
    place = copy_place(
        workspace, tmp_path, [path.name for path in (workspace / "cache").iterdir() if path.is_dir()], EXPLAINED
    )
    for stage in ("check_source", "screen", "masks", "calibrate", "explain", "explanations"):
        for entry in (place.cache / stage).iterdir():
            entry.rename(tmp_path / f"away-{stage}-{entry.name}")
    with faults.attempt(FAULT) as attempt:
        with started(place, place.flags(), api) as process:
            log = place.last_log
            begun = "Beginning flow run"
            wait_until(process, lambda: (f"Task run '{after}" if after else begun) in log.read_text())
            wait_seconds(process, 0.3)
            said = stop(process, log)
        attempt.whole(not broken_files(tmp_path), f"half-written: {broken_files(tmp_path)}")
        exit_code, said = finish(place, place.flags(), api)
        attempt.kept(exit_code == 0, said[-2000:])
        compare_runs(attempt, place.run, finished_run)
