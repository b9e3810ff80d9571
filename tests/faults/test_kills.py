"""kill -9 at any moment: the next run ends like an unbroken one, and nothing that was finished is done again."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from broken_runs import (
    BEFORE_TRAINING,
    EXPLAINED,
    TRAIN,
    Place,
    broken_files,
    copy_place,
    epochs_done,
    finish,
    finished_tasks,
    finished_work,
    seconds_of_tasks,
    started,
    wait_seconds,
    wait_until,
)
from fault_table import Attempt, FaultTable
from pipeline_runs import compare_runs

SEED = 8
FLOW, TRAINING = "kill -9 of the flow process", "kill -9 of the training process"
ORDER = ["fetch", "ingest", "check-source", "split", "plan packing", "pack shards", "pack", "plan screening"]
ORDER += [
    "screen shards",
    "screen",
    "segment",
    "check-prepared",
    "fit model",
    "calibrate model",
    "evaluate",
    "plan explanations",
    "explain shards",
]
ORDER += ["explain", "audit", "weigh", "report", "model card", "require a passed audit", "seal", "publish"]
ORDER += ["note finished"]
AIMS = [*ORDER[:3], "pack shards", "pack", "screen shards", "screen", "check-prepared", *["fit model"] * 2]
AIMS += ["calibrate model", "evaluate", "explain shards", "explain", "audit", "report", "seal"]
"""Stages that are killed in, one after the other, in the long version."""


def under_way(log: str) -> str:
    """The task that a process was at when it died."""
    done = finished_tasks(log)
    if not done:
        first = "fit model" if "for flow 'train'" in log else ORDER[0]
        return first if "Beginning flow run" in log else ""
    return ORDER[min(ORDER.index(done[-1]) + 1, len(ORDER) - 1)]


def note_repeated(attempt: Attempt, task: str) -> None:
    """Says what the next process does again: what the killed one was at."""
    words = {"": "nothing", "fit model": "one epoch"}
    attempt.repeated(words.get(task, "one shard" if task.endswith("shards") else "one stage that was not finished"))


def kill_after(
    attempt: Attempt,
    place: Place,
    api: str,
    seconds: float,
    ready: Callable[[str], bool] = lambda log: True,
    code: str | None = None,
) -> None:
    """Kills a run some seconds after its start, or after its log is ready for it.

    What it had finished until then is still there afterwards, and what bears its final name is whole.
    """
    before = finished_work(place)
    with started(place, place.flags(), api, code) as process:
        log = place.last_log
        wait_until(process, lambda: ready(log.read_text()))
        alive = wait_seconds(process, seconds)
        process.kill()
        process.wait()
    assert alive, f"it ended before it was killed:\n{log.read_text()[-2000:]}"
    attempt.whole(not broken_files(place.folder), f"half-written: {broken_files(place.folder)}")
    attempt.kept(before.items() <= finished_work(place).items(), "finished work was lost or done again")
    note_repeated(attempt, under_way(log.read_text()))


def finished(task: str) -> Callable[[str], bool]:
    """Whether a log says that a task or a later one is finished; shards that were all there already are no task."""
    return lambda log: any(ORDER.index(name) >= ORDER.index(task) for name in finished_tasks(log))


def check_end(attempt: Attempt, place: Place, api: str, unbroken: Path, code: str | None = None) -> None:
    """The last run ends, like the unbroken one, with no finished epoch, stage or shard done twice in all of them."""
    before = finished_work(place)
    exit_code, said = finish(place, place.flags(), api, code)
    attempt.kept(exit_code == 0, said[-2000:])
    attempt.kept(before.items() <= finished_work(place).items(), "finished work was done again")
    epochs = epochs_done(place.log)
    assert max(epochs.values()) == 1, f"an epoch was done again: {epochs}"
    attempt.whole(not broken_files(place.folder), f"half-written: {broken_files(place.folder)}")
    if code is None:
        compare_runs(attempt, place.run, unbroken)


def test_a_train_flow_that_dies_before_a_task_of_it_is_finished_was_at_the_fit() -> None:
    begun = "Beginning flow run '{0} sample 360cf31e' for flow '{0}'\n"
    assert under_way(begun.format("train")) == "fit model"
    assert under_way(begun.format("pipeline")) == "fetch"
    assert under_way("") == ""


@pytest.mark.slow
def test_a_run_killed_in_preparing_and_again_in_training_ends_like_an_unbroken_one(
    faults: FaultTable, api: str, finished_run: Path, workspace: Path, tmp_path: Path
) -> None:
    place = copy_place(workspace, tmp_path, ("check_source", "masks"))
    draw = random.Random(SEED)
    for after in ("check-source", "check-prepared"):
        with faults.attempt(FLOW) as attempt:
            kill_after(attempt, place, api, draw.uniform(0, 2), finished(after))
            if after == "check-prepared":
                check_end(attempt, place, api, finished_run)


@pytest.fixture(scope="module")
def timeline(
    api: str, finished_run: Path, workspace: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, float]:
    """Seconds of each task in an unbroken run in a process of its own, and of all of it as ``""``."""
    place = copy_place(workspace, tmp_path_factory.mktemp("unbroken") / "place", more=EXPLAINED)
    start = time.monotonic()
    exit_code, said = finish(place, place.flags(), api)
    assert exit_code == 0, said[-2000:]
    return {**seconds_of_tasks(said), "": time.monotonic() - start}


@pytest.mark.long
def test_a_run_killed_in_each_of_its_stages_one_after_the_other_ends_like_an_unbroken_one(
    faults: FaultTable, api: str, finished_run: Path, workspace: Path, tmp_path: Path, timeline: dict[str, float]
) -> None:
    place = copy_place(workspace, tmp_path, more=EXPLAINED)
    draw = random.Random(SEED)
    for number, aim in enumerate(AIMS):
        before = finished(ORDER[ORDER.index(aim) - 1]) if aim != ORDER[0] else lambda log: "Beginning flow run" in log
        with faults.attempt(FLOW) as attempt:
            kill_after(attempt, place, api, draw.uniform(0, timeline[aim]), before)
            if number == len(AIMS) - 1:
                check_end(attempt, place, api, finished_run)


@pytest.mark.long
def test_a_run_killed_at_moments_drawn_evenly_over_its_whole_time_ends_like_an_unbroken_one(
    faults: FaultTable, api: str, finished_run: Path, workspace: Path, tmp_path: Path, timeline: dict[str, float]
) -> None:
    place = copy_place(workspace, tmp_path, more=EXPLAINED)
    draw = random.Random(SEED + 1)
    # Drawn over the whole time, taken in order: the seconds between them are those each process gets.
    moments = [0.0, *sorted(draw.uniform(0, timeline[""]) for _ in range(4))]
    for number in range(1, len(moments)):
        with faults.attempt(FLOW) as attempt:
            kill_after(attempt, place, api, moments[number] - moments[number - 1])
            if number == len(moments) - 1:
                check_end(attempt, place, api, finished_run)


@pytest.mark.long
def test_a_training_killed_four_times_ends_like_an_unbroken_one(
    faults: FaultTable, api: str, finished_run: Path, workspace: Path, tmp_path: Path, timeline: dict[str, float]
) -> None:
    place = copy_place(workspace, tmp_path, BEFORE_TRAINING)

    def began(log: str) -> bool:
        return "Beginning flow run" in log

    def learnt(log: str) -> bool:
        return bool(epochs_done(log)) or finished("fit model")(log)

    prepare = TRAIN.replace("train", "prepare")
    assert finish(place, place.flags(), api, prepare)[0] == 0
    draw = random.Random(SEED + 2)
    for number in range(4):
        with faults.attempt(TRAINING) as attempt:
            if number == 0:  # before there is a checkpoint, or hardly one
                kill_after(attempt, place, api, draw.uniform(0, timeline["fit model"]), began, TRAIN)
            else:
                kill_after(attempt, place, api, draw.uniform(0, 1), learnt, TRAIN)
            if number == 3:
                check_end(attempt, place, api, finished_run, TRAIN)
                exit_code, said = finish(place, place.flags(), api)
                assert exit_code == 0, said[-2000:]
                compare_runs(attempt, place.run, finished_run)
