"""Explain: LIME maps, audit, report, model card, seal and publishing of a trained run. Runs on the CPU pool."""

import os

from prefect import flow, unmapped
from prefect.task_runners import ThreadPoolTaskRunner

from tasks.auditing import audit, require_passed
from tasks.explanations import explain_shard, gather_explanations, plan_explanations
from tasks.model_card import write_card
from tasks.publishing import publish, weigh
from tasks.reports import write_report
from tasks.run_copies import fetch_run
from tasks.sealing import note_finished, seal
from tasks.settings import Settings


@flow(
    name="explain",
    log_prints=True,
    validate_parameters=True,
    task_runner=ThreadPoolTaskRunner(max_workers=os.cpu_count() or 1),  # type: ignore[arg-type]
)
def explain(settings: Settings) -> str:
    """Explains single answers, audits, reports, seals the run and may publish it; returns the report's address."""
    fetch_run(settings)
    shards = plan_explanations(settings)
    explain_shard.map(unmapped(settings), shards).result()
    gather_explanations(settings)
    audit(settings)
    weigh(settings)
    report = write_report(settings)
    write_card(settings)
    require_passed(settings)
    seal(settings)
    publish(settings)
    note_finished(settings)  # after publishing: a run killed before it is not taken for done
    return report
