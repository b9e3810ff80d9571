"""Explain: LIME maps, report and the seal of a trained run folder. Runs on the CPU pool."""

from prefect import flow

from tasks.explanations import explain_images
from tasks.reports import write_report
from tasks.sealing import seal
from tasks.settings import Settings


@flow(name="explain", log_prints=True, validate_parameters=True)
def explain(settings: Settings) -> str:
    """Explains single answers, writes the report and seals the run; returns the report's address."""
    explain_images(settings)
    report = write_report(settings)
    seal(settings)
    return report
