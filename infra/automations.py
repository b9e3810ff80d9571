"""What the server does by itself: runs whose heart stopped are marked crashed and started again, failures are told.

A self-hosted server notices nothing of this unless such automations are made. They cover deployed runs only; a run
started from a command line is under somebody's eyes, and Prefect could not start it again.
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

# What a run may do instead of sending its next heartbeat. Final states that are missing here cost a failed action in
# the log, no more; the waiting ones (a person's answers, a restart) must be here, else a waiting run is crashed.
FINAL = ("Completed", "Nothing new", "Failed", "TimedOut", "Crashed", "Cancelled")
WAITING = ("Suspended", "Paused", "AwaitingRetry", "Scheduled")

RUNS = {"prefect.resource.id": "prefect.flow-run.*"}
OF_DEPLOYMENTS = ResourceSpecification(
    {"prefect.resource.role": "deployment", "prefect.resource.id": "prefect.deployment.*"}
)
EACH_RUN = {"prefect.resource.id"}


def mark_crashed(window_s: float) -> AutomationCore:
    """Marks a run as crashed that has sent no heartbeat for ``window_s`` seconds and did not stop."""
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
    """Schedules a crashed run again, at most ``RESTARTS`` times: the same run, so it goes on in its own run folder.

    The bound is the run's count of starts, which the server names with each change of state; a run that never started
    (count 0) is broken in a way that another try does not mend. It waits a little because a worker reports the crash
    of a process twice, a second or two apart: the later report would end the new process's run.
    """
    return AutomationCore(
        name=RESTART,
        description=f"Up to {RESTARTS} times; started again, a run goes on where it was.",
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
    said = "deployment.name ~ ': run ' ~ flow_run.name ~ ' is ' ~ flow_run.state.name ~ ', ' ~ flow_run.state.message"
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
        actions=[CallWebhook(block_document_id=webhook, payload=f'{{"text": {{{{ ({said}) | tojson }}}}}}')],
    )


def ensure_automation(client: SyncPrefectClient, wanted: AutomationCore) -> str:
    """Creates an automation, or corrects the one of that name; says what it did."""
    found = client.read_automations_by_name(wanted.name)
    if not found:
        client.create_automation(wanted)
        return "created"
    if AutomationCore.model_validate(found[0].model_dump()) == wanted:
        return "there already"
    client.update_automation(found[0].id, wanted)
    return "corrected"


def ensure_notification(client: SyncPrefectClient, url: str | None) -> str:
    """Creates, corrects or, without a ``url``, removes what tells of failures; says what it did."""
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
        # Chat services take {"text": …}; without the header some take it for a form.
        Webhook(url=SecretStr(url), headers={"Content-Type": "application/json"}).save(WEBHOOK, overwrite=True)
        known = read_webhook(client)
    assert known is not None, "it was saved just now"
    done = ensure_automation(client, notify_failed(known.id))
    return "corrected" if changed and done == "there already" else done


def read_webhook(client: SyncPrefectClient) -> BlockDocument | None:
    """The address that failures are told to, as the server keeps it."""
    try:
        return client.read_block_document_by_name(WEBHOOK, Webhook.get_block_type_slug(), include_secrets=True)
    except ObjectNotFound:
        return None
