"""What the engine costs: a small run through a real server, against the same functions called directly."""

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.settings import Settings

ROUNDS = 3
SMALL = {
    "sample": {"n_images": 60, "side_px": 128},
    "training": {"epochs": 1, "n_models": 1},
    "explanation": {"n_images": 4, "n_samples": 64, "n_repeated": 0},
}
LIMIT_S, LIMIT_SHARE = 6.0, 0.05


def main() -> None:
    """Prints ``{"bench": "orchestration", "overhead_s", "direct_s", "through_s", "server_start_s", …}``: medians.

    Both ways run by turns in one process that has imported everything, each into an empty cache.
    """
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
        folder = Path(place)
        with running_server(folder / "server") as (url, server_start_s):
            os.environ["PREFECT_API_URL"] = url  # before anything imports Prefect
            run_directly(settings_of(folder, "first"))
            run_through(settings_of(folder, "second"))
            seconds: dict[str, list[float]] = {"direct": [], "through": []}
            cpu_s: dict[str, list[float]] = {"direct": [], "through": []}
            for turn in range(ROUNDS):
                for kind, run in (("direct", run_directly), ("through", run_through)):
                    settings = settings_of(folder, f"{kind}-{turn}")
                    start, start_cpu = time.perf_counter(), time.process_time()
                    run(settings)
                    seconds[kind].append(time.perf_counter() - start)
                    cpu_s[kind].append(time.process_time() - start_cpu)
    direct_s, through_s = (statistics.median(seconds[kind]) for kind in ("direct", "through"))
    result = {
        "bench": "orchestration",
        "overhead_s": round(through_s - direct_s, 2),
        "direct_s": round(direct_s, 2),
        "through_s": round(through_s, 2),
        "server_start_s": round(server_start_s, 2),
        "limit_s": round(LIMIT_S + LIMIT_SHARE * direct_s, 2),
        "direct_all_s": [round(value, 2) for value in seconds["direct"]],
        "through_all_s": [round(value, 2) for value in seconds["through"]],
        # Of this process: tells on a busy machine how much of it is the engine's, and how much waiting.
        "direct_cpu_s": round(statistics.median(cpu_s["direct"]), 2),
        "through_cpu_s": round(statistics.median(cpu_s["through"]), 2),
        "rounds": ROUNDS,
    }
    print(json.dumps(result), flush=True)


def settings_of(folder: Path, name: str) -> "Settings":
    """The small run in a folder, and with a cache, of its own."""
    from tasks.settings import Settings

    storage = {"cache": str(folder / name / "cache"), "raw": str(folder / "raw")}
    return Settings.model_validate({**SMALL, "run_dir": str(folder / name / "run"), "storage": storage})


def run_through(settings: "Settings") -> None:
    """The pipeline as a flow run on the server."""
    from flows.pipeline import pipeline

    pipeline(settings)


def run_directly(settings: "Settings") -> None:
    """The same functions in the same order, on as many threads, without an engine."""
    from flows.pipeline import pipeline

    with without_engine():
        pipeline.fn(settings)


@contextlib.contextmanager
def without_engine() -> Iterator[None]:
    """Makes flows and tasks, as the flows name them, the plain functions that they wrap."""
    from prefect import Flow, Task

    import flows.engine.runners
    import flows.explain
    import flows.pipeline
    import flows.prepare
    import flows.train

    modules = (flows.pipeline, flows.prepare, flows.train, flows.explain, flows.engine.runners)
    kept = [(module, name, value) for module in modules for name, value in vars(module).items()]
    wrapped = [(module, name, value) for module, name, value in kept if isinstance(value, Flow | Task)]
    for module, name, value in wrapped:
        setattr(module, name, value.fn)
    real = flows.engine.runners.do_shards
    for flow in (flows.prepare, flows.explain):
        flow.do_shards = do_directly  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for flow in (flows.prepare, flows.explain):
            flow.do_shards = real  # type: ignore[attr-defined]
        for module, name, value in wrapped:
            setattr(module, name, value)


def do_directly(runner: Any, done: str, task: Any, shards: Sequence[Any], **same: Any) -> None:
    """``flows.engine.runners.do_shards`` without task runs."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(partial(call, task, same), shards))


def call(task: Any, same: dict[str, Any], shard: Any) -> None:
    """One shard."""
    task(**same, shards=[shard])


@contextlib.contextmanager
def running_server(home: Path) -> Iterator[tuple[str, float]]:
    """A Prefect server in a process and with a database of its own: its address, and how long it took to start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"} | own
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    start = time.perf_counter()
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/api"
    try:
        while not is_healthy(url):
            if server.poll() is not None or time.perf_counter() - start > 300:
                raise RuntimeError("the Prefect server did not start")
            time.sleep(0.1)
        yield url, time.perf_counter() - start
    finally:
        server.terminate()
        server.wait(timeout=60)


def is_healthy(url: str) -> bool:
    """Whether a server answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    main()
    os._exit(0)  # what Prefect has still to tell would wait for minutes for the server, which has ended
