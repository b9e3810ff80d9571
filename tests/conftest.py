"""What tests share: one finished run of the small recipe; in each process, servers of Prefect, S3 and Dropbox."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis
import pytest
from dropbox_server import DropboxServer, running_server
from fault_table import FaultTable
from once import close_session, make_once, open_session, shared_folder
from recipe import FLAGS

os.environ["PREFECT_LOGGING_TO_API_ENABLED"] = "false"  # nobody reads the logs of the test server

import tasks  # noqa: F401  sets Prefect's environment before anything imports Prefect

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CHROMIUM = Path("/usr/bin/chromium")

# Nothing is timed: a busy machine is no failure.
COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("quick", max_examples=15, **COMMON)
hypothesis.settings.register_profile("all", max_examples=200, **COMMON)
FAULTS = FaultTable()
SESSION = pytest.StashKey[TemporaryDirectory[str]]()


FIRST = (
    *("test_flows.py", "test_fitting.py", "test_deployed.py", "test_audit_oracle.py", "test_runners.py"),
    *("test_bucket.py", "test_kills.py", "test_review_flow.py", "test_score_flow.py", "test_screen_flow.py"),
)
"""Files that take longest, so that no process is left with one of them; the first makes what others wait for."""
SLOW = {"browser", "guarded_server", "store"}
"""Fixtures whose tests are left to ``make test-all``."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-faults", action="store_true", help="more cases of hostile input, and the table of faults")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("all" if config.getoption("--all-faults") else "quick")
    if not hasattr(config, "workerinput"):  # the process that starts the others, or the only one
        config.stash[SESSION] = open_session()


def pytest_unconfigure(config: pytest.Config) -> None:
    """The table of faults comes after pytest's own closing line."""
    if SESSION in config.stash:
        close_session(config.stash[SESSION])
    if config.getoption("--all-faults"):
        FAULTS.print()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the files that take longest; what needs one of the slow fixtures is slow."""
    for item in items:
        if SLOW & set(getattr(item, "fixturenames", ())) and not item.get_closest_marker("long"):
            item.add_marker(pytest.mark.slow)
    ranks = {name: rank for rank, name in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(FIRST)))


@pytest.fixture(scope="session")
def faults() -> FaultTable:
    """The table of faults that the session fills."""
    return FAULTS


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data set, where it is at hand."""
    if not SHARED.is_dir():
        pytest.skip("the real data set is not at hand (../shared/data)")
    return SHARED


@pytest.fixture(scope="session")
def api() -> str:
    """The address of a real Prefect server: one for each test process and what it starts.

    With two processes on one, SQLite is busy now and then, and Prefect's client waits up to a minute.
    """
    from prefect_server import PrefectServer

    def start(folder: Path) -> dict[str, Any]:
        server = PrefectServer(folder)
        server.start()
        assert server.process is not None
        return {"api": server.api, "pid": server.process.pid}

    return str(make_once(f"prefect-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}", start)["api"])


@pytest.fixture(scope="session")
def prefect_engine(api: str) -> Iterator[None]:
    """Flows that tests call report to that server; without heartbeats, for whose thread each flow waits a second."""
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_API_URL: api, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


@pytest.fixture(scope="session")
def guarded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real server that asks for a password; the environment of a client that knows it."""
    from prefect_server import running_server

    folder = tmp_path_factory.mktemp("server")
    with running_server(folder / "server", auth="user:of-the-tests") as api:
        yield {
            **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
            "PREFECT_API_URL": api,
            "PREFECT_API_AUTH_STRING": "user:of-the-tests",
            "PREFECT_HOME": str(folder / "client"),
        }


@pytest.fixture(scope="session")
def workspace() -> Path:
    """A folder with cache and raw folders that the session's runs share, in all test processes."""
    folder = shared_folder() / "workspace"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def small_flags(workspace: Path) -> list[str]:
    """Flags of the small recipe that keep its work in the workspace."""
    return [*FLAGS, "--storage.cache", str(workspace / "cache"), "--storage.raw", str(workspace / "raw")]


@pytest.fixture(scope="session")
def finished(api: str, prefect_engine: None, workspace: Path, small_flags: list[str]) -> dict[str, Any]:
    """A finished run of the whole pipeline on the small recipe, made once for all test processes.

    ``run`` is its folder, ``api`` the address of the server that it reported to.
    """
    from flows.engine.command_line import read_flags
    from flows.pipeline import pipeline

    def make(_: Path) -> dict[str, Any]:
        run = workspace / "run"
        pipeline(read_flags([*small_flags, "--run-dir", str(run)], "test"))
        return {"run": str(run), "api": api}

    return make_once("finished", make)


@pytest.fixture(scope="session")
def finished_run(finished: dict[str, Any]) -> Path:
    """The folder of that run."""
    return Path(finished["run"])


@pytest.fixture(scope="session")
def dropbox_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DropboxServer]:
    """A TLS server that behaves like Dropbox, in this process."""
    with running_server(tmp_path_factory.mktemp("certificates")) as server:
        yield server


@pytest.fixture
def dropbox(dropbox_server: DropboxServer) -> DropboxServer:
    """That server, as if it had just been started."""
    dropbox_server.reset()
    return dropbox_server


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An S3 server with an undisturbed run of the small sample, and the disk of the machine that made it."""
    from pipeline_runs import running_store

    with running_store(tmp_path_factory.mktemp("undisturbed")) as running:
        yield running


# Not for the whole session: while Playwright's loop runs in this thread, Prefect takes every call for one from a loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window; in CI it has to be there."""
    if not CHROMIUM.exists() and not os.environ.get("CI"):
        pytest.skip("there is no Chromium here (/usr/bin/chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()
