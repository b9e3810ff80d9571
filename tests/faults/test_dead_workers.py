"""Deployed runs of the real pipeline whose worker, process or server goes away in the middle of the training."""

import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from broken_runs import steps_saved
from fault_table import Attempt, FaultTable
from pipeline_runs import Started, Store, epochs_in, flags, require_like, run_pipeline, wait_until
from prefect_team import Team, kill_tree, running_team
from recipe import LONG_EPOCHS, to_flags

EPOCH = r"epoch 1 of 2"
MOMENTS = random.Random(8)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with running_team(tmp_path_factory.mktemp("team")) as team:
        yield team


@pytest.fixture
def team(ready: Team) -> Iterator[Team]:
    """The team without workers; those of a test end with it."""
    yield ready
    ready.stop_workers()


@pytest.mark.long
def test_a_run_whose_worker_and_process_are_killed_is_noticed_started_again_and_ends_like_an_unbroken_one(
    faults: FaultTable, store: Store, team: Team, tmp_path: Path
) -> None:
    with faults.attempt("kill -9 of a worker with its run") as attempt:
        store.copy_cache(tmp_path)
        first = team.start_worker()
        run = team.start_run(tmp_path, tmp_path / "run")
        first.wait_for(EPOCH)
        time.sleep(MOMENTS.uniform(0, 4))
        kill_tree(first.process.pid)
        killed = time.monotonic()
        assert team.names(run.id)[-1] == "Running", "nobody knows yet"
        second = team.start_worker()
        wait_until(lambda: "AwaitingRetry" in team.names(run.id), "it was not noticed", team.said, limit_s=300)
        assert time.monotonic() - killed < 150 + 15 + 75, "the window, the pause and the server's leisure"
        ended = team.wait_for_end(run)
        names = team.names(run.id)
        assert ended.run_count == 2 and names[names.index("Crashed") :][:2] == ["Crashed", "AwaitingRetry"], names
        attempt.kept("taken from the cache" in second.said() or "(already" in second.said(), "what was done is kept")
        epochs = epochs_in(first.said(), second.said())
        assert len(epochs) <= 3, epochs
        note_repeated(attempt, epochs)
        store.require_like(tmp_path / "run", attempt)


@pytest.mark.long
def test_a_run_whose_worker_alone_is_killed_goes_on_and_another_run_of_its_deployment_is_never_beside_it(
    faults: FaultTable, store: Store, team: Team, tmp_path: Path
) -> None:
    with (
        faults.attempt("two runs of the same deployment at once"),
        faults.attempt("kill -9 of a worker alone") as attempt,
    ):
        store.copy_cache(tmp_path)
        first = team.start_worker()
        run = team.start_run(tmp_path, tmp_path / "run")
        first.wait_for("fit model")
        other = team.start_run(tmp_path, tmp_path / "other")
        wait_until(lambda: "AwaitingConcurrencySlot" in team.names(other.id), "it does not wait", team.said)
        time.sleep(MOMENTS.uniform(0, 4))
        os.kill(first.process.pid, signal.SIGKILL)  # the run's process ends itself then, and says so to the server
        first.process.wait()
        second = team.start_worker()
        team.wait_for_end(run)
        store.require_like(tmp_path / "run", attempt)
        team.wait_for_end(other)
        store.require_like(tmp_path / "other", attempt)
        assert not overlap(team.states(run.id), team.states(other.id))
        epochs = epochs_in(first.said(), second.said())
        assert len(epochs) <= 3, "the other run takes the training from the cache"
        note_repeated(attempt, epochs)


def note_repeated(attempt: Attempt, epochs: list[str]) -> None:
    """Notes the epochs that were done beyond the two of a run."""
    for _ in range(len(epochs) - 2):
        attempt.repeated("one epoch")


def overlap(one: list[Any], other: list[Any]) -> bool:
    """Whether two runs were running at the same time."""

    def spans(states: list[Any]) -> list[tuple[Any, Any]]:
        following = [*states[1:], states[-1]]
        return [(a.timestamp, b.timestamp) for a, b in zip(states, following, strict=True) if a.name == "Running"]

    return any(a < d and c < b for a, b in spans(one) for c, d in spans(other))


