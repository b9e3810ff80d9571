"""A run folder on S3 through a network that fails a tenth of the requests, with credentials that expire midway."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
from fault_table import FaultTable
from pipeline_runs import Objects, epochs_in, flags, plain_environment, run_pipeline
from s3_server import faulty_proxy, running_s3, set_aws

BUCKET = "chest"
FAULTS = ("500", "503", "reset", "stall", "lost")


@dataclass(frozen=True)
class Store:
    """A bucket with an undisturbed run at ``s3://chest/plain/one``."""

    url: str
    client: Any
    plain: Objects
    folder: Path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("s3")
    with running_s3({BUCKET: {}}) as url:
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=url, **keys)
        arguments = flags(folder / "plain", f"s3://{BUCKET}/plain/one")
        run_pipeline(arguments, plain_environment(set_aws(url)), folder / "plain.log").end()
        yield Store(url, client, Objects(client, BUCKET, "plain/"), folder)


@pytest.mark.long
def test_a_run_through_a_tenth_of_faults_ends_like_an_undisturbed_one_and_leaves_nothing_under_another_name(
    faults: FaultTable, store: Store, tmp_path: Path
) -> None:
    with (
        faulty_proxy(store.url, share=0.1, faults=FAULTS, stall_s=8.0) as proxy,
        faults.attempt(
            "S3: 500, 503, silence, reset, lost answers, expired keys at a tenth of the requests"
        ) as attempt,
    ):

        def expire(request: str) -> None:
            if request.startswith(f"PUT /{BUCKET}/faulty/cache/calibrate/"):
                proxy.expired = {"first"}

        proxy.before = expire
        arguments = [*flags(tmp_path, f"s3://{BUCKET}/faulty/one"), "--ingestion.timeout-s", "4"]
        environment = plain_environment(set_aws(proxy.url))
        log = tmp_path / "first.log"
        first = run_pipeline(arguments, environment | {"AWS_ACCESS_KEY_ID": "first"}, log).end(code=2)
        (said,) = [line for line in first.splitlines() if line.startswith("error:")]
        assert said.startswith("error: run_dir: s3://chest/faulty/cache: the AWS credentials have expired; renew them")
        assert "Traceback" not in first
        second = run_pipeline(arguments, environment | {"AWS_ACCESS_KEY_ID": "second"}, tmp_path / "second.log").end()
        found = Objects(store.client, BUCKET, "faulty/")
        attempt.kept(found.kinds() == store.plain.kinds(), "the bucket holds what it holds after an undisturbed run")
        found.require_like(store.plain, attempt, "one")
        sent = [request for request in proxy.requests if request.startswith(f"PUT /{BUCKET}/faulty/one/")]
        attempt.whole(sent[-1].endswith("/run.json"), "the seal went last")
        assert set(proxy.n_failed) == set(FAULTS) and proxy.n_failed.total() > 40
        assert len(epochs_in(first, second)) == 2 and "(taken from the cache)" in second, "no epoch was trained twice"
