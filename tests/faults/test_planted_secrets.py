"""Secrets that were planted in the environment, and keys in links, are nowhere in what runs leave behind."""

import base64
import io
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import boto3
import pandas as pd
import pytest
from dropbox_server import RLKEY, DropboxServer
from fault_table import FaultTable
from pipeline_runs import wait_until
from prefect_team import running_team
from recipe import FLAGS
from s3_server import AWS, running_s3

from tasks.files import REPOSITORY

PLANTED = {
    "DROPBOX_TOKEN": "planted-dropbox-word-17",
    "AWS_ACCESS_KEY_ID": "planted-id-word-23",
    "AWS_SECRET_ACCESS_KEY": "planted-aws-word-29",
    "AWS_SESSION_TOKEN": "planted-session-word-31",
}
BUCKET = "x-rays"
IMPATIENT = ("--ingestion.tries", "1", "--ingestion.backoff-s", "0.01")


@dataclass
class Left:
    """What the runs left: files by name, what they printed, and how they ended: an exit code or a state."""

    files: dict[str, bytes]
    said: dict[str, str]
    ends: dict[str, int | str]


def run_line(name: str, flags: list[str], environment: dict[str, str], left: Left) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.pipeline", *FLAGS, *IMPATIENT, *flags],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    left.said[name], left.ends[name] = done.stdout + done.stderr, done.returncode


def read_below(folder: Path, name: str) -> dict[str, bytes]:
    return {f"{name}/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_bucket(url: str) -> dict[str, bytes]:
    s3 = boto3.client("s3", endpoint_url=url, **_as_arguments(AWS))
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    names = [entry["Key"] for page in pages for entry in page["Contents"]]
    return {f"s3://{name}": s3.get_object(Bucket=BUCKET, Key=name)["Body"].read() for name in names}


def unpack(files: dict[str, bytes]) -> dict[str, bytes]:
    """Also what lies compressed within: members of networks and arrays, the cells of tables."""
    found = dict(files)
    for name, content in files.items():
        if name.endswith(".parquet"):
            found[f"{name}, unpacked"] = pd.read_parquet(io.BytesIO(content)).to_csv().encode()
        elif zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                found |= {f"{name}, {member}": archive.read(member) for member in archive.namelist()}
    return found


def draw_sample(folder: Path) -> bytes:
    from tasks.drawings.sample import write_sample

    write_sample(folder / "archive", folder / "truth", n_images=60, side_px=128, seed=7, device_effect="natural")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path in sorted((folder / "archive").rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder / "archive").as_posix())
    return stream.getvalue()


@pytest.fixture(scope="module")
def left(
    guarded_server: dict[str, str], dropbox_server: DropboxServer, tmp_path_factory: pytest.TempPathFactory
) -> Left:
    """A whole run from a share link into a bucket, reporting to a server with a password; and runs that fail."""
    folder, dropbox = tmp_path_factory.mktemp("planted"), dropbox_server
    content = draw_sample(folder / "sample")
    with running_s3({BUCKET: {"kept": b""}}) as url:
        environment = {**guarded_server, **AWS, **PLANTED, **dropbox.sdk_environment, "AWS_ENDPOINT_URL": url}
        link = dropbox.put("sample.zip", content)
        lost = link.replace("sample.zip", "lost.zip")
        known = ["--ingestion.allowed-hosts", ",".join(dropbox.hosts), "--ingestion.ca-file", str(dropbox.ca_file)]
        known += ["--storage.cache", str(folder / "cache"), "--storage.raw", str(folder / "raw")]
        here = ["--run-dir", str(folder / "here")]
        left = Left({}, {}, {})
        for name, flags in {
            "whole": ["--source", link, "--run-dir", f"s3://{BUCKET}/runs/one"],
            "link that is gone": ["--source", lost, *here],
            "old link that is gone": ["--source", lost.replace("/scl/fi/abc123/", "/s/planted-path-word-37/"), *here],
            "link with a password": ["--source", link.replace("https://", "https://user:planted-link-word-41@"), *here],
            "wrong checksum": ["--source", link, "--ingestion.sha256", "0" * 64, *here],
            "bucket with a key": ["--source", "s3://planted-id-word-23:planted-aws-word-29@x-rays/a", *here],
            "no such bucket": ["--source", "s3://no-such-bucket/a", *here],
            "no such run bucket": ["--source", link, "--run-dir", "s3://no-such-bucket/runs/one"],
            "dropbox without the folder": ["--source", "dropbox:/nowhere", *here],
        }.items():
            run_line(name, [*known, *flags], environment, left)
        for var in PLANTED:
            assert var in environment
        left.files = read_bucket(url)
        home = Path(guarded_server["PREFECT_HOME"])
        for name, place in {"cache": folder / "cache", "raw": folder / "raw", "here": folder / "here"}.items():
            left.files |= read_below(place, name)
        left.files |= read_below(home.parent / "server", "server") | read_below(home, "client")
        left.files = unpack(left.files)
    return left