@pytest.mark.long
def test_a_run_asked_to_stop_within_an_epoch_saves_its_steps_is_rescheduled_and_goes_on_from_there(
    faults: FaultTable, store: Store, team: Team, tmp_path: Path
) -> None:
    """Epochs of 20 steps, so that most signals come within one; a run that was stopped between two is stopped again."""
    n_epochs = 10
    for name in ("machine", "undisturbed"):
        store.copy_cache(tmp_path / name)
    undisturbed = flags(tmp_path / "undisturbed", str(tmp_path / "other"), n_epochs)
    training = LONG_EPOCHS | {"epochs": n_epochs, "batch_size": 1}
    undisturbed += to_flags({"training": training})
    run_pipeline(undisturbed, team.environment, tmp_path / "undisturbed.log").end()
    run = team.start_run(tmp_path / "machine", tmp_path / "run", training=training)
    environment = team.environment | {"PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule"}
    command = ["prefect", "flow-run", "execute", str(run.id)]
    said: list[str] = []
    steps = 0
    while not steps:
        with faults.attempt("SIGTERM where runs are rescheduled") as attempt:
            stopped = Started(command, environment, tmp_path / f"stopped-{len(said)}.log")
            try:
                stopped.wait_for(r"member 1 of 1, epoch \d+ of")
                asked = time.monotonic()
                stopped.process.terminate()
                said.append(stopped.end())
                assert time.monotonic() - asked < 30, "within seconds, as a spot instance asks"
            finally:
                kill_tree(stopped.process.pid)
            state = team.client.read_flow_run(run.id).state
            assert state is not None and (state.type.value, state.name) == ("SCHEDULED", "AwaitingRetry"), said
            steps = steps_saved(tmp_path / "machine" / "cache")
            assert steps or len(said) < 3, "no signal came within an epoch, or none saved its steps"
            if steps:
                said.append(Started(command, environment, tmp_path / "last.log").end())
                assert team.names(run.id)[-1] == "Completed"
                goes_on = re.search(rf"resuming after epoch \d+ and {steps} steps from", said[-1])
                attempt.kept(goes_on is not None, said[-1][-4000:])
                epochs = epochs_in(*said)
                assert len(epochs) == len(set(epochs)) == n_epochs, "an epoch was repeated"
                require_like(
                    lambda name: (tmp_path / "run" / name).read_bytes(),
                    lambda name: (tmp_path / "other" / name).read_bytes(),
                    attempt,
                )


@pytest.mark.long
def test_runs_go_on_when_the_server_is_away_for_a_minute_and_all_states_are_right_afterwards(
    faults: FaultTable, store: Store, team: Team, tmp_path: Path
) -> None:
    with faults.attempt("server away for 60 s: a deployed run and one of a command line") as attempt:
        for name in ("deployed", "by-hand"):
            store.copy_cache(tmp_path / name)
        since = time.time()
        worker = team.start_worker()
        run = team.start_run(tmp_path / "deployed", tmp_path / "run")
        arguments = flags(tmp_path / "by-hand", str(tmp_path / "other"))
        by_hand = run_pipeline(arguments, team.environment, tmp_path / "by-hand.log")
        try:
            wait_until(lambda: re.search(EPOCH, worker.said() + by_hand.said()), "no training", worker.said)
            team.server.kill()
            time.sleep(60)  # the fault itself: a minute without a server
            team.server.start()
            said = by_hand.end()
            team.wait_for_end(run)
        finally:
            by_hand.kill()
        epochs = epochs_in(said), epochs_in(worker.said())
        for some in epochs:
            assert len(some) <= 3, epochs
            note_repeated(attempt, some)
        store.require_like(tmp_path / "run", attempt)
        store.require_like(tmp_path / "other", attempt)
        wait_until(lambda: not unfinished(team, since), "runs hang", lambda: str(unfinished(team, since)), limit_s=120)
        assert team.names(run.id)[-2:] == ["Running", "Completed"], team.names(run.id)


def unfinished(team: Team, since: float) -> list[str]:
    """Flow and task runs created since then that are not completed, but for those of the schedule, weeks ahead."""
    asked = [run for run in team.client.read_flow_runs(limit=200) if not run.auto_scheduled]
    runs: list[Any] = [*asked, *team.client.read_task_runs(limit=200)]
    new = [run for run in runs if run.created.timestamp() > since]
    return [f"{run.name} {run.state_name}" for run in new if run.state_type != "COMPLETED"]
