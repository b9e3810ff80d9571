"""Seal: ``run.json``, written last, says what made a run; a run folder without it is unfinished."""

import os
from pathlib import Path

from prefect import task

from tasks.files import write_json
from tasks.publishing.news import finished_path
from tasks.records import Facts
from tasks.runs.bucket import send
from tasks.runs.places import SEAL
from tasks.runs.provenance import describe_run
from tasks.runs.retries import AGAIN
from tasks.runs.run import Run


@task(name="seal", **AGAIN)
def seal(run: Run) -> Facts:
    """Writes ``run.json``, last of all, and leads ``data/runs/latest`` here."""
    record = describe_run(run)
    path = finished_path(run, record["source"]["sha256"])
    write_json(run.folder / SEAL, {**record, "news": path.stem})
    send(run, [SEAL])
    if not run.in_bucket:
        _lead_to(run.folder)
    return record


def _lead_to(run: Path) -> None:
    """Makes ``data/runs/latest`` lead to a run, where one may write there: a finished run does not fail for it."""
    runs = Path("data/runs")
    try:
        runs.mkdir(parents=True, exist_ok=True)
        beside = runs / f".latest.{os.getpid()}"
        beside.unlink(missing_ok=True)
        beside.symlink_to(os.path.relpath(run.resolve(), runs.resolve()))
        os.replace(beside, runs / "latest")
    except OSError as error:
        print(f"{runs / 'latest'} does not lead to this run: {error.strerror}")
