"""What the long faults share: an undisturbed run of the small sample in a bucket."""

from collections.abc import Iterator

import boto3  # type: ignore[import-untyped]
import pytest
from pipeline_runs import BUCKET, Objects, Store, flags, plain_environment, run_pipeline
from s3_server import running_s3, set_aws


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """An S3 server with an undisturbed run, and the disk of the machine that made it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with running_s3({BUCKET: {}}) as url:
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=url, **keys)
        arguments = flags(folder, f"s3://{BUCKET}/plain/one")
        run_pipeline(arguments, plain_environment(set_aws(url)), folder / "run.log").end()
        yield Store(url, client, Objects(client, BUCKET, "plain/"), folder)
