"""The weekly run as a team has it: a server with authentication, two workers, a bucket, and a browser that watches."""

import base64
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import httpx
import pytest
from postgres_server import find_programs, running_postgres
from prefect_server import running_server, stop_group
from recipe import adapt
from s3_server import running_s3, set_aws

from tasks.files import REPOSITORY

pytestmark = pytest.mark.slow
LOGIN = "admin:of-this-test"
BUCKET = "chest"
RUNS = f"s3://{BUCKET}/team/"
LONGEST_S = 600.0
SETTINGS: dict[str, Any] = {"source": "sample", **adapt(training={"epochs": 60})}
"""Enough epochs for another training to be started meanwhile."""


@dataclass(frozen=True)
class Team:
    """Server, workers and bucket after a weekly run, with a training started by hand beside it.

    Attributes:
        api: Address of the server's API.
        settings: Of the weekly run; its run folder is the only one below ``RUNS`` that the weekly run names itself.
        weekly: The weekly run, as the server has it.
        trained: The training that the weekly run asked for.
        by_hand: The training that was started by hand while that one was under way.
        s3: A client of the bucket.
    """

    api: str
    settings: dict[str, Any]
    weekly: dict[str, Any]
    trained: dict[str, Any]
    by_hand: dict[str, Any]
    s3: Any

    def ask(self, path: str, **body: Any) -> Any:
        return ask(self.api, path, **body)

    def log_of(self, run: dict[str, Any], until: str = "") -> str:
        """The run's log; its last lines may reach the server after its end, so the text is waited for."""
        end = time.monotonic() + 60
        while True:
            log = "\n".join(line["message"] for line in logs_of(self.api, run))
            if until in log or time.monotonic() > end:
                return log
            time.sleep(0.5)


def ask(api: str, path: str, **body: Any) -> Any:
    """An answer of the server's API, as another program would ask."""
    key = base64.b64encode(LOGIN.encode()).decode()
    with httpx.Client(headers={"Authorization": f"Basic {key}"}, timeout=30) as client:
        token = client.get(f"{api}/csrf-token", params={"client": "test"})
        if token.status_code == 200:
            client.headers.update({"Prefect-Csrf-Token": token.json()["token"], "Prefect-Csrf-Client": "test"})
        for _ in range(30):
            answer = client.post(f"{api}{path}", json=body) if body else client.get(f"{api}{path}")
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:  # SQLite is busy; Prefect's own client waits too
                break
            time.sleep(0.5)
        answer.raise_for_status()
        return answer.json()


def logs_of(api: str, run: dict[str, Any]) -> list[dict[str, Any]]:
    return list(ask(api, "/logs/filter", logs={"flow_run_id": {"any_": [run["id"]]}}, sort="TIMESTAMP_ASC", limit=200))


def start_run(api: str, deployment: str, settings: dict[str, Any]) -> dict[str, Any]:
    found = ask(api, f"/deployments/name/{deployment}")
    return dict(ask(api, f"/deployments/{found['id']}/create_flow_run", parameters={"settings": settings}))


