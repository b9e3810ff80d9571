"""Credentials for a bucket that expire while a run uses it: renewed where somebody renews them, else named."""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from fault_table import FaultTable
from s3_server import FaultyProxy, faulty_proxy, running_s3, set_aws

from tasks.errors import RunError, SourceError
from tasks.runs.s3_client import BucketFolder
from tasks.settings import IngestionSettings
from tasks.sources.bucket_mirror import BucketCopy, fetch_bucket

BUCKET = "chest"
SETTINGS = IngestionSettings(tries=3, timeout_s=5, backoff_s=0)
ISSUE = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
n = int(path.read_text()) + 1
path.write_text(str(n))
key = {"Version": 1, "AccessKeyId": f"KEY{n}", "SecretAccessKey": "testing", "SessionToken": "testing"}
print(json.dumps(key | {"Expiration": "2099-01-01T00:00:00Z"}))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_s3({BUCKET: {f"data/train/NORMAL/{i}.jpeg": b"%d" % i for i in range(40)}}) as url:
        yield url


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultyProxy]:
    """In front of the server, for a machine without any credentials yet."""
    with faulty_proxy(server, share=0.0) as running:
        names = set_aws(running.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            del names[name]
            monkeypatch.delenv(name, raising=False)
        files = {"AWS_CONFIG_FILE": "config", "AWS_SHARED_CREDENTIALS_FILE": "credentials"}
        for name, value in {**names, **{name: str(tmp_path / file) for name, file in files.items()}}.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the clock on that says how old credentials are: within a second they are not looked up again."""
    moved = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + moved[0], sleep=time.sleep)
    monkeypatch.setattr("tasks.runs.s3_client.time", clock)
    return lambda seconds: moved.append(moved.pop() + seconds)


def fetch(folder: Path) -> BucketCopy:
    return fetch_bucket(f"s3://{BUCKET}/data", folder, SETTINGS, list, lambda done, total: None)


def issue_by_process(folder: Path) -> None:
    """Has ``KEY1``, ``KEY2`` and so on issued by a process, each good for many years by what it says."""
    (folder / "issue.py").write_text(ISSUE)
    (folder / "n").write_text("0")
    line = f"credential_process = {sys.executable} {folder / 'issue.py'} {folder / 'n'}\n"
    (folder / "config").write_text(f"[default]\n{line}")


def write_keys(folder: Path, key: str) -> None:
    """What a tool for logins leaves in ``~/.aws/credentials``."""
    values = f"aws_access_key_id = {key}\naws_secret_access_key = testing\naws_session_token = testing\n"
    (folder / "credentials").write_text(f"[default]\n{values}")


@pytest.mark.parametrize(
    "renew", [issue_by_process, lambda folder: write_keys(folder, "KEY1")], ids=["process", "file"]
)
def test_credentials_that_somebody_renews_are_taken_up_in_the_middle_of_many_uploads(
    renew: Callable[[Path], None],
    faults: FaultTable,
    proxy: FaultyProxy,
    tmp_path: Path,
    later: Callable[[float], None],
) -> None:
    with faults.attempt("credentials for S3 that expire and are renewed") as attempt:
        renew(tmp_path)
        bucket = BucketFolder(f"s3://{BUCKET}/renewed", SETTINGS)
        names = [f"{i}.txt" for i in range(60)]
        for name in names:
            (tmp_path / name).write_text(name)
        bucket.put(tmp_path / names[0], names[0])
        later(2.0)
        if (tmp_path / "credentials").exists():
            write_keys(tmp_path, "KEY2")
        with ThreadPoolExecutor(8) as pool:
            uploads = [pool.submit(bucket.put, tmp_path / name, name) for name in names[1:30]]
            proxy.expired = {"KEY1"}
            uploads += [pool.submit(bucket.put, tmp_path / name, name) for name in names[30:]]
            stored = [upload.result() for upload in uploads]
        attempt.kept(len(stored) == 59 and sorted(bucket.entries()) == sorted(names), "all of it is in the bucket")
        assert set(proxy.seen) == {"KEY1", "KEY2"}, "asked for anew once, not by each thread"


def test_a_source_is_fetched_to_its_end_though_the_credentials_expire_midway(
    faults: FaultTable, proxy: FaultyProxy, tmp_path: Path, later: Callable[[float], None]
) -> None:
    with faults.attempt("credentials for S3 that expire and are renewed") as attempt:
        issue_by_process(tmp_path)

        def expire(request: str) -> None:
            if len(proxy.requests) == 20:
                later(2.0)
                proxy.expired = {"KEY1"}

        proxy.before = expire
        attempt.kept(len(fetch(tmp_path / "m").fetched) == 40, "every object came")
        assert proxy.seen["KEY2"]


def test_expired_credentials_that_nobody_renews_are_one_sentence_that_names_them_and_no_key(
    faults: FaultTable, proxy: FaultyProxy, tmp_path: Path
) -> None:
    with faults.attempt("credentials for S3 that expire for good"):
        write_keys(tmp_path, "KEY1")
        proxy.expired = {"KEY1"}
        said = r"the AWS credentials have expired; renew them and run again"
        with pytest.raises(RunError, match=rf"run_dir: s3://{BUCKET}/run: {said}") as refused:
            BucketFolder(f"s3://{BUCKET}/run", SETTINGS).entries()
        with pytest.raises(SourceError, match=rf"source: s3://{BUCKET}/data: {said}"):
            fetch(tmp_path / "m")
        assert "KEY1" not in str(refused.value) and len(proxy.requests) <= 6, "it is not asked again and again"
        write_keys(tmp_path, "KEY2")
        assert len(fetch(tmp_path / "m").fetched) == 40
