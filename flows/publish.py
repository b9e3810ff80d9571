"""Publish: shows which run is published, rolls back to the one before, or publishes a finished run. On the CPU pool.

``python -m flows.publish --run-dir data/runs`` prints the address of the published run as its last line.
"""

import sys

from prefect import flow
from pydantic import BaseModel, Field

from flows.engine.command_line import run_command
from tasks.addresses import Place
from tasks.errors import SettingsError
from tasks.publishing import published as publishing
from tasks.settings import Settings


class PublishFlags(BaseModel):
    """Shows which run is published; --run-dir names the folder of runs (s3://bucket/runs/) or any run in it."""

    roll_back: bool = Field(False, description="Publish again what was published before.")
    to: Place | None = Field(
        None, min_length=1, description="Publish this finished run of the folder, by the rules of publishing."
    )


@flow(name="publish", log_prints=True, validate_parameters=True)
def publish(settings: Settings = Settings(), roll_back: bool = False, to: Place | None = None) -> str:
    """Shows or changes the published run among the runs of ``settings.run_dir``; returns its address.

    Raises:
        SettingsError: If both are asked for, or the run is not one of these.
        RunError: If no run is published, or none was before, or the run lacks its model, or the rules refuse it.
    """
    if roll_back and to is not None:
        raise SettingsError("to: a rollback goes to the run that was published before; give --roll-back or --to RUN")
    runs = publishing.find_runs(settings)
    if roll_back:
        return publishing.roll_back(runs, settings)
    return publishing.look_up(runs, settings) if to is None else publishing.publish_by_hand(to, runs, settings)


if __name__ == "__main__":
    sys.exit(run_command(publish, sys.argv[1:], "python -m flows.publish", PublishFlags))
