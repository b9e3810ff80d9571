"""Seal: ``run.json``, written last, says what made a run; a run folder without it is unfinished."""

import os
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.provenance import describe_run
from tasks.records import Facts
from tasks.settings import Settings
from tasks.storage import SEAL, run_folder, write_json


@task(name="seal", cache_policy=NO_CACHE)
def seal(settings: Settings) -> Facts:
    """Writes ``run.json``, last of all, and leads ``data/runs/latest`` here."""
    run = run_folder(settings)
    record = describe_run(settings)
    write_json(run / SEAL, record)
    runs = Path("data/runs")
    runs.mkdir(parents=True, exist_ok=True)
    beside = runs / f".latest.{os.getpid()}"
    beside.symlink_to(os.path.relpath(run.resolve(), runs.resolve()))
    os.replace(beside, runs / "latest")
    return record
