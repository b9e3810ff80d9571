"""Whole runs of the small sample as people start them: processes, their logs, and what they left in a bucket."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import boto3  # type: ignore[import-untyped]
import numpy as np
import pandas as pd
from fault_table import Attempt
from recipe import FLAGS
from s3_server import running_s3, set_aws

from tasks.files import REPOSITORY
from tasks.runs.manifest import read_manifest

BUCKET = "plain-run"  # a session's, beside those of modules
LONGEST_S = 900.0


def flags(folder: Path, run_dir: str, epochs: int = 2) -> list[str]:
    """A run of the small sample on a machine whose disk is this folder."""
    storage = ("--storage.cache", str(folder / "cache"), "--storage.raw", str(folder / "raw"))
    return [*FLAGS, "--training.epochs", str(epochs), *storage, "--run-dir", run_dir]


def plain_environment(others: Mapping[str, str]) -> dict[str, str]:
    """Of a process that reports to a temporary server of its own."""
    return {name: value for name, value in others.items() if not name.startswith("PREFECT_")}


class Started:
    """A process of its own group, and all that it says in one file."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=REPOSITORY,
                env={**environment, "PYTHONUNBUFFERED": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        """Returns as soon as the process says something."""
        wait_until(lambda: re.search(text, self.said()), f"nobody said {text!r}", self.said, alive=self.process)

    def end(self, code: int = 0) -> str:
        """What it said, when it has ended with this exit code."""
        found = self.process.wait(timeout=LONGEST_S)
        assert found == code, f"exit code {found}\n{self.said()[-6000:]}"
        return self.said()

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Ends the process and all that it started."""
        try:
            os.killpg(self.process.pid, how)
        except ProcessLookupError:
            return
        if how == signal.SIGKILL:
            self.process.wait()


def run_pipeline(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Started:
    return Started(["flows.pipeline", *arguments], environment, log)


def wait_until(
    look: Callable[[], Any],
    problem: str,
    said: Callable[[], str] = lambda: "",
    alive: "subprocess.Popen[bytes] | None" = None,
    limit_s: float = LONGEST_S,
) -> Any:
    """What ``look`` finds in the end."""
    end = time.monotonic() + limit_s
    while True:
        ended = alive is not None and alive.poll() is not None
        if found := look():
            return found
        assert not ended and time.monotonic() < end, f"{problem}\n{said()[-6000:]}"
        time.sleep(0.05)


def epochs_in(*logs: str) -> list[str]:
    """The epochs that were trained to their end, in order."""
    return [found for log in logs for found in re.findall(r"member \d+ of \d+, epoch \d+ of \d+", log)]


class Objects:
    """What lies below a prefix of a bucket."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self.client, self.bucket, self.prefix = client, bucket, prefix
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        self.names = [entry["Key"].removeprefix(prefix) for page in pages for entry in page.get("Contents", ())]

    def read(self, name: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.bucket, Key=self.prefix + name)["Body"].read())

    def kinds(self) -> list[str]:
        """Their names without what differs from run to run, sorted; a second copy under another name shows.

        That is the time in a name, and what names things in the cache by content: a model file holds the time when it
        was written.
        """
        return sorted(re.sub(r"\d{8}T\d{6}\.\d+Z|[0-9a-f]{64}|[0-9a-f]{24}", "DIFFERS", name) for name in self.names)

    def require_like(self, other: "Objects", attempt: Attempt, run: str, other_run: str = "") -> None:
        """Asserts that a run ended like a run below another prefix."""
        require_like(
            lambda name: self.read(f"{run}/{name}"), lambda name: other.read(f"{other_run or run}/{name}"), attempt
        )


@dataclass(frozen=True)
class Store:
    """A bucket with an undisturbed run at ``s3://chest/plain/one``.

    Attributes:
        url: Of the S3 server.
        client: Of the S3 server.
        plain: What lies below ``plain/``.
        folder: The disk of the machine that made the run.
    """

    url: str
    client: Any
    plain: Objects
    folder: Path

    def copy_cache(self, folder: Path) -> None:
        """Gives a machine a cache with all of the undisturbed run but its training."""
        left_out = shutil.ignore_patterns("runs", "fit", "calibrate", "evaluate", "finished")
        shutil.copytree(self.folder / "cache", folder / "cache", ignore=left_out)
        shutil.copytree(self.folder / "raw", folder / "raw")

    def require_like(self, run: Path, attempt: Attempt) -> None:
        """Asserts that a run in a folder ended like the undisturbed one."""
        require_like(lambda name: (run / name).read_bytes(), lambda name: self.plain.read(f"one/{name}"), attempt)


@contextmanager
def running_store(folder: Path) -> Iterator[Store]:
    """Starts an S3 server and has the undisturbed run made."""
    with running_s3({BUCKET: {}}) as url:
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=url, **keys)
        arguments = flags(folder, f"s3://{BUCKET}/plain/one")
        run_pipeline(arguments, plain_environment(set_aws(url)), folder / "run.log").end()
        yield Store(url, client, Objects(client, BUCKET, "plain/"), folder)


COMPARED = ("run.json", "manifest.parquet", "metrics.json", "predictions.csv", "members/member_1.keras")


def require_like(read: Callable[[str], bytes], plain: Callable[[str], bytes], attempt: Attempt) -> None:
    """Asserts that two runs of one network ended alike, wherever they are read from."""
    with TemporaryDirectory() as folder:
        runs = Path(folder, "one"), Path(folder, "other")
        for run, content in zip(runs, (read, plain), strict=True):
            (run / "members").mkdir(parents=True)
            for name in COMPARED:
                (run / name).write_bytes(content(name))
        compare_runs(attempt, *runs)


def compare_runs(attempt: Attempt, run: Path, unbroken: Path) -> None:
    """Two runs ended alike: the same manifest, and metrics, predictions and weights equal to 1e-4."""
    import tasks.training.members  # noqa: F401  Keras knows their layers then
    from tasks.networks.keras_backend import keras

    attempt.kept((run / "run.json").exists(), "the run is not finished")
    attempt.whole(read_manifest(run).equals(read_manifest(unbroken)), "another manifest")
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (run, unbroken))
    attempt.whole(are_close(one, two), "other metrics")
    one, two = (pd.read_csv(folder / "predictions.csv").fillna(-1) for folder in (run, unbroken))
    numbers = ["probability", "bacteria"]
    attempt.whole(one.drop(columns=numbers).equals(two.drop(columns=numbers)), "other rows of predictions")
    attempt.whole(np.allclose(one[numbers], two[numbers], rtol=0, atol=1e-4), "other predictions")
    for path in sorted((unbroken / "members").glob("*.keras")):
        pair = [keras.saving.load_model(folder / "members" / path.name, compile=False) for folder in (run, unbroken)]
        for a, b in zip(*(network.get_weights() for network in pair), strict=True):
            attempt.whole(np.allclose(a, b, rtol=0, atol=1e-4), f"other weights in {path.name}")


def are_close(one: Any, two: Any) -> bool:
    """Whether two values of JSON are the same, numbers up to 1e-4."""
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(are_close(one[name], two[name]) for name in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(are_close, one, two))
    if isinstance(one, float) or isinstance(two, float):
        return abs(one - two) <= 1e-4
    return bool(one == two)
