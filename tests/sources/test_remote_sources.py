"""The whole pipeline from servers on this machine: a link as Dropbox gives it, and an S3 bucket."""

import io
import json
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from dropbox_server import DropboxServer, Fault
from s3_server import running_s3, set_aws

from flows.engine.command_line import read_flags, run_command
from tasks.runs.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("prefect_engine")


def sample_files(workspace: Path) -> dict[str, bytes]:
    (sample,) = workspace.glob("raw/sample-*/archive")
    return {p.relative_to(sample).as_posix(): p.read_bytes() for p in sorted(sample.rglob("*")) if p.is_file()}


def run(source: str, run_dir: Path, small_flags: list[str], *extra: str) -> Path:
    from flows.pipeline import pipeline

    flags = [*small_flags, "--source", source, "--run-dir", str(run_dir), *extra]
    return Path(str(pipeline(read_flags(flags, "test"))))


@pytest.mark.slow
def test_the_sample_runs_from_a_dropbox_link_that_is_cut_and_limited_and_leaves_no_key_of_the_link_behind(
    finished_run: Path, workspace: Path, small_flags: list[str], tmp_path: Path, dropbox: DropboxServer
) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in sample_files(workspace).items():
            archive.writestr(name, content)
    link = dropbox.put("sample.zip", stream.getvalue())
    dropbox.faults = [Fault(cut=0.6), Fault(status=429, retry_after="1")]
    assert "rlkey=" in link
    hosts = ["--ingestion.allowed-hosts", ",".join(dropbox.hosts), "--ingestion.ca-file", str(dropbox.ca_file)]
    report = run(link, tmp_path / "run", small_flags, *hosts, "--ingestion.backoff-s", "0.01")
    assert [request.status for request in dropbox.content_requests()] == [200, 429, 206]
    assert dropbox.n_sent() / len(stream.getvalue()) < 1.05
    assert report.stat().st_size > 100_000
    pd.testing.assert_frame_equal(read_manifest(tmp_path / "run"), read_manifest(finished_run))
    key = link.split("rlkey=")[1].split("&")[0].encode()
    written = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert not [p for p in written if key in p.read_bytes()]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["source"]["kind"] == "link"


@pytest.mark.slow
def test_the_sample_runs_from_a_bucket_and_a_vanished_image_is_reported(
    finished_run: Path, workspace: Path, small_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    from flows.prepare import prepare

    files = sample_files(workspace)
    with running_s3({"x-rays": {f"weekly/{name}": content for name, content in files.items()}}) as url:
        for name, value in set_aws(url).items():
            if name.startswith("AWS_"):
                monkeypatch.setenv(name, value)
        report = run("s3://x-rays/weekly", tmp_path / "first", small_flags)
        assert report.stat().st_size > 100_000
        pd.testing.assert_frame_equal(read_manifest(tmp_path / "first"), read_manifest(finished_run))
        gone = read_manifest(finished_run).query("split == 'train' and excluded == ''")["path"].iloc[0]
        boto3.client("s3").delete_object(Bucket="x-rays", Key=f"weekly/chest_xray/{gone}")
        prepare(
            read_flags([*small_flags, "--source", "s3://x-rays/weekly", "--run-dir", str(tmp_path / "second")], "x")
        )
    facts = json.loads((tmp_path / "second" / "stages" / "ingest.json").read_text())["facts"]
    assert facts["vanished"] == [f"chest_xray/{gone}"]
    assert gone not in set(read_manifest(tmp_path / "second")["path"])


def test_a_bucket_that_stays_away_ends_in_one_sentence_after_its_tries(
    tmp_path: Path,
    small_flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from flows.pipeline import pipeline

    for name, value in set_aws("http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    flags = [*small_flags, "--source", "s3://x-rays/weekly", "--run-dir", str(tmp_path / "run")]
    assert run_command(pipeline, [*flags, "--ingestion.tries", "2", "--ingestion.backoff-s", "0.01"], "test") == 2
    said = capfd.readouterr().err
    assert said.strip().splitlines()[-1].startswith("error: source: s3://x-rays/weekly cannot be reached (")
    assert caplog.text.count("attempt 2 of 2 follows") == 1 and "Traceback" not in said
