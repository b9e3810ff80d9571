"""Making a server ready, against a real one that asks for a password."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.engine.labels import shorten_commit
from infra.automations import MARK, NOTIFY, RESTART
from infra.bootstrap import read_deployments
from infra.pools import job_template
from tasks.files import REPOSITORY

BY_ITSELF = {"updated", "last_polled", "status", "active_slots", "denied_slots", "avg_slot_occupancy_seconds"}
OUR_SETTINGS = ("GPU_SLOTS", "POOL_TYPE", "CODE_DIR", "HEARTBEAT_S", "WINDOW_S", "NOTIFY_WEBHOOK")


@pytest.fixture(scope="module")
def ready_server(guarded_server: dict[str, str]) -> dict[str, str]:
    """The environment of a client of the server, made ready once."""
    first = bootstrap(guarded_server)
    assert first.returncode == 0, first.stderr
    return guarded_server


@pytest.fixture
def client(ready_server: dict[str, str]) -> Iterator[SyncPrefectClient]:
    address, password = ready_server["PREFECT_API_URL"], ready_server["PREFECT_API_AUTH_STRING"]
    with (
        temporary_settings({PREFECT_API_URL: address, PREFECT_API_AUTH_STRING: password}),
        get_client(sync_client=True) as client,
    ):
        yield client


def bootstrap(environment: dict[str, str], **settings: str) -> subprocess.CompletedProcess[str]:
    """The command ``make deploy`` runs."""
    clean = {name: value for name, value in environment.items() if name not in OUR_SETTINGS}
    command = [sys.executable, "-m", "infra.bootstrap"]
    return subprocess.run(command, cwd=REPOSITORY, env=clean | settings, capture_output=True, text=True, check=False)


def listing(client: SyncPrefectClient) -> dict[str, Any]:
    """All that the API lists of what a bootstrap makes, by kind and id."""
    found: dict[str, Any] = {
        "pools": client.read_work_pools(),
        "limits": client.read_global_concurrency_limits(),
        "automations": client.read_automations(),
        "blocks": client.read_block_documents(include_secrets=False),
        "deployments": client.read_deployments(),
    }
    # As Python values: what is a set, such as the events of a trigger, comes in any order.
    return {kind: {str(item.id): kept(item.model_dump()) for item in items} for kind, items in found.items()}


def kept(value: Any) -> Any:
    """What it is without what the server notes down by itself."""
    if isinstance(value, dict):
        return {name: kept(part) for name, part in value.items() if name not in BY_ITSELF}
    return [kept(part) for part in value] if isinstance(value, list) else value


def changes(before: Any, now: Any, where: str = "") -> list[str]:
    """What differs, a line each: the whole is too long to find it in."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted({*before, *now})
        return [line for name in names for line in changes(before.get(name), now.get(name), f"{where}/{name}")]
    return [] if before == now else [f"{where}: {before!r} became {now!r}"]


def limits_of(listed: dict[str, Any]) -> dict[str, int]:
    """The active limits but those that deployments bring along."""
    limits = [limit for limit in listed["limits"].values() if not limit["name"].startswith("deployment:")]
    return {limit["name"]: limit["limit"] for limit in limits if limit["active"]}


def test_a_second_bootstrap_changes_nothing_and_says_so(
    ready_server: dict[str, str], client: SyncPrefectClient
) -> None:
    before = listing(client)
    second = bootstrap(ready_server)
    assert second.returncode == 0, second.stderr
    assert not changes(before, listing(client))
    assert second.stdout.splitlines()[-1] == "nothing changed: everything was there already"
    assert {pool["name"]: (pool["type"], pool["concurrency_limit"]) for pool in before["pools"].values()} == {
        "cpu": ("process", None),
        "gpu": ("process", None),
    }
    assert limits_of(before) == {"gpu": 1}
    assert {automation["name"] for automation in before["automations"].values()} == {MARK, RESTART}
    ours = [found for found in before["deployments"].values() if found["work_pool_name"]]
    assert [found["version"] for found in ours] == 11 * [shorten_commit()]


