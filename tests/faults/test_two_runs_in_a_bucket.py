"""Two runs on one run folder in a bucket, from two machines: one waits, and one that died keeps nobody out."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
from fault_table import FaultTable
from s3_server import faulty_proxy, running_s3, set_aws

from tasks import run_locks
from tasks.records import Facts, RunError
from tasks.run_copies import send
from tasks.run_locks import hold_run, is_gone, this_process
from tasks.settings import Settings
from tasks.shared_files import read_shared, runs_of
from tasks.storage import REPOSITORY, run_folder

BUCKET = "chest"
FAULT = "two runs on one run folder in a bucket at once"
WORK = """
import sys, time
from pathlib import Path
from tasks import run_locks
from tasks.run_copies import send
from tasks.run_locks import hold_run
from tasks.settings import Settings
from tasks.storage import run_folder
address, cache, me, elsewhere = sys.argv[1:]
run_locks.BEAT_S, run_locks.SILENT_S, run_locks.POLL_S = 0.1, 4.0, 0.05
if elsewhere:
    run_locks.this_process = lambda: f"machine of {me}"
settings = Settings(run_dir=address, storage={"cache": cache})
with hold_run(settings, me):
    print(f"{me} begins", flush=True)
    run_folder(settings).mkdir(parents=True, exist_ok=True)
    for turn in range(2):
        (run_folder(settings) / f"{turn}.txt").write_text(me)
        send(settings, [f"{turn}.txt"])
        while turn == 0 and not Path(cache, "go").exists():
            time.sleep(0.05)
    print(f"{me} ends", flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_s3({BUCKET: {}}) as url:
        yield url


@pytest.fixture
def address(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Of a run in a folder of its own; locks are looked at often, and given up soon, yet not by a busy machine."""
    for name, value in set_aws(server).items():
        monkeypatch.setenv(name, value)
    for name, seconds in {"BEAT_S": 0.1, "SILENT_S": 4.0, "POLL_S": 0.05}.items():
        monkeypatch.setattr(run_locks, name, seconds)
    return f"s3://{BUCKET}/{request.node.name}/one"


def machine(folder: Path, address: str, **ingestion: Any) -> Settings:
    """The settings of a run on a machine whose disk is this folder."""
    return Settings.model_validate(
        {"run_dir": address, "storage": {"cache": str(folder / "cache")}, "ingestion": {"backoff_s": 0, **ingestion}}
    )


@pytest.fixture
def start() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts a run that sends a file, and another one when it may go on; by default as if on a machine of its own."""
    started: list[subprocess.Popen[str]] = []

    def run(folder: Path, address: str, me: str, elsewhere: str = "yes") -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", WORK, address, str(folder / me), me, elsewhere]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def go_on(folder: Path, *runs: str) -> None:
    for me in runs:
        (folder / me).mkdir(parents=True, exist_ok=True)
        (folder / me / "go").touch()


def first_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def lock_of(settings: Settings) -> Facts | None:
    return read_shared(runs_of(settings), "cache/held/one.json", settings)


def put_file(settings: Settings, content: str) -> None:
    run_folder(settings).mkdir(parents=True, exist_ok=True)
    (run_folder(settings) / "a.txt").write_text(content)
    send(settings, ["a.txt"])


@pytest.mark.slow
def test_the_second_of_two_runs_on_one_folder_waits_until_the_first_has_ended_however_long_that_takes(
    faults: FaultTable, address: str, tmp_path: Path, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    with faults.attempt(FAULT) as attempt:
        first = start(tmp_path, address, "first")
        assert first_line(first) == "first begins\n"
        second = start(tmp_path, address, "second")
        told = first_line(second)
        assert told.startswith(f"another run works in {address}, on {os.uname().nodename}, process {first.pid} since")
        end = time.monotonic() + 2 * run_locks.SILENT_S
        while time.monotonic() < end:
            held = first.poll() is None and lock_of(machine(tmp_path, address)) is not None
            attempt.whole(held, "it waits meanwhile")
        go_on(tmp_path, "first", "second")
        assert first_line(first) == "first ends\n"
        said, _ = second.communicate(timeout=60)
        assert (said, second.returncode, first.wait(timeout=60)) == ("second begins\nsecond ends\n", 0, 0)
        names = {entry["Key"] for entry in objects_below(address)}
        attempt.whole(names == {f"{address.split('/')[3]}/one/{turn}.txt" for turn in range(2)}, "no lock is left")


def objects_below(address: str) -> list[Any]:
    found = boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=address.split("/")[3] + "/")
    return list(found.get("Contents", ()))


@pytest.mark.slow
def test_a_run_killed_on_this_machine_keeps_nobody_out(
    faults: FaultTable,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: Callable[..., "subprocess.Popen[str]"],
) -> None:
    monkeypatch.setattr(run_locks, "SILENT_S", 1e6)
    with faults.attempt(FAULT) as attempt:
        first = start(tmp_path, address, "first", elsewhere="")
        assert first_line(first) == "first begins\n"
        first.send_signal(signal.SIGKILL)
        first.wait()
        settings = machine(tmp_path, address)
        attempt.kept(lock_of(settings) is not None, "its lock is still there")
        with hold_run(settings, "second"):
            put_file(settings, "second")
        assert lock_of(settings) is None


@pytest.mark.slow
def test_a_run_silent_for_long_is_taken_over_and_sends_nothing_when_it_wakes(
    faults: FaultTable, address: str, tmp_path: Path, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    with faults.attempt(FAULT) as attempt:
        first = start(tmp_path, address, "first")
        assert first_line(first) == "first begins\n"
        first.send_signal(signal.SIGSTOP)
        try:
            settings = machine(tmp_path, address)
            with hold_run(settings, "second"):
                put_file(settings, "second")
                go_on(tmp_path, "first")
                first.send_signal(signal.SIGCONT)
                said, _ = first.communicate(timeout=120)
            attempt.whole(first.returncode == 1 and "was taken over by another process" in said, said)
        finally:
            first.kill()
            first.wait()
        assert lock_of(settings) is None


def test_a_run_started_again_while_its_first_process_still_works_waits_for_itself(
    faults: FaultTable, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faults.attempt("a run taken for dead that works on while it is started again") as attempt:
        old, new = machine(tmp_path / "old", address), machine(tmp_path / "new", address)
        with hold_run(old, "run 1"):
            put_file(old, "old")
            monkeypatch.setattr(run_locks, "this_process", lambda: "elsewhere")
            again = run_locks._Hold(new, "run 1", False)
            attempt.whole(not again.take(None), "the first process still works")
            put_file(old, "old again")
        assert again.take(None)
        again.free()
        assert lock_of(new) is None


def test_a_training_done_elsewhere_works_beside_the_run_that_asked_for_it(
    faults: FaultTable, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faults.attempt(FAULT) as attempt:
        leader, part = machine(tmp_path / "leader", address), machine(tmp_path / "part", address)
        hold = run_locks._Hold(leader, "run 1", False)
        hold.wait()
        monkeypatch.setattr(run_locks, "this_process", lambda: "elsewhere")
        with hold_run(part, "run 1", is_part=True):
            put_file(part, "trained")
            hold.beat()
            attempt.whole(not hold.lost, "the run that leads still holds it")
            stranger = run_locks._Hold(machine(tmp_path / "stranger", address), "run 2", False)
            assert not stranger.take(None)
        assert lock_of(leader) is not None, "the part lets nobody in as it ends"
        hold.free()
        assert lock_of(leader) is None


@pytest.mark.slow
def test_the_folder_is_held_and_freed_through_a_network_that_loses_a_tenth_of_the_answers(
    faults: FaultTable, address: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faults.attempt(FAULT), faulty_proxy(server, share=0.3, faults=("lost", "503"), seed=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        settings = machine(tmp_path, address, timeout_s=2.0, tries=10)
        for turn in range(4):
            with hold_run(settings, f"run {turn}"):
                put_file(settings, str(turn))
        assert proxy.n_failed["lost"] > 2 and lock_of(settings) is None


def test_the_beat_goes_on_after_an_error_of_any_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_locks, "BEAT_S", 0.01)
    hold, ended = run_locks._Hold(machine(tmp_path, "s3://chest/runs/one"), "run 1", False), threading.Event()
    waiting = [OSError(errno.ENOSPC, "No space left on device"), RunError("cannot be reached"), ValueError("odd")]

    def beat() -> None:
        if waiting:
            raise waiting.pop(0)
        ended.set()

    monkeypatch.setattr(hold, "beat", beat)
    hold.beat_until(ended)
    assert ended.is_set()


def test_a_run_that_cannot_let_others_in_for_a_full_disk_says_so_and_ends_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change_shared(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_locks, "change_shared", change_shared)
    run_locks._Hold(machine(tmp_path, "s3://chest/runs/one"), "run 1", False).free()
    assert "No space left on device (others wait 120 s for this run now)" in capsys.readouterr().out


def test_a_process_is_gone_only_when_this_machine_knows_it() -> None:
    me = this_process()
    kernel, number, started = me.split(" ")
    assert not is_gone(me) and is_gone(f"{kernel} {number} {int(started) + 1}")
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert is_gone(f"{kernel} {done.pid} 1")
    assert not any(map(is_gone, (f"elsewhere {number} 1", "", "None", "elsewhere")))
