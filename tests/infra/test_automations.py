"""What a real server does by itself with deployed runs that die."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Crashed, Failed, Running
from prefect_server import stop_group

from infra.automations import RESTARTS, ensure_automation, ensure_notification, mark_crashed, restart_crashed

FLOWS = '''
import time
from pathlib import Path
from prefect import flow, suspend_flow_run

@flow
def works(folder: str):
    """Hangs when it starts for the first time, is done the second time."""
    first = not Path(folder, "started").exists()
    Path(folder, "started").touch()
    while first:
        time.sleep(0.1)

@flow
def waits(folder: str):
    while not Path(folder, "go").exists():
        time.sleep(0.1)
    suspend_flow_run(timeout=600)
'''


@pytest.fixture
def client(guarded_server: dict[str, str]) -> Iterator[SyncPrefectClient]:
    """A client of the server with automations that wait as briefly as Prefect lets them; they go with the test."""
    address, password = guarded_server["PREFECT_API_URL"], guarded_server["PREFECT_API_AUTH_STRING"]
    with (
        temporary_settings({PREFECT_API_URL: address, PREFECT_API_AUTH_STRING: password}),
        get_client(sync_client=True) as client,
    ):
        ensure_automation(client, mark_crashed(window_s=10))
        ensure_automation(client, restart_crashed(after_s=10))
        yield client
        for automation in client.read_automations():
            client.delete_automation(automation.id)


@pytest.fixture
def start(client: SyncPrefectClient, tmp_path: Path) -> Callable[..., FlowRun]:
    """Starts a run of a deployment of one of the flows above; nothing executes it yet."""
    (tmp_path / "dying.py").write_text(FLOWS)

    def create(name: str, **parameters: str) -> FlowRun:
        steps = [{"prefect.deployments.steps.set_working_directory": {"directory": str(tmp_path)}}]
        deployment = client.create_deployment(
            client.create_flow_from_name(name), f"test-{uuid4()}", entrypoint=f"dying.py:{name}", pull_steps=steps
        )
        return client.create_flow_run_from_deployment(deployment, parameters=parameters)

    return create


def execute(run: FlowRun, environment: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
    """The process that a worker starts for a run."""
    command = [sys.executable, "-m", "prefect.engine", str(run.id)]
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)


def wait_for(client: SyncPrefectClient, run: UUID, *names: str, limit_s: float = 60) -> FlowRun:
    """The run when its state is one of these."""
    end = time.monotonic() + limit_s
    while True:
        now = client.read_flow_run(run)
        if now.state is not None and now.state.name in names:
            return now
        assert time.monotonic() < end, f"still {now.state}"
        time.sleep(0.2)


def wait_for_heartbeat(client: SyncPrefectClient, run: FlowRun, limit_s: float = 60) -> None:
    """Returns when the server has got the run's first heartbeat."""
    name, resource = EventNameFilter(name=["prefect.flow-run.heartbeat"]), f"prefect.flow-run.{run.id}"
    end = time.monotonic() + limit_s
    # A filter ends when it was made, so each look takes a new one.
    while not client.read_events(EventFilter(event=name, resource=EventResourceFilter(id=[resource])), limit=1).events:
        assert time.monotonic() < end, "no heartbeat came"
        time.sleep(0.3)


def kill_after_heartbeat(client: SyncPrefectClient, run: FlowRun, environment: dict[str, str], folder: Path) -> None:
    """Starts a run and kills it as soon as the server knows that it lived."""
    process = execute(run, environment, folder)
    try:
        wait_for_heartbeat(client, run)
    finally:
        process.kill()
        stop_group(process)


def wait_until_crashed_runs_are_seen_to(client: SyncPrefectClient, start: Callable[..., FlowRun]) -> None:
    """Returns when the server has started another run again that crashed after those of the test."""
    run = start("works", folder="unused")
    client.set_flow_run_state(run.id, Running())
    client.set_flow_run_state(run.id, Crashed())
    wait_for(client, run.id, "AwaitingRetry")


