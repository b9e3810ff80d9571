"""Automations of the server: runs without a heartbeat are marked crashed and restarted, failures are reported.

A self-hosted server does none of this without such automations. They cover deployed runs only; a run started from a
command line is watched by a person, and Prefect could not restart it.
"""

from datetime import timedelta
from uuid import UUID

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import BlockDocument, StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from pydantic import SecretStr

MARK, RESTART, NOTIFY = "Crash runs without a heartbeat", "Start crashed runs again", "Notify of failed runs"
WEBHOOK = "failed-runs"
RESTARTS = 3
RESTART_AFTER_S = 15.0

# States that a run may enter instead of sending its next heartbeat. A final state missing here costs only a failed
# action in the log. The waiting ones (for answers, for a restart) must be here, else a waiting run is marked crashed.
FINAL = ("Completed", "Nothing new", "Failed", "TimedOut", "Crashed", "Cancelled")
WAITING = ("Suspended", "Paused", "AwaitingRetry", "Scheduled")

RUNS = {"prefect.resource.id": "prefect.flow-run.*"}
OF_DEPLOYMENTS = ResourceSpecification(
    {"prefect.resource.role": "deployment", "prefect.resource.id": "prefect.deployment.*"}
)
EACH_RUN = {"prefect.resource.id"}


def mark_crashed(window_s: float) -> AutomationCore:
    """Marks a run as crashed if it has sent no heartbeat for ``window_s`` seconds and did not stop."""
    return AutomationCore(
        name=MARK,
        description=f"No heartbeat for {window_s:g} s: its worker or machine is gone.",
        trigger=EventTrigger(
            match=ResourceSpecification(RUNS),
            match_related=OF_DEPLOYMENTS,
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{name}" for name in FINAL + WAITING)},
            for_each=EACH_RUN,
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=window_s),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=f"no heartbeat for {window_s:g} s")],
    )


def restart_crashed(after_s: float = RESTART_AFTER_S) -> AutomationCore:
    """Restarts a crashed run, at most ``RESTARTS`` times: it is the same run, so it resumes in its own run folder.

    The limit is on the run's count of starts, which the server sends with each change of state. A run that never
    started (count 0) is not retried: a retry would not help. It waits a little because a worker reports the crash of a
    process twice, a second or two apart: the later report would end the new process's run.
    """
    return AutomationCore(
        name=RESTART,
        description=f"Up to {RESTARTS} times; a restarted run resumes where it was.",
        trigger=EventTrigger(
            match=ResourceSpecification({**RUNS, "prefect.run-count": [str(n + 1) for n in range(RESTARTS)]}),
            match_related=OF_DEPLOYMENTS,
            after={"prefect.flow-run.Crashed"},
            expect={f"prefect.flow-run.{name}" for name in ("AwaitingRetry", "Scheduled", "Pending", "Running")},
            for_each=EACH_RUN,
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=after_s),
        ),
        actions=[ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message="crashed, starts again")],
    )


def notify_failed(webhook: UUID) -> AutomationCore:
    """Calls a webhook when a deployed run fails or crashes, once a minute and run at most."""
    text = "deployment.name ~ ': run ' ~ flow_run.name ~ ' is ' ~ flow_run.state.name ~ ', ' ~ flow_run.state.message"
    return AutomationCore(
        name=NOTIFY,
        description="Calls NOTIFY_WEBHOOK as it was when the server was made ready.",
        trigger=EventTrigger(
            match=ResourceSpecification({**RUNS, "prefect.state-type": ["FAILED", "CRASHED"]}),
            match_related=OF_DEPLOYMENTS,
            expect={"prefect.flow-run.*"},
            for_each=EACH_RUN,
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(minutes=1),
        ),
        actions=[CallWebhook(block_document_id=webhook, payload=f'{{"text": {{{{ ({text}) | tojson }}}}}}')],
    )


def ensure_automation(client: SyncPrefectClient, wanted: AutomationCore) -> str:
    """Creates an automation, or corrects the one of that name; returns what it did."""
    found = client.read_automations_by_name(wanted.name)
    if not found:
        client.create_automation(wanted)
        return "created"
    if AutomationCore.model_validate(found[0].model_dump()) == wanted:
        return "there already"
    client.update_automation(found[0].id, wanted)
    return "corrected"


def ensure_notification(client: SyncPrefectClient, url: str | None) -> str:
    """Creates, corrects or, without a ``url``, removes the notification of failures; returns what it did."""
    known = read_webhook(client)
    if url is None:
        for automation in client.read_automations_by_name(NOTIFY):
            client.delete_automation(automation.id)
        if known is None:
            return "none, since NOTIFY_WEBHOOK is not set"
        client.delete_block_document(known.id)
        return "removed, since NOTIFY_WEBHOOK is not set"
    changed = known is None or known.data["url"] != url
    if changed:
        # Chat services take {"text": …}; without the header some read it as a form.
        Webhook(url=SecretStr(url), headers={"Content-Type": "application/json"}).save(WEBHOOK, overwrite=True)
        known = read_webhook(client)
    assert known is not None, "it was saved just now"
    done = ensure_automation(client, notify_failed(known.id))
    return "corrected" if changed and done == "there already" else done


def read_webhook(client: SyncPrefectClient) -> BlockDocument | None:
    """The webhook that failures are reported to, as the server stores it."""
    try:
        return client.read_block_document_by_name(WEBHOOK, Webhook.get_block_type_slug(), include_secrets=True)
    except ObjectNotFound:
        return None
