"""SIGTERM, as a machine sends that is taken away: training saves and stops at once, and the next run goes on there."""

import json
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
    compare_runs,
    copy_place,
    epochs_done,
    finish,
    finished_work,
    started,
    wait_seconds,
    wait_until,
)
from fault_table import FaultTable

FAULT = "SIGTERM to a command-line run"
STOPPED = "stopped; the same command with the same --run-dir goes on from here"
GENEROUS_S = 90.0
"""It is a matter of seconds; a busy machine, which also has to stop Prefect's engine, gets more."""


def stop(process: subprocess.Popen[bytes], log: Path) -> str:
    """Sends SIGTERM: it ends within seconds, and its log, which is returned, says how to go on."""
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(600)
    said = log.read_text()
    assert time.monotonic() - told < GENEROUS_S
    assert process.returncode == 143, said[-2000:]
    assert said.strip().splitlines()[-1] == STOPPED
    assert "Traceback" not in said
    return said


def test_a_training_that_is_told_to_stop_saves_and_goes_on_without_repeating_an_epoch(
    faults: FaultTable, api: str, finished_run: Path, workspace: Path, tmp_path: Path
) -> None:
    place = copy_place(workspace, tmp_path, BEFORE_TRAINING)
    with faults.attempt(FAULT) as attempt:
        with started(place, place.flags(), api) as process:
            log = place.last_log
            assert wait_until(process, lambda: "member 1 of 2, epoch 1" in log.read_text()), log.read_text()[-2000:]
            said = stop(process, log)
        attempt.whole(not broken_files(tmp_path), f"half-written: {broken_files(tmp_path)}")
        before, epochs = finished_work(place), epochs_done(said)
        exit_code, said = finish(place, place.flags(), api)
        attempt.kept(exit_code == 0, said[-2000:])
        attempt.kept(before.items() <= finished_work(place).items(), "finished work was done again")
        assert "going on after epoch" in said
        assert not set(epochs) & set(epochs_done(said)), "an epoch was repeated"
        compare_runs(attempt, place.run, finished_run)


@pytest.mark.long
def test_a_training_that_is_stopped_in_the_middle_of_epochs_goes_on_from_the_very_step(
    faults: FaultTable, api: str, finished_run: Path, workspace: Path, tmp_path: Path
) -> None:
    """Ten steps an epoch, so that most signals come in the middle of one; more epochs than three stops can use."""
    more = ["--training.batch-size", "2", "--training.epochs", "30", "--training.n-models", "1"]
    whole = copy_place(workspace, tmp_path / "whole", BEFORE_TRAINING)
    exit_code, said = finish(whole, whole.flags(*more), api)
    assert exit_code == 0, said[-2000:]
    place = copy_place(workspace, tmp_path / "stopped", BEFORE_TRAINING)
    n_in_epochs = 0
    for number in (1, 2, 3):
        with faults.attempt(FAULT) as attempt:
            with started(place, place.flags(*more), api) as process:
                log = place.last_log
                assert wait_until(process, lambda log=log: "member 1 of 1, epoch" in log.read_text())  # type: ignore[misc]
                wait_seconds(process, 0.1 * number)
                process.send_signal(signal.SIGTERM)
                process.wait(600)
            assert process.returncode == 143, log.read_text()[-2000:]
            attempt.whole(not broken_files(place.folder), f"half-written: {broken_files(place.folder)}")
            (checkpoint,) = place.cache.glob("fit/*.partial/members/member_1/checkpoint.json")
            n_in_epochs += bool(json.loads(checkpoint.read_text())["losses"])
            if number == 3:
                exit_code, said = finish(place, place.flags(*more), api)
                attempt.kept(exit_code == 0, said[-2000:])
                assert max(epochs_done(place.log).values()) == 1
                assert n_in_epochs, "no signal came in the middle of an epoch"
                assert re.search(r"going on after epoch \d+ and \d+ steps", place.log)
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
