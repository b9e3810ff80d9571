"""Seal: ``run.json``, written last, says what made a run; a run folder without it is unfinished."""

import os
from pathlib import Path

from prefect import task

from tasks.files import write_json
from tasks.publishing.news import _finished_path
from tasks.records import Facts
from tasks.runs.bucket import send
from tasks.runs.places import SEAL, is_in_bucket, run_folder
from tasks.runs.provenance import describe_run
from tasks.runs.retries import AGAIN
from tasks.settings import Settings


@task(name="seal", **AGAIN)
def seal(settings: Settings) -> Facts:
    """Writes ``run.json``, last of all, and leads ``data/runs/latest`` here."""
    run = run_folder(settings)
    record = describe_run(settings)
    path = _finished_path(settings, record["source"]["sha256"])
    write_json(run / SEAL, {**record, "news": path.stem})
    send(settings, [SEAL])
    if not is_in_bucket(settings):
        _lead_to(run)
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
