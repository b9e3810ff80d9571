"""A server that is ready for deployed runs, with the workers that a test starts and kills."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from pipeline_runs import Started, plain_environment, wait_until
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect_server import PrefectServer
from recipe import adapt

from tasks.files import REPOSITORY


@dataclass
class Team:
    """A server that ``make deploy`` made ready, and workers that a test starts.

    Attributes:
        server: The server.
        client: Of the server, with its password.
        folder: ``client/`` is the workers' ``PREFECT_HOME``; their logs lie beside it.
        more: Environment that the workers have besides.
        workers: Those that run.
    """

    server: PrefectServer
    client: SyncPrefectClient
    folder: Path
    more: Mapping[str, str] = field(default_factory=dict)
    workers: list[Started] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        own = {"PREFECT_API_URL": self.server.api, "PREFECT_HOME": str(self.folder / "client")}
        own |= {"PREFECT_WORKER_QUERY_SECONDS": "2", **self.more}
        if self.server.auth is not None:
            own["PREFECT_API_AUTH_STRING"] = self.server.auth
        return plain_environment(os.environ) | own

    def start_worker(self) -> Started:
        command = ["prefect", "worker", "start", "--pool", "cpu", "--type", "process"]
        log = self.folder / f"worker-{len(self.workers)}.log"
        self.workers.append(Started([*command, "--name", log.stem], self.environment, log))
        return self.workers[-1]

    def stop_workers(self) -> None:
        """Kills them and their runs."""
        for worker in self.workers:
            kill_tree(worker.process.pid)
        self.workers.clear()

    def start_run(self, machine: Path, run: Path | str, **others: Any) -> FlowRun:
        """A run of ``pipeline/weekly``, which trains in its own process.

        Args:
            machine: The folder of its cache and of what it fetches.
            run: Its run folder.
            others: Settings besides, such as ``source``.
        """
        storage = {"cache": str(machine / "cache"), "raw": str(machine / "raw")}
        settings = adapt(training=others.pop("training", {})) | others
        deployment = self.client.read_deployment_by_name("pipeline/weekly")
        parameters = {"settings": {**settings, "storage": storage, "run_dir": str(run)}}
        return self.client.create_flow_run_from_deployment(deployment.id, parameters=parameters)

    def states(self, run: UUID) -> list[Any]:
        return sorted(self.client.read_flow_run_states(run), key=lambda state: state.timestamp)

    def names(self, run: UUID) -> list[str]:
        return [str(state.name) for state in self.states(run)]

    def said(self) -> str:
        return "\n".join(worker.said()[-3000:] for worker in self.workers)

    def wait_for_state(self, run: FlowRun, *names: str) -> str:
        """The first of these states that the run comes to."""

        def look() -> str | None:
            time.sleep(0.5)
            return next((name for name in self.names(run.id) if name in names), None)

        return str(wait_until(look, f"{run.name} came to none of {names}", self.said))

    def wait_for_end(self, run: FlowRun) -> FlowRun:
        """The run when it is completed; one that crashed is waited for, since it is started again."""

        def look() -> FlowRun | None:
            now = self.client.read_flow_run(run.id)
            assert now.state is not None
            assert now.state.type.value not in ("FAILED", "CANCELLED"), f"{self.names(run.id)}\n{self.said()}"
            time.sleep(0.5)
            return now if now.state.is_completed() else None

        return wait_until(look, f"{run.name} did not end", lambda: f"{self.names(run.id)}\n{self.said()}")  # type: ignore[no-any-return]


@contextmanager
def running_team(
    folder: Path, auth: str | None = None, more: Mapping[str, str] | None = None, **ready: str
) -> Iterator[Team]:
    """Starts a server and has it made ready; Prefect within the block talks to it.

    Args:
        folder: The server lies at ``server/`` below.
        auth: ``user:password`` that clients have to give.
        more: Environment that workers have besides.
        ready: Settings of ``make deploy``, such as ``NOTIFY_WEBHOOK``.
    """
    server = PrefectServer(folder / "server", auth)
    known = {PREFECT_API_URL: server.api, PREFECT_API_AUTH_STRING: auth}
    try:
        server.start()
        with temporary_settings(known), get_client(sync_client=True) as client:
            team = Team(server, client, folder, more or {})
            bootstrap = [sys.executable, "-m", "infra.bootstrap"]
            subprocess.run(bootstrap, cwd=REPOSITORY, env=team.environment | ready, check=True)
            try:
                yield team
            finally:
                team.stop_workers()
    finally:
        server.stop()


def kill_tree(process: int) -> None:
    """Kills a process and all that it started, and what that started; a worker's runs are no part of its group."""
    for child in children_of(process):
        kill_tree(child)
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


def children_of(process: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process:
            found.append(int(path.parent.name))
    return found
