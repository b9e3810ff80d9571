"""Parallel work on shards of images: by threads, by processes of this machine, or by a Dask cluster.

Packing, screening and explaining have three steps each: a task plans which shards are still to do, task runs do them
where ``scaling.runner`` says, and the stage itself gathers the results from the cache. A shard's task run receives only
addresses and settings, and returns nothing.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from prefect import Task, get_client, unmapped
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from tasks.errors import RunError, SettingsError
from tasks.runs.artifacts import Progress
from tasks.settings import ScalingSettings

MOST_RUNS = 60
"""Most task runs per stage: each costs the server some milliseconds and SQLite a write."""
CONNECT_S = 10.0


def do_shards(runner: TaskRunner[Any], done: str, task: Task[..., Any], shards: Sequence[Any], **same: object) -> None:
    """Does shards in at most ``MOST_RUNS`` task runs; the error of a failed shard is raised here.

    Args:
        runner: Runs them.
        done: The verb for log and progress, such as ``packed``.
        task: Takes some of the shards as ``shards``.
        shards: The shards.
        same: Other arguments of the task.
    """
    if not shards:
        return
    progress = Progress(done, f"Shards that are {done}")
    groups = deal_out(shards, MOST_RUNS)
    others = {name: unmapped(value) for name, value in same.items()}
    try:
        futures = runner.map(task, {**others, "shards": groups})
        n_done = 0
        for turn, (group, future) in enumerate(zip(groups, futures, strict=True), start=1):
            future.result()
            n_done += len(group)
            progress.show(n_done, len(shards))
            if turn % 10 == 0 or n_done == len(shards):
                print(f"{done} {n_done:,} of {len(shards):,} shards")
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "distributed":
            raise
        raise RunError(
            f"scaling.runner: the Dask cluster gave up ({type(error).__name__}: workers died, or left); check its "
            "log and give the same command again, finished shards are kept"
        ) from None


def deal_out(shards: Sequence[Any], most: int) -> list[list[Any]]:
    """Shards in at most ``most`` groups of neighbours, of nearly equal size."""
    n = min(most, len(shards))
    edges = [round(turn * len(shards) / n) for turn in range(n + 1)]
    return [list(shards[start:end]) for start, end in pairwise(edges)]


# -- where -------------------------------------------------------------------------------------------------------------


@contextmanager
def open_runner(scaling: ScalingSettings) -> Iterator[TaskRunner[Any]]:
    """The task runner that ``scaling.runner`` names, ready for use; a local Dask cluster starts when first needed.

    Opened inside a flow, because a deployed flow would use the runner it was decorated with.

    Raises:
        SettingsError: If prefect-dask is not installed, or no scheduler answers.
    """
    n_workers = scaling.n_workers or os.cpu_count() or 1
    if scaling.runner == "threads":
        with ThreadPoolTaskRunner[Any](max_workers=n_workers) as runner:
            yield runner
        return
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise SettingsError(
            f"scaling.runner: {scaling.runner} needs prefect-dask ({error.name} is missing); install requirements.txt, "
            "or choose threads"
        ) from None
    logging.getLogger("distributed").setLevel(logging.ERROR)  # otherwise it logs each connection that opens or closes
    if scaling.reaches_out:
        _greet_scheduler(scaling.runner)
        dask = DaskTaskRunner(address=scaling.runner)
    else:
        # One thread per process, so that networks of two shards do not compete. No limit on memory, at which Dask
        # would end processes; its web page is at any free port.
        page = "127.0.0.1:0"
        cluster = {"n_workers": n_workers, "threads_per_worker": 1, "memory_limit": 0, "dashboard_address": page}
        dask = DaskTaskRunner(cluster_kwargs=cluster)
    with _one_server(), dask as runner:
        yield runner


def _greet_scheduler(address: str) -> None:
    from distributed import Client

    try:
        with Client(address, timeout=CONNECT_S, set_as_default=False) as client:
            n_workers = len(client.scheduler_info(n_workers=-1)["workers"])
    except OSError:
        raise SettingsError(
            f"scaling.runner: no Dask scheduler answers at {address}; start one (dask scheduler), or choose dask or "
            "threads"
        ) from None
    print(f"the Dask cluster at {address} has {n_workers} workers" + ("" if n_workers else "; shards wait for one"))


@contextmanager
def _one_server() -> Iterator[None]:
    """Makes workers report to the temporary server of this process; otherwise each would start its own."""
    if PREFECT_API_URL.value():
        yield
        return
    with get_client(sync_client=True) as client, temporary_settings({PREFECT_API_URL: str(client.api_url)}):
        yield
