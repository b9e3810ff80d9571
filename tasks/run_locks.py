"""One run at a time works in a run folder in a bucket; another one waits until it has ended, or is silent for long.

Beside the runs, ``cache/held/<name>.json`` says which Prefect run works on the one of that name, and in which process;
a beat that changes every 20 s says that it still does. No clock is compared with another machine's: who waits takes
over when it has seen the same beat for two minutes. A process that died on the same machine is seen to be dead at
once. A training that the run has done elsewhere is part of it and works beside it. A run that the server took for dead
and started again waits for itself, too, while its first process still works.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from tasks.records import Facts, PipelineError, RunError
from tasks.run_copies import guards, open_bucket
from tasks.settings import Settings
from tasks.shared_files import change_shared, runs_of

BEAT_S = 20.0
SILENT_S = 120.0
POLL_S = 5.0


def is_held_here(settings: Settings) -> bool:
    """Whether this process holds the run folder already."""
    return str(settings.run_dir) in guards


@contextmanager
def hold_run(settings: Settings, flow_run: str, is_part: bool = False) -> Iterator[None]:
    """Works in a run folder in a bucket alone, waiting for another run that does.

    While it is held, ``send`` refuses once another run has taken the folder over.

    Args:
        settings: Name the run.
        flow_run: Of Prefect, the topmost one.
        is_part: Whether this process does a part of what another one leads: it may work beside that.

    Raises:
        RunError: If the bucket cannot be used.
    """
    hold = _Hold(settings, flow_run, is_part)
    hold.wait()
    guards[str(settings.run_dir)] = hold.confirm
    ended = threading.Event()
    beating = threading.Thread(target=hold.beat_until, args=(ended,), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        del guards[str(settings.run_dir)]
        hold.free()


class _Hold:
    def __init__(self, settings: Settings, flow_run: str, is_part: bool) -> None:
        self.settings, self.flow_run, self.is_part = settings, flow_run, is_part
        self.runs = runs_of(settings)
        self.name = f"cache/held/{str(settings.run_dir).rpartition('/')[2]}.json"
        self.process = this_process()
        self.since = f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC"
        self.there: Facts | None = None
        self.lost = ""
        self.beat_at = 0.0
        self.changing = threading.Lock()

    def wait(self) -> None:
        seen, since, told = None, time.monotonic(), False
        while not self.take(seen if time.monotonic() - since > SILENT_S else None):
            assert self.there is not None
            if self.there != seen:
                seen, since = self.there, time.monotonic()
            if not told:
                print(
                    f"another run works in {self.settings.run_dir}, on {self.there.get('machine')} since "
                    f"{self.there.get('since')}: waiting until it ends, or is silent for {SILENT_S:.0f} s"
                )
                told = True
            time.sleep(POLL_S)

    def take(self, silent: Facts | None) -> bool:
        """Takes the folder if nobody has it, or who has it is dead or was silent for long; a part joins its leader."""
        taken = False

        def change(there: Facts | None) -> Facts | None:
            nonlocal taken
            self.there = there
            if there is not None and self.is_part and there.get("flow_run") == self.flow_run:
                taken = True
                return {**there, "beat": uuid4().hex}
            taken = there is None or there == silent or is_gone(str(there.get("process")))
            return self._record() if taken else None

        self._change(change)
        return taken

    def beat(self) -> None:
        """Says that this run still works here, or finds that it may not any more."""

        def change(there: Facts | None) -> Facts | None:
            others = there is not None and there.get("flow_run") != self.flow_run
            if others or (there is not None and not self.is_part and there.get("process") != self.process):
                assert there is not None
                self.lost = (
                    f"run_dir: {self.settings.run_dir} was taken over by another process, on {there.get('machine')} "
                    f"since {there.get('since')}, while this one was silent; let that one end, or give another folder"
                )
                return None
            self.there = there
            return self._record() if there is None else {**there, "beat": uuid4().hex}

        self._change(change)

    def _record(self) -> Facts:
        machine = f"{os.uname().nodename}, process {os.getpid()}"
        facts = {"flow_run": self.flow_run, "process": self.process, "machine": machine, "since": self.since}
        return {**facts, "beat": uuid4().hex}

    def _change(self, change: Callable[[Facts | None], Facts | None]) -> None:
        with self.changing:
            change_shared(self.runs, self.name, self.settings, change)
            self.beat_at = time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while the machine sleeps

    def beat_until(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_S) and not self.lost:
            try:
                self.beat()
            except Exception:  # whatever it was: a run that falls silent would lose its folder while it works
                continue  # the next beat, or the next thing that is sent, will tell

    def confirm(self) -> None:
        """Returns if nobody can have taken the folder over.

        Raises:
            RunError: If somebody has, or the bucket cannot be asked.
        """
        if time.clock_gettime(time.CLOCK_BOOTTIME) - self.beat_at > SILENT_S / 2:
            self.beat()
        if self.lost:
            raise RunError(self.lost)

    def free(self) -> None:
        """Lets others in; for a part of a run, whoever leads it does."""
        try:
            self.beat()  # after that nobody takes it for silent while it is removed
            if not self.lost and (self.there is None or self.there.get("process") == self.process):
                open_bucket(self.runs, self.settings).remove([self.name])
        except (PipelineError, OSError) as error:  # also of this machine, such as a full disk
            print(f"{error} (others wait {SILENT_S:.0f} s for this run now)")


def this_process() -> str:
    """Names this process among all that ever ran; empty where the system does not tell."""
    try:
        return f"{_kernel()} {os.getpid()} {_started(os.getpid())}"
    except OSError:
        return ""


def is_gone(process: str) -> bool:
    """Whether a process is known to have ended; of one on another machine or in another container nothing is known."""
    kernel, _, rest = process.partition(" ")
    number, _, started = rest.partition(" ")
    try:
        return bool(rest) and kernel == _kernel() and started != _started(int(number))
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _kernel() -> str:
    namespace = Path("/proc/self/ns/pid").readlink()
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{namespace}"


def _started(number: int) -> str:
    # Ticks since the boot; the name before it, in brackets, may hold anything. A zombie has ended.
    state, *fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return "" if state == "Z" else fields[18]
