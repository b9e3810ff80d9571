"""Shards of images, worked on side by side: by threads, by processes of this machine, or by a Dask cluster.

Packing, screening and explaining are three steps each: a task plans which shards are still to be done, task runs do
them where ``scaling.runner`` says, and the stage itself gathers what they left in the cache. Nothing but addresses and
settings goes to a shard's task run, and nothing comes back.
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
"""Task runs that one stage is spread over at most: each costs the server some milliseconds, and SQLite's patience."""
CONNECT_S = 10.0


def do_shards(runner: TaskRunner[Any], done: str, task: Task[..., Any], shards: Sequence[Any], **same: object) -> None:
    """Has task runs do shards, at most ``MOST_RUNS`` of them; a shard that fails raises here what it raised there.

    Args:
        runner: Where.
        done: What was done with them, for people.
        task: Takes some of the shards as ``shards``.
        shards: The argument of each.
        same: The other arguments, the same for all.
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
            f"scaling.runner: the Dask cluster gave up ({type(error).__name__}: workers died, or left); look at its "
            "log and give the same command again, finished shards are kept"
        ) from None


def deal_out(shards: Sequence[Any], most: int) -> list[list[Any]]:
    """Shards in at most ``most`` groups of neighbours, as even as can be."""
    n = min(most, len(shards))
    edges = [round(turn * len(shards) / n) for turn in range(n + 1)]
    return [list(shards[start:end]) for start, end in pairwise(edges)]


# -- where -------------------------------------------------------------------------------------------------------------


@contextmanager
def open_runner(how: ScalingSettings) -> Iterator[TaskRunner[Any]]:
    """The task runner that ``scaling.runner`` names, ready for use; a Dask cluster of its own starts when first needed.

    Opened inside a flow, because a deployed flow would bring along the runner it was decorated with.

    Raises:
        SettingsError: If prefect-dask is not installed, or no scheduler answers.
    """
    n_workers = how.n_workers or os.cpu_count() or 1
    if how.runner == "threads":
        with ThreadPoolTaskRunner[Any](max_workers=n_workers) as runner:
            yield runner
        return
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise SettingsError(
            f"scaling.runner: {how.runner} needs prefect-dask ({error.name} is missing); install requirements.txt, or "
            "choose threads"
        ) from None
    logging.getLogger("distributed").setLevel(logging.ERROR)  # else each connection that opens or closes is a line
    if how.reaches_out:
        _greet_scheduler(how.runner)
        dask = DaskTaskRunner(address=how.runner)
    else:
        # One thread a process: networks of two shards do not get in each other's way. No limit on memory, since
        # Dask would end processes over it; its web page at any free port.
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
    """Has workers report to the temporary server of this process; each would start one of its own otherwise."""
    if PREFECT_API_URL.value():
        yield
        return
    with get_client(sync_client=True) as client, temporary_settings({PREFECT_API_URL: str(client.api_url)}):
        yield
