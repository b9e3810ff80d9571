"""What Prefect's web page shows of a run: its name and tags, progress, tables, and the way to its report."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, FlowRunFilter, FlowRunFilterTags
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.engine.labels import find_subject, shorten_commit
from tasks.runs.artifacts import to_link
from tasks.runs.provenance import read_commit
from tasks.settings import Settings


@pytest.fixture
def client(finished: dict[str, Any]) -> Iterator[SyncPrefectClient]:
    """A client of the server that the finished run reported to."""
    with temporary_settings({PREFECT_API_URL: finished["api"]}), get_client(sync_client=True) as client:
        yield client


def test_flow_runs_say_source_and_commit_in_name_and_tags(client: SyncPrefectClient) -> None:
    commit = shorten_commit()
    tags = FlowRunFilter(tags=FlowRunFilterTags(all_=["source:sample", f"commit:{commit}"]))
    tagged = {run.name for run in client.read_flow_runs(flow_run_filter=tags)}
    assert {f"{flow} sample {commit}" for flow in ("pipeline", "prepare", "train", "explain")} <= tagged
    assert (read_commit() or "unknown").startswith(commit.partition("-")[0])


def test_a_run_shows_progress_tables_and_a_link_to_its_report(client: SyncPrefectClient, finished_run: Path) -> None:
    keys = ["training", "screened", "metrics", "devices", "check-source", "report", "report-page"]
    found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=keys)))
    kinds = {artifact.key: artifact.type for artifact in found}
    assert kinds == {
        "training": "progress",
        "screened": "progress",
        "metrics": "table",
        "devices": "table",
        "check-source": "table",
        "report": "markdown",
        "report-page": "markdown",  # a link is one
    }
    links = [artifact.data for artifact in found if artifact.key == "report-page"]
    address = str(finished_run.resolve() / "report" / "index.html")
    assert f"[{address}](file://{address})" in links
    # Other tests of the session kill their trainings half-way.
    assert 100.0 in {artifact.data for artifact in found if artifact.key == "training"}
    shown = next(str(a.data) for a in found if a.key == "report" and address in str(a.data))
    assert shown.count("](data:image/") == 2, "ROC curve and LIME pair"


def test_the_subject_of_a_run_is_what_it_is_given_and_never_the_key_of_a_link() -> None:
    link = Settings(source="https://www.dropbox.com/scl/fi/abc/set.zip?rlkey=secret", run_dir="runs/one")
    assert find_subject({"settings": link}) == "https://www.dropbox.com/…/set.zip"
    assert find_subject({"settings": link, "images": "new.zip"}) == "new.zip"
    assert find_subject({"settings": link, "answers": None}) == "runs/one"


def test_a_link_opens_a_file_an_object_on_its_server_or_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    assert to_link("/runs/a b/report/index.html") == "file:///runs/a%20b/report/index.html"
    address = "s3://runs/weekly/one/report/index.html"
    assert to_link(address) == "https://console.aws.amazon.com/s3/object/runs?prefix=weekly/one/report/index.html"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000/")
    assert to_link(address) == "http://minio:9000/runs/weekly/one/report/index.html"