def wait_for(what: str, find: Callable[[], Any], workers: list[subprocess.Popen[bytes]], folder: Path) -> Any:
    """What ``find`` finds in the end; with the workers' logs where it does not."""
    end = time.monotonic() + LONGEST_S
    while time.monotonic() < end and all(worker.poll() is None for worker in workers):
        if found := find():
            return found
        time.sleep(0.5)
    logs = "\n".join(f"{path.name}:\n{path.read_text()[-6000:]}" for path in sorted(folder.glob("*.log")))
    raise AssertionError(f"{what}: not within {LONGEST_S:.0f} s\n{logs}")


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Starts all of it, and has the weekly run done."""
    folder, programs = tmp_path_factory.mktemp("team"), find_programs()
    if programs is None and not os.environ.get("CI"):
        pytest.skip("there is no PostgreSQL here (Debian's postgresql)")
    assert programs is not None
    with ExitStack() as stack:
        database = stack.enter_context(running_postgres(folder / "postgresql", programs))
        url = stack.enter_context(running_s3({BUCKET: {}}))
        api = stack.enter_context(running_server(folder / "server", auth=LOGIN, database=database))
        environment = {name: value for name, value in set_aws(url).items() if not name.startswith("PREFECT_")} | {
            "PREFECT_API_URL": api,
            "PREFECT_API_AUTH_STRING": LOGIN,
            "PREFECT_HOME": str(folder / "client"),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
        }
        subprocess.run([sys.executable, "-m", "infra.bootstrap"], cwd=REPOSITORY, env=environment, check=True)
        workers = []
        for pool in ("cpu", "gpu"):
            command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
            log = stack.enter_context((folder / f"{pool}.log").open("w"))
            worker = subprocess.Popen(
                [*command, "--name", f"{pool} worker"],
                cwd=REPOSITORY,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stack.callback(stop_group, worker)
            workers.append(worker)

        def end_of(run: dict[str, Any]) -> dict[str, Any]:
            def look() -> dict[str, Any] | None:
                found = dict(ask(api, f"/flow_runs/{run['id']}"))
                return found if found["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

            return dict(wait_for(run["name"], look, workers, folder))

        def child() -> dict[str, Any] | None:
            found = ask(api, "/flow_runs/filter", flows={"name": {"any_": ["train"]}})
            return next((run for run in found if run["state"]["type"] == "RUNNING"), None)

        storage = {"cache": str(folder / "cache"), "raw": str(folder / "raw")}
        settings = SETTINGS | {"storage": storage, "run_dir": RUNS, "train_on": "train/gpu"}
        other = settings | adapt(training={"epochs": 1}) | {"run_dir": f"{RUNS}by-hand", "seed": 8}
        prepared = start_run(api, "prepare/cpu", other)
        assert end_of(prepared)["state"]["type"] == "COMPLETED"
        weekly = start_run(api, "pipeline/weekly", settings)
        trained = wait_for("the training of pipeline/weekly", child, workers, folder)
        by_hand = start_run(api, "train/gpu", other)
        weekly, by_hand = end_of(weekly), end_of(by_hand)
        s3 = boto3.client("s3", endpoint_url=url, aws_access_key_id="testing", aws_secret_access_key="testing")
        yield Team(api, settings, weekly, dict(ask(api, f"/flow_runs/{trained['id']}")), by_hand, s3)


def test_a_scheduled_run_completes_and_report_and_metrics_are_in_the_bucket(team: Team) -> None:
    assert team.weekly["state"]["type"] == "COMPLETED", team.log_of(team.weekly)
    pages = team.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="team/")
    names = {entry["Key"].removeprefix("team/") for page in pages for entry in page["Contents"]}
    sealed = [name for name in names if name.endswith("/run.json")]
    assert len(sealed) == 1 and re.fullmatch(r"\d{8}T\d{6}Z-sample/run\.json", sealed[0])
    run = sealed[0].partition("/")[0]
    assert {f"{run}/{name}" for name in ("report/index.html", "metrics.json", "model.keras", "audit.json")} <= names
    page = team.s3.get_object(Bucket=BUCKET, Key=f"team/{run}/report/index.html")
    assert page["ContentType"].startswith("text/html")
    report = f"s3://{BUCKET}/team/{run}/report/index.html"
    assert report in team.log_of(team.weekly, until=report)


def test_the_server_has_planned_the_runs_of_the_next_mondays(team: Team) -> None:
    deployment = team.ask("/deployments/name/pipeline/weekly")["id"]
    found = team.ask("/flow_runs/filter", flow_runs={"deployment_id": {"any_": [deployment]}})
    planned = [run for run in found if run["auto_scheduled"]]
    times = sorted(datetime.fromisoformat(run["expected_start_time"]) for run in planned)
    assert len(times) >= 3 and {run["state"]["type"] for run in planned} == {"SCHEDULED"}
    assert {(time.isoweekday(), time.hour, time.minute, time.utcoffset()) for time in times} == {(1, 3, 0, timedelta())}
    assert {later - earlier for earlier, later in pairwise(times)} == {timedelta(weeks=1)}


def test_the_weekly_run_had_its_training_done_by_the_worker_of_the_gpu_pool(team: Team) -> None:
    assert (team.trained["state"]["type"], team.trained["work_pool_name"]) == ("COMPLETED", "gpu")
    worker = next(line for line in logs_of(team.api, team.trained) if line["name"] == "prefect.flow_runs.worker")
    assert "gpu worker" in worker["message"]
    parent = team.ask(f"/task_runs/{team.trained['parent_task_run_id']}")
    assert parent["flow_run_id"] == team.weekly["id"]
    assert team.trained["idempotency_key"] == f"{team.weekly['id']}-train-1"


def test_a_training_started_by_hand_meanwhile_waited_for_the_gpu(team: Team) -> None:
    assert team.by_hand["state"]["type"] == "COMPLETED", team.log_of(team.by_hand)
    waits = "another model trains: waiting"
    assert waits in team.log_of(team.by_hand, until=waits)
    spans = []
    for run in (team.trained, team.by_hand):
        tasks = team.ask("/task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}})
        fits = [task for task in tasks if task["name"].startswith("fit")]
        spans.append(
            (
                min(datetime.fromisoformat(task["start_time"]) for task in fits),
                max(datetime.fromisoformat(task["end_time"]) for task in fits),
            )
        )
    assert spans[0][1] <= spans[1][0]


def test_a_client_without_the_password_gets_nothing(team: Team) -> None:
    assert httpx.get(f"{team.api}/flow_runs/{team.weekly['id']}").status_code == 401


def test_the_same_source_and_settings_a_week_later_are_nothing_new(team: Team) -> None:
    changed = team.settings | {"ingestion": {"skip_unchanged": True}}
    run = start_run(team.api, "pipeline/weekly", changed)
    end = time.monotonic() + LONGEST_S
    while (found := team.ask(f"/flow_runs/{run['id']}"))["state"]["type"] not in ("COMPLETED", "FAILED", "CRASHED"):
        assert time.monotonic() < end
        time.sleep(0.5)
    assert found["state"]["name"] == "Nothing new", team.log_of(run)


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tab(team: Team, browser: Any) -> Iterator[Any]:
    """A tab of somebody who has logged in."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    key = base64.b64encode(LOGIN.encode()).decode()
    context.add_init_script(f"localStorage.setItem('prefect-password', {json.dumps(key)})")
    page = context.new_page()
    page.set_default_timeout(30_000)
    yield page
    if folder := os.environ.get("SCREENSHOTS"):
        name = re.sub(r"\W+", "-", os.environ.get("PYTEST_CURRENT_TEST", "page").partition("::")[2].split(" ")[0])
        page.screenshot(path=str(Path(folder) / f"{name}.png"))
    context.close()


