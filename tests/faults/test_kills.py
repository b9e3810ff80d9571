"""kill -9 at any moment: the next run ends like an unbroken one, and nothing that was finished is done again."""

import random
from pathlib import Path

import pytest
from broken_runs import (
    BEFORE_TRAINING,
    TRAIN,
    Place,
    broken_files,
    compare_runs,
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

SEED = 8
FLOW, TRAINING = "kill -9 of the flow process", "kill -9 of the training process"
ORDER = ["ingest", "check-source", "split", "plan packing", "pack shards", "pack", "plan screening", "screen shards"]
ORDER += ["screen", "check-prepared", "fit model", "calibrate model", "evaluate", "plan explanations", "explain shards"]
ORDER += ["explain", "audit", "weigh", "report", "model card", "require a passed audit", "seal", "publish"]
ORDER += ["note finished"]
AIMS = [*ORDER[:3], "pack shards", "pack", "screen shards", "screen", "check-prepared", *["fit model"] * 3]
AIMS += ["calibrate model", "evaluate", "explain shards", "explain", "audit", "report", "seal"]
"""Stages that are killed in, one after the other, in the long version."""


@pytest.fixture(scope="module")
def api(prefect_engine: None) -> str:
    """The session's server, so that each of the many processes needs none of its own."""
    from prefect.settings import PREFECT_API_URL

    return str(PREFECT_API_URL.value())


def under_way(log: str) -> str:
    """The task that a process was at when it died."""
    done = finished_tasks(log)
    if not done:
        return ORDER[0] if "Beginning flow run" in log else ""
    return ORDER[min(ORDER.index(done[-1]) + 1, len(ORDER) - 1)]


def note_repeated(attempt: Attempt, task: str) -> None:
    """Says what the next process does again: what the killed one was at."""
    words = {"": "nothing", "fit model": "one epoch"}
    attempt.repeated(words.get(task, "one shard" if task.endswith("shards") else "one stage that was not finished"))


def kill_after(attempt: Attempt, place: Place, api: str, after: str, seconds: float, code: str | None = None) -> str:
    """Kills a run some seconds after a task finished (``""``: after its start); the task it was at.

    What it had finished until then is still there afterwards, and what bears its final name is whole.
    """
    before = finished_work(place)
    with started(place, place.flags(), api, code) as process:
        log = place.last_log
        wait_until(process, lambda: not after or after in finished_tasks(log.read_text()))
        alive = wait_seconds(process, seconds)
        process.kill()
        process.wait()
    assert alive, f"it ended before it was killed:\n{log.read_text()[-2000:]}"
    attempt.whole(not broken_files(place.folder), f"half-written: {broken_files(place.folder)}")
    attempt.kept(before.items() <= finished_work(place).items(), "finished work was lost or done again")
    task = under_way(log.read_text())
    note_repeated(attempt, task)
    return task


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


def test_a_run_killed_in_preparing_and_again_in_training_ends_like_an_unbroken_one(
    faults: FaultTable, api: str, finished_run: Path, workspace: Path, tmp_path: Path
) -> None:
    place = copy_place(workspace, tmp_path, ("check_source", "masks"))
    draw = random.Random(SEED)
    for after in ("check-source", "check-prepared"):
        with faults.attempt(FLOW) as attempt:
            kill_after(attempt, place, api, after, draw.uniform(0, 2))
            if after == "check-prepared":
                check_end(attempt, place, api, finished_run)


@pytest.fixture(scope="module")
def timeline(
    api: str, finished_run: Path, workspace: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, float]:
    """Seconds of each task in an unbroken run in a process of its own, and of all of it as ``""``."""
    import time

    place = copy_place(workspace, tmp_path_factory.mktemp("unbroken") / "place")
    start = time.monotonic()
    exit_code, said = finish(place, place.flags(), api)
    assert exit_code == 0, said[-2000:]
    return {**seconds_of_tasks(said), "": time.monotonic() - start}


@pytest.mark.long
def test_a_run_killed_in_each_of_its_stages_one_after_the_other_ends_like_an_unbroken_one(
    faults: FaultTable, api: str, finished_run: Path, workspace: Path, tmp_path: Path, timeline: dict[str, float]
) -> None:
    place = copy_place(workspace, tmp_path)
    draw = random.Random(SEED)
    for number, aim in enumerate(AIMS):
        before = ORDER[ORDER.index(aim) - 1] if aim != ORDER[0] else ""
        # A process that has only just started takes a while to get anywhere at all.
        seconds = draw.uniform(0, timeline[aim]) if before else draw.uniform(0, timeline[""] / 4)
        with faults.attempt(FLOW) as attempt:
            kill_after(attempt, place, api, before, seconds)
            if number == len(AIMS) - 1:
                check_end(attempt, place, api, finished_run)


@pytest.mark.long
def test_runs_killed_at_moments_drawn_evenly_over_their_whole_time_end_like_an_unbroken_one(
    faults: FaultTable, api: str, finished_run: Path, workspace: Path, tmp_path: Path, timeline: dict[str, float]
) -> None:
    draw = random.Random(SEED + 1)
    for turn in range(2):
        place = copy_place(workspace, tmp_path / str(turn))
        # Drawn over the whole time, taken in order: the seconds between them are those each process gets.
        moments = sorted(draw.uniform(0, timeline[""]) for _ in range(3))
        for number, moment in enumerate(moments):
            seconds = moment - (moments[number - 1] if number else 0.0)
            with faults.attempt(FLOW) as attempt:
                kill_after(attempt, place, api, "", seconds)
                if number == len(moments) - 1:
                    check_end(attempt, place, api, finished_run)


@pytest.mark.long
def test_a_training_killed_five_times_ends_like_an_unbroken_one(
    faults: FaultTable, api: str, finished_run: Path, workspace: Path, tmp_path: Path, timeline: dict[str, float]
) -> None:
    place = copy_place(workspace, tmp_path, BEFORE_TRAINING)
    prepare = TRAIN.replace("train", "prepare")
    assert finish(place, place.flags(), api, prepare)[0] == 0
    draw = random.Random(SEED + 2)
    for number in range(5):
        with faults.attempt(TRAINING) as attempt:
            kill_after(attempt, place, api, "", draw.uniform(0.3, 1) * timeline["fit model"] * 1.5, TRAIN)
            if number == 4:
                check_end(attempt, place, api, finished_run, TRAIN)
    with faults.attempt(TRAINING) as attempt:
        exit_code, said = finish(place, place.flags(), api)
        assert exit_code == 0, said[-2000:]
        compare_runs(attempt, place.run, finished_run)
