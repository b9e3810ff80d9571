"""The default run folder, and the lock that keeps other runs out of it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path

from prefect import task
from prefect.context import FlowRunContext

from tasks.addresses import source_name
from tasks.devices.answers import share_answers
from tasks.files import locked
from tasks.runs.bucket import claim_run, fetch_run
from tasks.runs.retries import retries_of
from tasks.runs.run import Run
from tasks.settings import Settings

HELD: ContextVar[frozenset[Path]] = ContextVar("HELD", default=frozenset())
"""Resolved paths of the run folders that this flow, or one that called it, has locked."""


def with_run_folder(settings: Settings) -> Settings:
    """The settings with a run folder: the one given, else ``<UTC time>-<source>`` in the folder of runs.

    The folder of runs is ``data/runs``, or the address in a bucket that ends in a slash.

    The time is when the run was due. It stays the same when the run starts again from the top: resumed after a
    person's answers, or restarted after its worker died.
    """
    runs = "data/runs/" if settings.run_dir is None else settings.run_dir
    if not (settings.run_dir is None or (Run(settings).in_bucket and runs.endswith("/"))):
        return settings
    context = FlowRunContext.get()
    due = context.flow_run.expected_start_time if context and context.flow_run else None
    name = f"{(due or datetime.now(UTC)).astimezone(UTC):%Y%m%dT%H%M%SZ}-{source_name(settings.public_source)}"
    return settings.model_copy(update={"run_dir": runs + name})


@contextmanager
def own_run_folder(run: Run) -> Iterator[None]:
    """Keeps other runs on this machine out of the run folder until the block ends; waits while another works there.

    Subflows of a run, and trainings that it waits for, share its folder. If two machines work on a run in a bucket, the
    one that started last continues; the other can send nothing any more and fails.

    Raises:
        RunError: If the bucket cannot be used.
    """
    context = FlowRunContext.get()
    is_part = bool(context and context.flow_run and context.flow_run.parent_task_run_id)
    folder = Path(os.path.realpath(run.folder))  # one lock per folder, also if links lead to it
    if folder in HELD.get():
        yield
        return
    before = HELD.set(HELD.get() | {folder})
    try:
        with ExitStack() as held:
            if not is_part:
                held.enter_context(_lock_here(folder))
            if run.in_bucket:
                held.enter_context(claim_run(run, is_part))
            yield
    finally:
        HELD.reset(before)


@contextmanager
def _lock_here(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / f".{folder.name}.lock"):
            for left in folder.rglob("*.partial"):  # of a process that was killed while it wrote
                if left.is_file():  # a folder of this name is unfinished work to resume, if the cache lies here
                    left.unlink()
            yield
    finally:
        with suppress(OSError):  # leaves nothing of a run that was refused before it wrote anything
            folder.rmdir()


def bring_run(run: Run) -> None:
    """Syncs a run in a bucket, and the answers beside it, to this machine, in a task that Prefect retries."""
    if run.in_bucket:
        bring_here.with_options(**retries_of(run.settings.ingestion))(run)


@task(name="fetch run")
def bring_here(run: Run) -> None:
    """The task of ``bring_run``; answers that come in later are used by the next run."""
    fetch_run(run)
    share_answers(run)
