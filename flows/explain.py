"""Explain: LIME maps, audit, report, model card, seal and publishing of a trained run. Runs on the CPU pool."""

from typing import Any

from prefect import flow
from prefect.task_runners import TaskRunner

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
from tasks.settings import Settings


@flow(name="explain", flow_run_name=label_run, log_prints=True, validate_parameters=True)
def explain(settings: Settings) -> str:
    """Explains single answers, audits, reports, seals the run and may publish it; returns the report's address."""
    with own_run_folder(settings):
        bring_run(settings)
        with open_runner(settings) as runner:
            explain_images(runner, settings)
        audit(settings)
        weigh(settings)
        report = write_report(settings)
        write_card(settings)
        require_passed(settings)
        seal(settings)
        publish(settings)
        note_finished(settings)  # after publishing: a run killed before it is not taken for done
        return report


def explain_images(runner: TaskRunner[Any], settings: Settings) -> None:
    """Explains the chosen images that no run explained before."""
    do_shards(runner, "explained", explain_shards, plan_explanations(settings), settings=settings)
    gather_explanations(settings)