def state_names(client: SyncPrefectClient, run: FlowRun) -> list[str | None]:
    return [state.name for state in sorted(client.read_flow_run_states(run.id), key=lambda state: state.timestamp)]


def test_a_killed_run_is_noticed_starts_again_and_is_done(
    guarded_server: dict[str, str], client: SyncPrefectClient, start: Callable[..., FlowRun], tmp_path: Path
) -> None:
    run = start("works", folder=str(tmp_path))
    kill_after_heartbeat(client, run, guarded_server, tmp_path)
    wait_for(client, run.id, "AwaitingRetry")
    second = execute(run, guarded_server, tmp_path)
    assert second.wait(timeout=60) == 0
    assert wait_for(client, run.id, "Completed").run_count == 2
    names = state_names(client, run)
    assert names[names.index("Crashed") :] == ["Crashed", "AwaitingRetry", "Running", "Completed"]


def test_a_run_that_waits_for_a_person_is_not_taken_for_dead(
    guarded_server: dict[str, str], client: SyncPrefectClient, start: Callable[..., FlowRun], tmp_path: Path
) -> None:
    run = start("waits", folder=str(tmp_path))
    process = execute(run, guarded_server, tmp_path)
    wait_for_heartbeat(client, run)
    (tmp_path / "go").touch()
    process.wait(timeout=60)
    wait_for(client, run.id, "Suspended")
    dead = start("works", folder=str(tmp_path))
    kill_after_heartbeat(client, dead, guarded_server, tmp_path)
    wait_for(client, dead.id, "AwaitingRetry")
    assert state_names(client, run)[-1] == "Suspended", "the run that was killed after it was noticed"


def test_a_run_that_crashes_again_and_again_is_left_alone_in_the_end(
    client: SyncPrefectClient, start: Callable[..., FlowRun]
) -> None:
    run = start("works", folder="unused")
    for _ in range(RESTARTS - 1):  # as if it had been started again that often; each time takes the server a while
        client.set_flow_run_state(run.id, Running())
        client.set_flow_run_state(run.id, AwaitingRetry())
    client.set_flow_run_state(run.id, Running())
    client.set_flow_run_state(run.id, Crashed(message="for the last time but one"))
    wait_for(client, run.id, "AwaitingRetry")
    client.set_flow_run_state(run.id, Running())
    assert client.read_flow_run(run.id).run_count == RESTARTS + 1
    client.set_flow_run_state(run.id, Crashed(message="once too often"))
    wait_until_crashed_runs_are_seen_to(client, start)
    assert state_names(client, run)[-1] == "Crashed"


def test_a_run_that_nobody_deployed_is_left_alone(client: SyncPrefectClient, start: Callable[..., FlowRun]) -> None:
    from prefect import flow

    @flow
    def by_hand() -> None: ...

    run = client.create_flow_run(by_hand)
    client.set_flow_run_state(run.id, Running())
    client.set_flow_run_state(run.id, Crashed())
    wait_until_crashed_runs_are_seen_to(client, start)
    assert state_names(client, run)[-1] == "Crashed"


def test_a_failure_is_told_to_the_webhook(client: SyncPrefectClient, start: Callable[..., FlowRun]) -> None:
    told: list[tuple[str | None, str]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append((self.headers["Content-Type"], self.rfile.read(int(self.headers["Content-Length"])).decode()))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        assert ensure_notification(client, f"http://127.0.0.1:{receiver.server_port}/") == "created"
        run = start("works")
        client.set_flow_run_state(run.id, Running())
        client.set_flow_run_state(run.id, Failed(message='the "model" is\nno good'))
        end = time.monotonic() + 30
        while not told and time.monotonic() < end:
            time.sleep(0.2)
        receiver.shutdown()
    assert ensure_notification(client, None).startswith("removed")
    ((kind, text),) = told
    assert kind == "application/json"
    assert json.loads(text)["text"].endswith(f'run {run.name} is Failed, the "model" is\nno good')