@pytest.fixture(scope="module")
def deployed(dropbox_server: DropboxServer, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """A worker's whole run, from bucket to bucket with the keys of a block; one whose token in a block is refused."""
    from prefect.blocks.system import Secret
    from prefect_aws import AwsClientParameters, AwsCredentials

    folder = tmp_path_factory.mktemp("deployed")
    content = draw_sample(folder / "sample")
    team_folder, dropbox = folder / "team", dropbox_server
    hook = {"NOTIFY_WEBHOOK": "http://127.0.0.1:9/planted-hook-word-53"}
    with (
        running_s3({BUCKET: {"sample.zip": content}}) as url,
        running_team(team_folder, auth="user:of-the-tests", more=dropbox.sdk_environment, **hook) as team,
    ):
        AwsCredentials(
            aws_access_key_id="id-in-the-clear",  # no secret to prefect-aws: the server's event of the block shows it
            aws_secret_access_key="planted-block-word-43",
            region_name="us-east-1",
            aws_client_parameters=AwsClientParameters(endpoint_url=url),
        ).save("bucket")
        Secret(value="planted-token-word-47").save("dropbox-token")
        worker = team.start_worker()
        named = {"aws_block": "bucket", "dropbox_block": "dropbox-token", "ca_file": str(dropbox.ca_file), "tries": 1}
        left = Left({}, {}, {})
        for name, source in {"whole": f"s3://{BUCKET}/sample.zip", "token refused": "dropbox:/x-rays"}.items():
            runs = f"s3://{BUCKET}/runs/{name.replace(' ', '-')}"
            run = team.start_run(folder / "machine", runs, source=source, ingestion=named)
            left.ends[name] = team.wait_for_state(run, "Completed", "Failed")
        left.said["worker"] = worker.said()
        server = team_folder / "server"
        wait_until(lambda: b"Webhook call failed" in b"".join(read_below(server, "").values()), "nobody was notified")
        team.stop_workers()
        left.files = read_bucket(url) | read_below(folder / "machine", "machine") | read_below(team_folder, "team")
        left.files = unpack(left.files)
    return left


def _as_arguments(aws: dict[str, str]) -> dict[str, str]:
    return {
        "aws_access_key_id": aws["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": aws["AWS_SECRET_ACCESS_KEY"],
        "region_name": aws["AWS_DEFAULT_REGION"],
    }


PASSWORD = {
    "password of the server": "of-the-tests",
    "password of the server, encoded": base64.b64encode(b"user:of-the-tests").decode().rstrip("="),
}
WORDS = {
    **{name: value for name, value in PLANTED.items() if name != "AWS_ACCESS_KEY_ID"},
    **PASSWORD,
    "key of the link": RLKEY,
    "other part of the link": "st=x%2By",
    "path of an old link": "planted-path-word-37",
    "password in a link": "planted-link-word-41",
    "id of the key": "planted-id-word-23",
}
BLOCK_WORDS = {
    **PASSWORD,
    "key of the bucket": "planted-block-word-43",
    "token": "planted-token-word-47",
    "address of the webhook": "planted-hook-word-53",
}


def read_database(left: Left, server: str) -> bytes:
    """A server's database with its journals."""
    return b"".join(content for name, content in left.files.items() if name.startswith(f"{server}/prefect.db"))


def places(left: Left, word: str) -> list[str]:
    """Files and outputs that hold a word."""
    files = [name for name, content in left.files.items() if word.encode() in content]
    return files + [name for name, said in left.said.items() if word in said]


@pytest.mark.long
def test_the_runs_ended_as_they_should(left: Left) -> None:
    wrong = [name for name, code in left.ends.items() if code != (0 if name == "whole" else 2)]
    assert not wrong, left.said[wrong[0]][-6_000:]
    assert not [name for name, said in left.said.items() if "Traceback" in said]
    assert "s3://runs/one/run.json" in left.files
    inside = {name.rpartition(", ")[2] for name in left.files if ".keras, " in name}
    assert "metadata.json" in inside and any(name.endswith("manifest.parquet, unpacked") for name in left.files)
    database = read_database(left, "server")
    assert b"sample.zip" in database and b"min_train_images" in database, "it has parameters, logs and artifacts"


@pytest.mark.long
@pytest.mark.parametrize("what", WORDS)
def test_no_planted_secret_is_in_anything_that_runs_leave(faults: FaultTable, left: Left, what: str) -> None:
    with faults.attempt("a planted secret in files, bucket, logs and the server's database"):
        assert places(left, WORDS[what]) == []


@pytest.mark.long
def test_the_runs_of_a_worker_ended_as_they_should(deployed: Left) -> None:
    assert deployed.ends == {"whole": "Completed", "token refused": "Failed"}, deployed.said["worker"][-6_000:]
    assert (
        "s3://runs/whole/run.json" in deployed.files and "token for dropbox:/x-rays is not" in deployed.said["worker"]
    )
    database = read_database(deployed, "team/server")
    assert b"sample.zip" in database and b"aws-credentials" in database and b"member 1 of 1" in database


@pytest.mark.long
@pytest.mark.parametrize("what", BLOCK_WORDS)
def test_no_secret_of_a_block_is_in_anything_that_a_workers_runs_leave(
    faults: FaultTable, deployed: Left, what: str
) -> None:
    with faults.attempt("a secret of a Prefect block in what a worker's runs leave"):
        assert places(deployed, BLOCK_WORDS[what]) == []


@pytest.mark.long
@pytest.mark.parametrize("which", ["left", "deployed"])
def test_a_run_leaves_no_pickle(which: str, request: pytest.FixtureRequest) -> None:
    files = request.getfixturevalue(which).files
    found = [name for name, content in files.items() if content[:2] in (b"\x80\x03", b"\x80\x04", b"\x80\x05")]
    assert found == []
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".joblib"))]


def test_the_environment_of_the_tests_holds_no_such_word() -> None:
    assert not set(PLANTED.values()) & set(os.environ.values())
