"""Work pools: how a worker starts a run, as a process by default, on Kubernetes by the templates beside this file."""

import json
from pathlib import Path
from typing import Any, Literal

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from tasks import DEFAULTS, OVERRIDDEN
from tasks.errors import SettingsError

PoolType = Literal["process", "kubernetes"]
POOLS = ("cpu", "gpu")
TEMPLATES = Path(__file__).parent / "kubernetes"


def job_template(name: str, kind: PoolType, heartbeat_s: int) -> dict[str, Any]:
    """The base job template of a pool.

    It sets the heartbeat of runs, so that this does not depend on the worker's environment: without it, runs send one
    every 180 s, and the automation would mark them crashed. It also sets the waiting time for a server that is away,
    and JSON for results, as in runs of a command line: in a worker's run, Prefect reads its settings before ``tasks``
    is imported.
    """
    if kind == "kubernetes":
        template = json.loads((TEMPLATES / f"{name}.json").read_text())
    else:
        template = ProcessWorker.get_default_base_job_template()
    environment = template["variables"]["properties"]["env"]
    environment["default"] = environment.get("default", {}) | {
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(heartbeat_s),
        **{
            name: (DEFAULTS | OVERRIDDEN)[name]
            for name in ("PREFECT_CLIENT_MAX_RETRIES", "PREFECT_RESULTS_DEFAULT_SERIALIZER")
        },
    }
    return template


def ensure_pool(client: SyncPrefectClient, name: str, kind: PoolType, heartbeat_s: int) -> str:
    """Creates a pool, or corrects the one of that name; returns what it did.

    A pool has no limit of its own: the server's limit ``gpu`` counts trainings wherever they run.

    Raises:
        SettingsError: If the pool has another type, which Prefect cannot change.
    """
    template = job_template(name, kind, heartbeat_s)
    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=template))
        return "created"
    if pool.type != kind:
        raise SettingsError(
            f"POOL_TYPE: the pool {name} is there already and of type {pool.type}, not {kind}; set "
            f"POOL_TYPE={pool.type}, or delete it with prefect work-pool delete {name}"
        )
    if pool.base_job_template == template and pool.concurrency_limit is None:
        return "there already"
    client.update_work_pool(name, WorkPoolUpdate(base_job_template=template, concurrency_limit=None))
    return "corrected"
