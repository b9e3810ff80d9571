"""Explain: LIME maps, report, model card and the seal of a trained run folder. Runs on the CPU pool."""

from prefect import flow

from tasks.explanations import explain_images
from tasks.model_card import write_card
from tasks.reports import write_report
from tasks.sealing import seal
from tasks.settings import Settings


@flow(name="explain", log_prints=True, validate_parameters=True)
def explain(settings: Settings) -> str:
    """Explains single answers, writes report and model card, and seals the run; returns the report's address."""
    explain_images(settings)
    report = write_report(settings)
    write_card(settings)
    seal(settings)
    return report
