"""Runs of the small sample in processes of their own, to be killed, stopped and starved, and what they leave behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
from recipe import FLAGS

from tasks.files import REPOSITORY

EXPLAINED, UNEXPLAINED = (), ("--explanation.n-images", "0")
"""Explaining is left out where it does not matter."""
PATIENCE_S = 900.0
"""Far more than any of these runs takes: a busy machine is no failure."""
TRAIN = "import sys; from flows.engine.command_line import run_command; from flows.train import train; "
TRAIN += "sys.exit(run_command(train, sys.argv[1:], 'train'))"
"""The train flow alone, as a worker runs it."""
BEFORE_TRAINING = (
    "ingest",
    "check_source",
    "split",
    "pack",
    "screen",
    "segment",
    "check_prepared",
    "arrays",
    "masks",
    "lungs",
)


@dataclass(frozen=True)
class Place:
    """Where attempts on one run are kept: ``folder`` has the run, the cache and the sources; ``logs`` what was said."""

    folder: Path
    logs: Path
    more: tuple[str, ...] = UNEXPLAINED

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def log(self) -> str:
        """What all its processes have said so far, in order."""
        return "".join(path.read_text() for path in sorted(self.logs.glob("*.log")))

    @property
    def last_log(self) -> Path:
        """Where the process that was started last says it."""
        return max(self.logs.glob("*.log"))

    def flags(self, *more: str) -> list[str]:
        kept = ["--storage.cache", str(self.cache), "--storage.raw", str(self.folder / "raw")]
        return [*FLAGS, "--scaling.n-workers", "1", *self.more, *kept, "--run-dir", str(self.run), *more]


def copy_place(workspace: Path, folder: Path, stages: Sequence[str] = (), more: tuple[str, ...] = UNEXPLAINED) -> Place:
    """A place with the drawn sample of another, and with what its cache holds of these stages; more flags for it."""
    place = Place(folder, folder / "logs", more)
    shutil.copytree(workspace / "raw", folder / "raw")
    for stage in stages:
        shutil.copytree(workspace / "cache" / stage, place.cache / stage)
    return place


@contextmanager
def started(
    place: Place, flags: Sequence[str], api: str, code: str | None = None, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The pipeline, or other code with its flags, in a process that reports to a server; its output in a log."""
    place.logs.mkdir(parents=True, exist_ok=True)
    log = place.logs / f"{len(list(place.logs.glob('*.log'))):03d}.log"
    command = [sys.executable, *(["-c", code] if code else ["-m", "flows.pipeline"]), *flags]
    surroundings = {**os.environ, "PREFECT_API_URL": api, "PYTHONUNBUFFERED": "1", **environment}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=surroundings, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finish(
    place: Place, flags: Sequence[str], api: str, code: str | None = None, **environment: str
) -> tuple[int, str]:
    """Runs it to its end: exit code and output."""
    with started(place, flags, api, code, **environment) as process:
        process.wait(PATIENCE_S)
    return process.returncode, place.last_log.read_text()


def wait_until(process: subprocess.Popen[bytes], true: Callable[[], bool]) -> bool:
    """Waits until something is true, at most until the process ends; whether it is still running."""
    end = time.monotonic() + PATIENCE_S
    while process.poll() is None and not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
    return process.poll() is None


def wait_seconds(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits; whether the process is still running."""
    end = time.monotonic() + seconds
    return wait_until(process, lambda: time.monotonic() >= end)


# -- what a log says ---------------------------------------------------------------------------------------------------


def finished_tasks(log: str) -> list[str]:
    """Names of the tasks that finished, in order: ``ingest``, ``pack shards``, ``fit model`` …"""
    names = re.findall(r"Task run '([^']+)' - Finished in state Completed", log)
    return [re.sub(r"-[0-9a-f]{3}$", "", name) for name in names]


def seconds_of_tasks(log: str) -> dict[str, float]:
    """How long after the line before it each task finished; the first counts from the beginning of its flow."""
    found, before = {}, None
    for clock, text in re.findall(r"^(\d\d:\d\d:\d\d\.\d{3}) (.*)$", log, re.MULTILINE):
        now = datetime.strptime(clock, "%H:%M:%S.%f")
        name = next(iter(finished_tasks(text)), None)
        if before is None or name is None:
            before = before or now
            continue
        found[name] = max(((now - before).total_seconds()) % 86_400, 0.05)
        before = now
    return found


def epochs_done(log: str) -> Counter[str]:
    """How often each epoch was told as done."""
    return Counter(re.findall(r"member \d+ of \d+, epoch \d+", log))


# -- what lies on the disk ---------------------------------------------------------------------------------------------


def finished_work(place: Place) -> dict[str, tuple[int, int]]:
    """All that the cache counts as finished, stages and shards: name -> inode and time, other ones if made again."""
    found = [*place.cache.glob("*/*/stage.json"), *place.cache.glob("explanations/*/*.png")]
    found += [*place.cache.glob("arrays/*/[!.]*.npy"), *place.cache.glob("masks/*/*/[!.]*.npz")]
    whole = [path for path in found if ".partial" not in str(path)]
    return {str(path.relative_to(place.cache)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in whole}


def steps_saved(cache: Path) -> int:
    """Steps of the epoch that a training was stopped in, as far as it saved them: none where it saved whole epochs."""
    (checkpoint,) = cache.glob("fit/*.partial/members/member_*/checkpoint.json")
    return len(json.loads(checkpoint.read_text())["losses"])


def broken_files(folder: Path) -> list[str]:
    """Files that bear their final name and are not whole; what is being written is called ``….partial``."""
    broken = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".partial" not in str(path):
            try:
                read_file(path)
            except Exception as error:
                broken.append(f"{path}: {error}")
    return broken


def read_file(path: Path) -> None:
    """Reads a file to its end, in the way of its kind."""
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".parquet":
        pd.read_parquet(path)
    elif path.suffix == ".csv":
        assert path.read_text().endswith("\n"), "is cut short"
    elif path.suffix in (".npz", ".keras"):
        with zipfile.ZipFile(path) as content:
            assert content.testzip() is None
    elif path.suffix == ".npy":
        np.load(path)
    elif path.suffix == ".html":
        assert "</html>" in path.read_text()[-200:], "is cut short"
