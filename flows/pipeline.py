"""The whole pipeline: prepare, train, explain; the one file that decides where training runs.

``python -m flows.pipeline --source sample`` runs it; every setting is a flag (``--help``).
"""

import sys

from prefect import State, flow
from prefect.states import Completed

from flows.engine.command_line import run_command
from flows.engine.labels import label_run
from flows.engine.remote_training import train_elsewhere
from flows.engine.run_folders import own_run_folder, with_run_folder
from flows.explain import explain
from flows.prepare import prepare
from flows.review import can_wait, wait_for_answers
from flows.train import train
from tasks.devices.contact_sheet import count_doubtful
from tasks.errors import SettingsError
from tasks.publishing.news import find_finished
from tasks.runs.run import Run
from tasks.settings import Settings
from tasks.sources.fetching import fetch


@flow(name="pipeline", flow_run_name=label_run, log_prints=True, validate_parameters=True)
def pipeline(settings: Settings = Settings()) -> "str | State[str]":
    """From an archive of chest X-rays to a classifier, its metrics and a report; returns the report's address."""
    if settings.screening.wait_for_review and not can_wait():
        raise SettingsError(
            "screening.wait_for_review: only a deployed run can wait for a person; start a deployment, or leave the "
            "setting out, take answers with python -m flows.review and give the same command again"
        )
    if settings.ingestion.skip_unchanged and (report := find_finished(Run(settings), fetch(settings).sha256)):
        return Completed(name="Nothing new", message=f"nothing new since {report}", data=report)
    asked, settings = settings, with_run_folder(settings)
    if settings is not asked:
        print(f"the run folder is {settings.run_dir}")
    run = Run(settings)
    with own_run_folder(run):
        prepare(settings)
        if settings.screening.wait_for_review and count_doubtful(run):
            wait_for_answers(run)
            prepare(settings)
        if settings.train_on:
            train_elsewhere(settings)
        else:
            train(settings)
        report = explain(settings)
    print(f"done: the report is {report}")  # in this run's own log; earlier lines are in the logs of its subflows
    return report


if __name__ == "__main__":
    sys.exit(run_command(pipeline, sys.argv[1:], "python -m flows.pipeline"))
