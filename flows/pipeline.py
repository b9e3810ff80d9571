"""The whole job: prepare, train, explain; the one file that knows where training runs.

``python -m flows.pipeline --source sample`` runs it; every setting is a flag (``--help``).
"""

import sys
from datetime import UTC, datetime
from pathlib import Path

from prefect import State, flow
from prefect.states import Completed

from flows.command_line import run_command
from flows.explain import explain
from flows.prepare import prepare
from flows.train import train
from tasks.sealing import find_finished
from tasks.settings import Settings
from tasks.sources import source_name


@flow(name="pipeline", log_prints=True, validate_parameters=True)
def pipeline(settings: Settings = Settings()) -> "str | State[str]":
    """From an archive of chest X-rays to a classifier, its metrics and a report; returns the report's address."""
    if settings.ingestion.skip_unchanged and (report := find_finished(settings)):
        return Completed(name="Nothing new", message=f"nothing new since {report}", data=report)
    settings = with_run_folder(settings)
    prepare(settings)
    train(settings)
    return explain(settings)


def with_run_folder(settings: Settings) -> Settings:
    """The settings with a run folder: the one named, else ``data/runs/<UTC time>-<source>``."""
    if settings.run_dir is not None:
        return settings
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{source_name(settings.public_source)}"
    return settings.model_copy(update={"run_dir": str(Path("data/runs") / name)})


if __name__ == "__main__":
    sys.exit(run_command(pipeline, sys.argv[1:], "python -m flows.pipeline"))
