"""Two runs on one run folder in a bucket: on one machine one waits; of two machines the one that began last goes on."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
from fault_table import FaultTable
from s3_server import faulty_proxy, running_s3, set_aws

from flows.engine.run_folders import own_run_folder
from tasks.errors import RunError
from tasks.files import REPOSITORY
from tasks.runs.bucket import fetch_run, read_seal, send
from tasks.runs.places import SEAL
from tasks.runs.run import Run
from tasks.settings import Settings

BUCKET = "chest"
FAULT = "two runs on one run folder in a bucket at once"
WORK = """
import sys
from flows.engine.run_folders import own_run_folder
from tasks.errors import RunError
from tasks.runs.bucket import claim_run, fetch_run, send
from tasks.runs.run import Run
from tasks.settings import Settings
address, cache, me, is_part = sys.argv[1:]
run = Run(Settings(run_dir=address, storage={"cache": cache}))
with claim_run(run, True) if is_part else own_run_folder(run):
    print(f"{me} begins", flush=True)
    fetch_run(run)
    (run.folder / "a.txt").write_text(me)
    try:
        send(run, ["a.txt"])
        sys.stdin.readline()
        (run.folder / "a.txt").write_text(f"{me} again")
        send(run, ["a.txt"])
    except RunError as error:
        print(error, flush=True)
    print(f"{me} ends", flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_s3({BUCKET: {}}) as url:
        yield url


@pytest.fixture
def address(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Of a run in a folder of its own."""
    for name, value in set_aws(server).items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{request.node.name}/one"


def machine(folder: Path, address: str, **ingestion: Any) -> Settings:
    """The settings of a run on a machine whose disk is this folder."""
    return Settings.model_validate(
        {"run_dir": address, "storage": {"cache": str(folder)}, "ingestion": {"backoff_s": 0, **ingestion}}
    )


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(address: str) -> Iterator[Start]:
    """Starts a process that works on the run, on the machine whose disk is a folder; a line lets it go on."""
    started: list[subprocess.Popen[str]] = []

    def run(disk: Path, me: str, is_part: str = "") -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", WORK, address, str(disk), me, is_part]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=environment, text=True, **pipes)  # type: ignore[call-overload]
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def next_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def file_there(address: str) -> str:
    key = f"{address.removeprefix(f's3://{BUCKET}/')}/a.txt"
    return boto3.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read().decode()  # type: ignore[no-any-return]


@pytest.mark.slow
def test_the_second_of_two_runs_on_one_machine_waits_until_the_first_has_ended(
    faults: FaultTable, address: str, tmp_path: Path, start: Start
) -> None:
    with faults.attempt(FAULT) as attempt:
        first = start(tmp_path, "first")
        assert next_line(first) == "first begins"
        second = start(tmp_path, "second")
        said = next_line(second)
        attempt.whole(said.startswith(f"another run (process {first.pid} on {os.uname().nodename})"), said)
        said, _ = first.communicate("\n", timeout=60)
        assert said == "first ends\n"
        said, _ = second.communicate("\n", timeout=60)
        attempt.whole(said.startswith("second begins\n") and said.endswith("second ends\n"), said)
        assert file_there(address) == "second again"


@pytest.mark.slow
def test_a_run_killed_on_this_machine_keeps_nobody_out(
    faults: FaultTable, address: str, tmp_path: Path, start: Start
) -> None:
    with faults.attempt(FAULT) as attempt:
        first = start(tmp_path, "first")
        assert next_line(first) == "first begins"
        first.send_signal(signal.SIGKILL)
        first.wait()
        said, _ = start(tmp_path, "second").communicate("\n", timeout=60)
        attempt.whole(said.startswith("second begins\n") and said.endswith("second ends\n"), said)


@pytest.mark.slow
def test_a_run_that_was_cut_off_and_comes_back_overwrites_nothing_of_the_one_that_began_after_it(
    faults: FaultTable, address: str, tmp_path: Path, start: Start
) -> None:
    with faults.attempt(FAULT) as attempt:
        first = start(tmp_path / "here", "first")
        assert next_line(first) == "first begins"
        second = start(tmp_path / "there", "second")
        said, _ = second.communicate("\n", timeout=60)
        assert said.startswith("second begins\n") and said.endswith("\nsecond ends\n")
        said, _ = first.communicate("\n", timeout=60)
        attempt.whole("was taken over by another process" in said and said.count("\n") == 2, said)
        attempt.kept(file_there(address) == "second again", "what the second one sent")


@pytest.mark.slow
def test_a_training_done_elsewhere_works_beside_the_run_that_asked_for_it(
    faults: FaultTable, address: str, tmp_path: Path, start: Start
) -> None:
    with faults.attempt(FAULT) as attempt:
        leader = start(tmp_path / "here", "leader")
        assert next_line(leader) == "leader begins"
        said, _ = start(tmp_path / "there", "part", is_part="yes").communicate("\n", timeout=60)
        assert said.startswith("part begins\n") and said.endswith("\npart ends\n")
        said, _ = leader.communicate("\n", timeout=60)
        attempt.whole(said == "leader ends\n" and file_there(address) == "leader again", said)


def test_a_run_that_somebody_else_sealed_meanwhile_is_left_alone(
    faults: FaultTable, address: str, tmp_path: Path
) -> None:
    with faults.attempt(FAULT) as attempt:
        settings = machine(tmp_path, address)
        fetch_run(Run(settings))
        key = f"{address.removeprefix(f's3://{BUCKET}/')}/{SEAL}"
        boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=b'{"news": "theirs"}')
        (Run(settings).folder / SEAL).write_text('{"news": "ours"}')
        with pytest.raises(RunError, match="was taken over by another process"):
            send(Run(settings), [SEAL])
        attempt.kept(read_seal(Run(settings)) == {"news": "theirs"}, "their seal")


def test_a_run_is_claimed_and_sent_through_a_network_that_loses_a_third_of_the_answers(
    faults: FaultTable, address: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faults.attempt(FAULT) as attempt:
        with faulty_proxy(server, share=0.3, faults=("lost", "503"), seed=3) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            settings = machine(tmp_path, address, timeout_s=2.0, tries=10)
            for turn in range(4):
                with own_run_folder(Run(settings)):
                    fetch_run(Run(settings))
                    for name in ("a.txt", SEAL):
                        (Run(settings).folder / name).write_text(f'{{"turn": {turn}}}')
                        send(Run(settings), [name])
            assert sum(proxy.n_failed.values()) > 2
        monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        attempt.kept(file_there(address) == '{"turn": 3}' and read_seal(Run(settings)) == {"turn": 3}, "the last one's")
