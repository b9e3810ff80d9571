"""Work pools: how a worker starts a run. Processes by default; on Kubernetes from the templates beside this file."""

import json
from pathlib import Path
from typing import Any, Literal

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from tasks import SURROUNDINGS
from tasks.errors import SettingsError

PoolType = Literal["process", "kubernetes"]
POOLS = ("cpu", "gpu")
TEMPLATES = Path(__file__).parent / "kubernetes"


def job_template(name: str, kind: PoolType, heartbeat_s: int) -> dict[str, Any]:
    """The base job template of a pool.

    Its runs get their heartbeat here and not from the worker's environment: a worker started without it would let them
    send one in 180 s, and the automation that waits for heartbeats would take them for dead. They also wait for a
    server that is away for some minutes, and keep results as JSON, as runs of a command line do: where a worker starts
    them, Prefect has read its settings before ``tasks`` is imported.
    """
    if kind == "kubernetes":
        template = json.loads((TEMPLATES / f"{name}.json").read_text())
    else:
        template = ProcessWorker.get_default_base_job_template()
    environment = template["variables"]["properties"]["env"]
    environment["default"] = environment.get("default", {}) | {
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(heartbeat_s),
        **{name: SURROUNDINGS[name] for name in ("PREFECT_CLIENT_MAX_RETRIES", "PREFECT_RESULTS_DEFAULT_SERIALIZER")},
    }
    return template


def ensure_pool(client: SyncPrefectClient, name: str, kind: PoolType, heartbeat_s: int) -> str:
    """Creates a pool, or corrects the one of that name; says what it did.

    A pool has no limit of its own: the server's limit ``gpu`` counts trainings wherever they run.

    Raises:
        SettingsError: If a pool of that name is of another type, which Prefect cannot change.
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