def test_a_run_that_takes_a_deployment_s_slot_does_not_change_the_deployment(client: SyncPrefectClient) -> None:
    before = read_deployments(client)
    limit = f"deployment:{before['pipeline/weekly']['id']}"
    client.increment_concurrency_slots([limit], 1, mode="concurrency")
    try:
        assert client.read_global_concurrency_limit_by_name(limit).active_slots == 1
        assert not changes(before, read_deployments(client))
    finally:
        client.release_concurrency_slots([limit], 1, occupancy_seconds=1)


def test_what_was_changed_is_corrected_and_what_is_no_longer_wanted_is_removed(
    ready_server: dict[str, str], client: SyncPrefectClient
) -> None:
    before = listing(client)
    client.update_work_pool("gpu", WorkPoolUpdate(concurrency_limit=1))
    changed = bootstrap(ready_server, GPU_SLOTS="2", WINDOW_S="120", NOTIFY_WEBHOOK="http://127.0.0.1:9/told")
    assert changed.returncode == 0, changed.stderr
    lines = changed.stdout.splitlines()
    assert {"pool cpu: there already", "pool gpu: corrected", "limit gpu: corrected, slots: 2"} <= set(lines)
    assert {f"automation {MARK!r}: corrected", "notification of failures: created"} <= set(lines)
    assert lines[-1] == "changes: 4"
    now = listing(client)
    assert limits_of(now) == {"gpu": 2} and now["pools"] == before["pools"]
    assert {automation["name"] for automation in now["automations"].values()} == {MARK, RESTART, NOTIFY}
    assert "127.0.0.1:9" not in str(now), "the address of a webhook is a secret"
    back = bootstrap(ready_server)
    assert "notification of failures: removed, since NOTIFY_WEBHOOK is not set" in back.stdout
    assert not changes(before, listing(client))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"PREFECT_API_URL": ""}, "PREFECT_API_URL: no server is named"),
        (
            {"PREFECT_API_URL": "http://127.0.0.1:9/api", "SERVER_TIMEOUT_S": "0"},
            "PREFECT_API_URL: no server answers at",
        ),
        ({"PREFECT_API_AUTH_STRING": ""}, "PREFECT_API_AUTH_STRING: is not set, but asked for"),
        ({"PREFECT_API_AUTH_STRING": "user:of-others"}, "PREFECT_API_AUTH_STRING: is refused by"),
        ({"GPU_SLOTS": "0"}, "GPU_SLOTS: should be a whole number of at least 1, not '0'"),
        ({"HEARTBEAT_S": "5"}, "HEARTBEAT_S: should be a whole number of at least 30, not '5'"),
        ({"WINDOW_S": "45.5"}, "WINDOW_S: should be a whole number of at least 60, not '45.5'"),
        ({"POOL_TYPE": "docker"}, "POOL_TYPE: 'docker' is not known; set process or kubernetes, or nothing"),
        ({"NOTIFY_WEBHOOK": "somebody"}, "NOTIFY_WEBHOOK: should be an address like https://"),
        ({"POOL_TYPE": "kubernetes"}, "POOL_TYPE: the pool cpu is there already and of type process, not kubernetes"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_one_sentence_that_names_it(
    ready_server: dict[str, str], settings: dict[str, str], said: str
) -> None:
    done = bootstrap(ready_server, **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("pool", ["cpu", "gpu"])
def test_the_server_takes_the_templates_of_kubernetes(client: SyncPrefectClient, pool: str) -> None:
    template = job_template(pool, "kubernetes", 30)
    try:
        client.create_work_pool(WorkPoolCreate(name=f"{pool}-cluster", type="kubernetes", base_job_template=template))
        assert client.read_work_pool(f"{pool}-cluster").base_job_template == template
    finally:
        client.delete_work_pool(f"{pool}-cluster")
