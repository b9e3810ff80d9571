"""Makes a Prefect server ready: pools, limits and the deployments of ``prefect.yaml``. Safe to run twice.

``make deploy`` calls it against the server at ``PREFECT_API_URL``.
"""

import os
import subprocess
import sys
import time

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

import tasks as tasks  # sets Prefect's environment before anything here imports Prefect
from tasks.records import PipelineError, SettingsError
from tasks.storage import REPOSITORY

# One training at a time on the GPU pool: two models do not fit one card, and share it badly if they do.
POOLS: dict[str, int | None] = {"cpu": None, "gpu": 1}


def main() -> int:
    """Waits for the server, creates what is missing, deploys; the exit code."""
    try:
        address = os.environ.get("PREFECT_API_URL")
        if not address:
            raise SettingsError("PREFECT_API_URL: no server is named; start one with make ui, then make deploy")
        with get_client(sync_client=True) as client:
            wait_for_server(client, address, timeout_s=60)
            for name, limit in POOLS.items():
                print(f"pool {name}: {create_pool(client, name, limit)}")
        deploy()
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def wait_for_server(client: SyncPrefectClient, address: str, timeout_s: float) -> None:
    """Returns when the server is healthy.

    Raises:
        SettingsError: If it is not within ``timeout_s`` seconds.
    """
    end = time.monotonic() + timeout_s
    while (problem := client.api_healthcheck()) is not None:
        if time.monotonic() > end:
            raise SettingsError(f"PREFECT_API_URL: no server answers at {address} ({problem}); start one with make ui")
        time.sleep(1)


def create_pool(client: SyncPrefectClient, name: str, limit: int | None) -> str:
    """Creates a process pool, or corrects the limit of the one that exists; says what it did."""
    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(
            WorkPoolCreate(name=name, type="process", base_job_template=template, concurrency_limit=limit)
        )
        return "created"
    if pool.concurrency_limit != limit:
        client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=limit))
        return "limit corrected"
    return "there already"


def deploy() -> None:
    """Applies ``prefect.yaml``.

    Raises:
        SettingsError: If Prefect refuses it; its own words precede the error.
    """
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "PWD": str(REPOSITORY)}, check=False)
    if done.returncode:
        raise SettingsError("prefect.yaml: Prefect did not accept it (see above); correct it and deploy again")


if __name__ == "__main__":
    sys.exit(main())
