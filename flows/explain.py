"""Explain: LIME maps, audit, report, model card, seal and publishing of a trained run. Runs on the CPU pool."""

from prefect import flow

from flows.labels import label_run
from flows.run_folders import bring_run, own_run_folder
from flows.shards import explain_images, open_runner
from tasks.auditing import audit, require_passed
from tasks.model_card import write_card
from tasks.publishing import publish, weigh
from tasks.reports import write_report
from tasks.sealing import note_finished, seal
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
