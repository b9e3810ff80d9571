"""Training elsewhere: the train flow as a deployment, run by a worker with a GPU while this run waits."""

import time
from datetime import UTC, datetime
from itertools import count

from prefect import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

from tasks.errors import RunError, SettingsError
from tasks.settings import Settings

POLL_S = 5.0
RESTART_S = 60.0


def train_elsewhere(settings: Settings) -> None:
    """Trains the run by the deployment ``settings.train_on``, and waits for it.

    The key of the child depends on this run alone: if this run starts again from the top, because its worker died, it
    finds the child that is still training or done. A child that has failed by then is replaced by a new one.

    Raises:
        SettingsError: If there is no such deployment.
        RunError: If the training does not complete.
    """
    assert settings.train_on is not None
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None
    asked = datetime.now(UTC)
    for turn in count(1):
        child = _run_child(settings, settings.train_on, f"{context.flow_run.id}-train-{turn}")
        while _comes_back(child):
            child = _run_child(settings, settings.train_on, f"{context.flow_run.id}-train-{turn}")
        if child.state is not None and child.state.is_completed():
            return
        if child.end_time is not None and child.end_time < asked:
            continue
        ended = "without a state" if child.state is None else f"as {child.state.name}"
        raise RunError(
            f"train_on: the run {child.name} of {settings.train_on} ended {ended}; its log says why; the same "
            f"command with --run-dir {settings.run_dir} resumes it"
        )


def _comes_back(child: FlowRun) -> bool:
    """Whether a crashed training is started again: the server's automation does so within half a minute."""
    if child.state is None or not child.state.is_crashed():
        return False
    print(f"the run {child.name} crashed; waiting {RESTART_S:.0f} s for the server to start it again")
    end = time.monotonic() + RESTART_S
    with get_client(sync_client=True) as client:
        while time.monotonic() < end:
            state = client.read_flow_run(child.id).state
            if state is None or not state.is_crashed():
                return True
            time.sleep(POLL_S)
    return False


def _run_child(settings: Settings, deployment: str, key: str) -> FlowRun:
    try:
        found = run_deployment(
            deployment,
            parameters={"settings": settings.model_dump(mode="json")},
            idempotency_key=key,
            poll_interval=POLL_S,
        )
    except ObjectNotFound:
        raise SettingsError(
            f"train_on: the server has no deployment {deployment!r}; make deploy creates train/gpu, or leave the "
            "setting out to train in this process"
        ) from None
    assert isinstance(found, FlowRun)
    return found
