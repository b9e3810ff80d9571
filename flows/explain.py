"""Explain: LIME maps, audit, report, model card and the seal of a trained run folder. Runs on the CPU pool."""

import os

from prefect import flow, unmapped
from prefect.task_runners import ThreadPoolTaskRunner

from tasks.auditing import audit, require_passed
from tasks.explanations import explain_shard, gather_explanations, plan_explanations
from tasks.model_card import write_card
from tasks.reports import write_report
from tasks.run_copies import fetch_run
from tasks.sealing import seal
from tasks.settings import Settings


@flow(
    name="explain",
    log_prints=True,
    validate_parameters=True,
    task_runner=ThreadPoolTaskRunner(max_workers=os.cpu_count() or 1),  # type: ignore[arg-type]
)
def explain(settings: Settings) -> str:
    """Explains single answers, audits, writes report and model card, seals the run; returns the report's address."""
    fetch_run(settings)
    shards = plan_explanations(settings)
    explain_shard.map(unmapped(settings), shards).result()
    gather_explanations(settings)
    audit(settings)
    report = write_report(settings)
    write_card(settings)
    require_passed(settings)
    seal(settings)
    return report