def test_the_web_page_shows_the_run_with_its_stages(team: Team, tab: Any) -> None:
    tab.goto(f"{team.api.removesuffix('/api')}/runs/flow-run/{team.weekly['id']}")
    tab.get_by_text(team.weekly["name"]).first.wait_for()
    tab.get_by_text("Completed").first.wait_for()
    tab.get_by_text("Subflow Runs").click()
    for name in ("prepare sample", "train sample", "explain sample"):
        tab.get_by_text(name).first.wait_for()
    tab.get_by_text("Logs", exact=True).click()


def test_the_web_page_shows_tables_pictures_and_the_report_s_address(team: Team, tab: Any) -> None:
    tab.goto(f"{team.api.removesuffix('/api')}/artifacts")
    for key in ("report", "devices", "left-out"):
        tab.get_by_text(key, exact=True).first.wait_for()
    made = team.ask("/artifacts/filter", artifacts={"key": {"any_": ["report"]}})
    tab.goto(f"{team.api.removesuffix('/api')}/artifacts/artifact/{made[0]['id']}")
    tab.get_by_text("report/index.html").first.wait_for()


def test_the_web_page_makes_a_form_of_the_settings_with_descriptions(team: Team, tab: Any) -> None:
    found = team.ask("/deployments/name/pipeline/weekly")
    tab.goto(f"{team.api.removesuffix('/api')}/deployments/deployment/{found['id']}/run")
    tab.get_by_text("The run folder, used exactly as given").first.wait_for()
    tab.get_by_text("Deployment that trains, such as train/gpu").first.wait_for()
