"""Sets up a Prefect server: pools, the limit of GPUs, automations, the deployments of ``prefect.yaml``.

``make deploy`` calls it against the server at ``PREFECT_API_URL``. Safe to run twice: what exists is kept. Its settings
are environment variables, which compose files and clusters pass on: ``GPU_SLOTS``, ``POOL_TYPE``,
``CODE_DIR``, ``HEARTBEAT_S``, ``WINDOW_S`` and ``NOTIFY_WEBHOOK`` (the README says what they mean).
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, get_args
from urllib.parse import urlsplit

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.exceptions import ObjectNotFound

import tasks as tasks  # sets Prefect's environment before anything here imports Prefect
from flows.engine.gpu_slot import LIMIT
from flows.engine.labels import shorten_commit
from infra.automations import ensure_automation, ensure_notification, mark_crashed, restart_crashed
from infra.pools import POOLS, PoolType, ensure_pool
from tasks.errors import PipelineError, SettingsError
from tasks.files import REPOSITORY

UNCHANGED = ("there already", "none")


def main() -> int:
    """Waits for the server, creates what is missing and logs it; returns the exit code."""
    try:
        address = os.environ.get("PREFECT_API_URL")
        if not address:
            raise SettingsError("PREFECT_API_URL: no server is named; start one with make ui, then make deploy")
        with get_client(sync_client=True) as client:
            wait_for_server(client, address, timeout_s=read_number("SERVER_TIMEOUT_S", 60, least=0))
            require_access(client, address)
            n_changed = 0
            for what, done in make_ready(client):
                print(f"{what}: {done}", flush=True)
                n_changed += not done.startswith(UNCHANGED)
        print(f"changes: {n_changed}" if n_changed else "nothing changed: everything was there already")
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make_ready(client: SyncPrefectClient) -> Iterator[tuple[str, str]]:
    """Sets up the server; yields each object and what was done to it.

    Raises:
        SettingsError: If a setting does not fit, before anything is changed, or ``prefect.yaml`` is refused.
    """
    heartbeat_s = read_number("HEARTBEAT_S", 30, least=30)  # Prefect's shortest interval
    window_s = read_number("WINDOW_S", 5 * heartbeat_s, least=2 * heartbeat_s)  # one late heartbeat is not a crash
    slots = read_number("GPU_SLOTS", 1, least=1)
    kind, webhook = read_pool_type(), read_webhook()
    for name in POOLS:
        yield f"pool {name}", ensure_pool(client, name, kind, heartbeat_s)
    yield f"limit {LIMIT}", ensure_limit(client, LIMIT, slots)
    for automation in (mark_crashed(window_s), restart_crashed()):
        yield f"automation {automation.name!r}", ensure_automation(client, automation)
    yield "notification of failures", ensure_notification(client, webhook)
    before = read_deployments(client)
    deploy(os.environ.get("CODE_DIR") or ("/app" if kind == "kubernetes" else str(REPOSITORY)))
    for name, now in read_deployments(client).items():
        done = "created" if name not in before else "there already" if before[name] == now else "corrected"
        yield f"deployment {name}", done


def read_number(name: str, default: int, least: int) -> int:
    """A whole number from the environment.

    Raises:
        SettingsError: If it is not a whole number, or too small.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise SettingsError(f"{name}: should be a whole number of at least {least}, not {text!r}; correct or unset it")
    return int(text)


def read_pool_type() -> PoolType:
    """``POOL_TYPE``, by default processes.

    Raises:
        SettingsError: If there is no such type.
    """
    text = os.environ.get("POOL_TYPE") or "process"
    for kind in get_args(PoolType):
        if text == kind:
            return kind
    raise SettingsError(f"POOL_TYPE: {text!r} is not known; set {' or '.join(get_args(PoolType))}, or nothing")


def read_webhook() -> str | None:
    """``NOTIFY_WEBHOOK``, by default none.

    Raises:
        SettingsError: If it is not an address; the message does not quote it, since such an address is a key.
    """
    url = os.environ.get("NOTIFY_WEBHOOK") or None
    if url is not None and not (url.startswith(("https://", "http://")) and urlsplit(url).hostname):
        raise SettingsError("NOTIFY_WEBHOOK: should be an address like https://host/path; correct or unset it")
    return url


def wait_for_server(client: SyncPrefectClient, address: str, timeout_s: float) -> None:
    """Waits until the server is healthy.

    Raises:
        SettingsError: If it is not within ``timeout_s`` seconds.
    """
    end = time.monotonic() + timeout_s
    while (problem := client.api_healthcheck()) is not None:
        if time.monotonic() > end:
            raise SettingsError(f"PREFECT_API_URL: no server answers at {address} ({problem}); start one with make ui")
        time.sleep(1)


def require_access(client: SyncPrefectClient, address: str) -> None:
    """Checks that the server accepts this client's credentials; its health check needs none.

    Raises:
        SettingsError: If it does not.
    """
    try:
        client.api_version()
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.UNAUTHORIZED:
            raise
        state = "is refused by" if os.environ.get("PREFECT_API_AUTH_STRING") else "is not set, but asked for by"
        raise SettingsError(
            f"PREFECT_API_AUTH_STRING: {state} the server at {address}; set it to the user:password that the server "
            "was given as PREFECT_SERVER_API_AUTH_STRING"
        ) from None


def ensure_limit(client: SyncPrefectClient, name: str, slots: int) -> str:
    """Creates or corrects a concurrency limit of the whole server; returns what it did. Held slots stay held."""
    try:
        limit = client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=slots))
        return f"created, slots: {slots}"
    if (limit.limit, limit.active, limit.slot_decay_per_second) == (slots, True, 0):
        return f"there already, slots: {slots}"
    change = GlobalConcurrencyLimitUpdate(limit=slots, active=True, slot_decay_per_second=0)
    client.update_global_concurrency_limit(name, change)
    return f"corrected, slots: {slots}"


def read_deployments(client: SyncPrefectClient) -> dict[str, dict[str, Any]]:
    """The server's deployments by full name, without fields that change by themselves."""
    return {
        f"{client.read_flow(found.flow_id).name}/{found.name}": found.model_dump(
            mode="json",
            exclude={
                "updated": True,
                "status": True,
                "last_polled": True,
                "schedules": {"__all__": {"updated"}},
                "global_concurrency_limit": {"updated", "active_slots"},
            },
        )
        for found in client.read_deployments()
    }


def deploy(folder: str) -> None:
    """Applies ``prefect.yaml``, in which ``$COMMIT`` stands for the commit of the code.

    Args:
        folder: The folder of the code on the worker, ``$PWD`` in ``prefect.yaml``.

    Raises:
        SettingsError: If Prefect refuses it; Prefect's own message is printed before.
    """
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    environment = {**os.environ, "PWD": folder, "COMMIT": shorten_commit()}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise SettingsError("prefect.yaml: Prefect did not accept it (see above); correct it and deploy again")


if __name__ == "__main__":
    sys.exit(main())
