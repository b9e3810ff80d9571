"""A clock that jumps back and forth while a run works.

The real clock is everybody's, so that a process gets one of its own: a small library, compiled here and loaded before
the C library, shifts what the process takes for the time of day. How long things take is measured by another clock,
which does not jump on real machines either. Prefect's server keeps the right time.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from broken_runs import (
    broken_files,
    copy_place,
    epochs_done,
    finish,
    finished_tasks,
    finished_work,
    started,
    wait_until,
)
from fault_table import FaultTable
from pipeline_runs import compare_runs

FAULT = "clock that jumps"
DAY_S = 86_400
LIBRARY = Path(__file__).with_name("jumping_clock.c")


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process whose clock goes by the file in ``CLOCK_SHIFT``."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("there is no C compiler here to make a clock that jumps")
    folder = tmp_path_factory.mktemp("clock")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(folder / "clock.so"), str(LIBRARY), "-ldl"]
    subprocess.run(command, check=True)
    (folder / "shift").write_text("0")
    return {"LD_PRELOAD": str(folder / "clock.so"), "CLOCK_SHIFT": str(folder / "shift")}


def test_the_clock_of_a_process_jumps_when_it_is_told(clock: dict[str, str]) -> None:
    code = f"""
import time
from datetime import datetime
from pathlib import Path
one, start = time.time(), time.monotonic()
Path({clock["CLOCK_SHIFT"]!r}).write_text("-{DAY_S}")
two = datetime.now().timestamp()
Path({clock["CLOCK_SHIFT"]!r}).write_text("0")
print(round((two - one) / 60), round((time.monotonic() - start) / 60))
"""
    done = subprocess.run([sys.executable, "-c", code], env=clock, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["-1440", "0"]


@pytest.mark.long
def test_a_run_whose_clock_jumps_a_day_back_and_ten_days_on_is_killed_and_ends_like_an_unbroken_one(
    faults: FaultTable,
    prefect_engine: None,
    finished_run: Path,
    workspace: Path,
    tmp_path: Path,
    clock: dict[str, str],
) -> None:
    from prefect.settings import PREFECT_API_URL

    api = str(PREFECT_API_URL.value())
    place = copy_place(workspace, tmp_path, ("check_source",))
    shift = Path(clock["CLOCK_SHIFT"])

    def jump(process: "subprocess.Popen[bytes]", after: str, seconds: int) -> None:
        log = place.last_log
        assert wait_until(process, lambda: after in finished_tasks(log.read_text())), log.read_text()[-2000:]
        shift.write_text(str(seconds))

    with faults.attempt(FAULT) as attempt:
        with started(place, place.flags(), api, **clock) as process:
            jump(process, "split", -DAY_S)
            jump(process, "screen", 10 * DAY_S)
            log = place.last_log
            assert wait_until(process, lambda: "member 1 of 1, epoch 1" in log.read_text()), log.read_text()[-2000:]
            process.kill()
            process.wait()
        before = finished_work(place)
        shift.write_text(str(-3_600))
        exit_code, said = finish(place, place.flags(), api, **clock)
        shift.write_text("0")
        attempt.kept(exit_code == 0, said[-2000:])
        attempt.kept(before.items() <= finished_work(place).items(), "finished work was done again")
        assert max(epochs_done(place.log).values()) == 1
        attempt.whole(not broken_files(place.folder), f"half-written: {broken_files(place.folder)}")
        compare_runs(attempt, place.run, finished_run)
