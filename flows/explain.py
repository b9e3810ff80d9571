"""Explain: LIME maps, audit, report, model card, seal and publishing of a trained run. Runs on the CPU pool.

``python -m flows.explain --run-dir RUN`` does it alone, and prints the report's address.
"""

import sys
from typing import Any

from prefect import flow
from prefect.task_runners import TaskRunner

from flows.engine.command_line import run_command
from flows.engine.labels import label_run
from flows.engine.run_folders import bring_run, own_run_folder
from flows.engine.runners import do_shards, open_runner
from tasks.explaining.auditing import audit, require_passed
from tasks.explaining.explanations import explain_shards, gather_explanations, plan_explanations
from tasks.publishing.news import note_finished
from tasks.publishing.published import publish, weigh
from tasks.publishing.sealing import seal
from tasks.reporting.model_card import write_card
from tasks.reporting.report import write_report
from tasks.runs.run import Run
from tasks.settings import Settings


@flow(name="explain", flow_run_name=label_run, log_prints=True, validate_parameters=True)
def explain(settings: Settings) -> str:
    """Explains images, audits, reports, seals the run and may publish it; returns the report's address."""
    run = Run(settings)
    with own_run_folder(run):
        bring_run(run)
        with open_runner(settings.scaling) as runner:
            explain_images(runner, run)
        audit(run)
        weigh(run)
        report = write_report(run)
        write_card(run)
        require_passed(run)
        seal(run)
        publish(run)
        note_finished(run)  # after publishing: a run killed before that does not count as finished
        return report


def explain_images(runner: TaskRunner[Any], run: Run) -> None:
    """Explains the chosen images that are not in the cache."""
    do_shards(runner, "explained", explain_shards, plan_explanations(run), run=run)
    gather_explanations(run)


if __name__ == "__main__":
    sys.exit(run_command(explain, sys.argv[1:], "python -m flows.explain"))
