"""The slot of the GPU: the deployed training of ``prefect.yaml`` on a real server, without a model."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.engine.gpu_slot import LIMIT
from tasks.files import REPOSITORY


@pytest.fixture
def client(guarded_server: dict[str, str]) -> Iterator[SyncPrefectClient]:
    """A client of a server that has the limit, with one slot."""
    address, password = guarded_server["PREFECT_API_URL"], guarded_server["PREFECT_API_AUTH_STRING"]
    with (
        temporary_settings({PREFECT_API_URL: address, PREFECT_API_AUTH_STRING: password}),
        get_client(sync_client=True) as client,
    ):
        client.upsert_global_concurrency_limit_by_name(LIMIT, 1)
        yield client


@pytest.fixture
def start(
    guarded_server: dict[str, str], client: SyncPrefectClient, tmp_path: Path
) -> Iterator[Callable[[str], tuple[FlowRun, subprocess.Popen[str]]]]:
    """Starts the flow ``train`` of this repository as a worker does, on a folder where nothing is prepared."""
    started: list[subprocess.Popen[str]] = []

    def create(name: str) -> tuple[FlowRun, subprocess.Popen[str]]:
        steps = [{"prefect.deployments.steps.set_working_directory": {"directory": str(REPOSITORY)}}]
        deployment = client.create_deployment(
            client.create_flow_from_name("train"), name, entrypoint="flows/train.py:train", pull_steps=steps
        )
        parameters = {"settings": {"run_dir": str(tmp_path / "nothing")}}
        run = client.create_flow_run_from_deployment(deployment, parameters=parameters)
        command = [sys.executable, "-m", "prefect.engine", str(run.id)]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=guarded_server, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return run, process

    yield create
    for process in started:
        process.kill()
        process.wait()


def read_state(client: SyncPrefectClient, run: FlowRun) -> tuple[str, str]:
    state = client.read_flow_run(run.id).state
    assert state is not None
    return str(state.name), str(state.message)


def test_a_deployed_training_waits_for_the_slot_before_it_does_anything(
    client: SyncPrefectClient, start: Callable[[str], tuple[FlowRun, subprocess.Popen[str]]]
) -> None:
    answer = client.increment_concurrency_slots([LIMIT], slots=1, mode="concurrency")
    assert answer.json()[0]["limit"] == 1, "the test holds the only slot"
    run, process = start("waiting")
    assert process.stdout is not None
    said = ""
    while "waiting for one of 1 slots of the limit gpu" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    end = time.monotonic() + 3  # one that does not wait fails within that time, since nothing is prepared
    while time.monotonic() < end:
        assert process.poll() is None and read_state(client, run)[0] == "Running", said
        time.sleep(0.1)
    client.release_concurrency_slots([LIMIT], slots=1, occupancy_seconds=1)
    said += process.communicate(timeout=120)[0]
    name, message = read_state(client, run)
    assert name == "Failed" and "nothing" in message, said  # it got to work, and nothing is prepared there
    assert client.read_global_concurrency_limit_by_name(LIMIT).active_slots == 0, "a failed training gives it back"


def test_a_training_on_a_server_without_the_limit_fails_with_the_way_out(
    client: SyncPrefectClient, start: Callable[[str], tuple[FlowRun, subprocess.Popen[str]]]
) -> None:
    client.delete_global_concurrency_limit_by_name(LIMIT)
    try:
        run, process = start("unlimited")
        process.communicate(timeout=120)
    finally:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=1))
    name, message = read_state(client, run)
    assert name == "Failed"
    assert "gpu: the server has no concurrency limit of this name" in message and "make deploy" in message


def test_a_training_in_this_process_takes_no_slot(client: SyncPrefectClient, tmp_path: Path) -> None:
    from flows.train import train
    from tasks.errors import RunError
    from tasks.settings import Settings

    client.increment_concurrency_slots([LIMIT], slots=1, mode="concurrency")
    try:
        with pytest.raises(RunError):  # at once, since nothing is prepared there
            train(Settings(run_dir=str(tmp_path / "nothing")))
    finally:
        client.release_concurrency_slots([LIMIT], slots=1, occupancy_seconds=1)
