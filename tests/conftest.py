"""What tests share: one Prefect engine for the session, one finished run of the small sample."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from fault_table import FaultTable

os.environ["PREFECT_LOGGING_TO_API_ENABLED"] = "false"  # nobody reads the logs of the test server

import tasks  # noqa: F401  sets Prefect's environment before anything imports Prefect

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CHROMIUM = Path("/usr/bin/chromium")
SMALL = ["--sample.n-images", "60", "--sample.side-px", "128", "--training.epochs", "2", "--training.n-models", "2"]
SMALL += ["--explanation.n-images", "4"]


# Nothing is timed: a busy machine is no failure.
COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("quick", max_examples=15, **COMMON)
hypothesis.settings.register_profile("all", max_examples=200, **COMMON)
FAULTS = FaultTable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-faults", action="store_true", help="the long faults too, and their table (make faults)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the long faults to ``make faults``."""
    long = [item for item in items if item.get_closest_marker("long") and not config.getoption("--all-faults")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("all" if config.getoption("--all-faults") else "quick")


def pytest_unconfigure(config: pytest.Config) -> None:
    """The table of faults comes after pytest's own closing line."""
    if config.getoption("--all-faults"):
        FAULTS.print()


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
def prefect_engine() -> Iterator[None]:
    """A real Prefect engine with a database of its own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture(scope="session")
def api(prefect_engine: None) -> str:
    """The session's server, so that the many processes of a test need none of their own."""
    from prefect.settings import PREFECT_API_URL

    return str(PREFECT_API_URL.value())


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
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cache and raw folders that the session's runs share."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="session")
def small_flags(workspace: Path) -> list[str]:
    """Flags of a small run that keeps its work in the workspace."""
    return [*SMALL, "--storage.cache", str(workspace / "cache"), "--storage.raw", str(workspace / "raw")]


@pytest.fixture(scope="session")
def finished_run(prefect_engine: None, workspace: Path, small_flags: list[str]) -> Path:
    """The run folder of the whole pipeline on the small sample."""
    from flows.command_line import read_flags
    from flows.pipeline import pipeline

    run = workspace / "run"
    pipeline(read_flags([*small_flags, "--run-dir", str(run)], "test"))
    return run


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
