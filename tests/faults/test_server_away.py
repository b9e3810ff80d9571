"""What a run would show in Prefect's page while the server is away costs the run nothing."""

import socket

import pytest
from fault_table import FaultTable
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from tasks.runs import artifacts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Artifact creation outside")
def test_what_cannot_be_shown_is_said_and_the_run_goes_on(
    faults: FaultTable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(artifacts, "in_run", lambda: True)
    with socket.socket() as taken:  # nobody listens there
        taken.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{taken.getsockname()[1]}/api"
        with (
            faults.attempt("server away while a run has something to show"),
            temporary_settings({PREFECT_API_URL: away, PREFECT_CLIENT_MAX_RETRIES: 1}),
        ):
            artifacts.show_table("devices", [{"n": 1}], "a table")
            artifacts.show_link("report", "s3://chest/run/report/index.html", "a link")
            artifacts.show_markdown("summary", "text", "some text")
            artifacts.Progress("training", "Training").show(1, 2)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" is not shown")[0] for line in said] == ["devices", "report", "summary", "training"]
