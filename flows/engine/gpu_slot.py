"""A GPU never trains two models at once: a deployed training holds a slot of the server's limit ``gpu``."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_client
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from tasks.errors import SettingsError

LIMIT = "gpu"
LEASE_S = 300
"""How long a slot stays taken after its holder last renewed it at the server, which it does every 225 s.

A killed worker's slot is free after that time; a server may be away for up to the difference.
"""


@contextmanager
def gpu_slot() -> Iterator[None]:
    """Holds a slot, waiting for it as long as needed; a run that is not deployed needs no slot.

    The limit counts trainings wherever they run, also if two pools or two workers share a card. If the slot is lost
    during training, the training is stopped; it can be resumed from its last finished epoch.

    Raises:
        SettingsError: If the server has no such limit.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or run.deployment_id is None:
        yield
        return
    say_if_taken()
    with concurrency(LIMIT, occupy=1, lease_duration=LEASE_S, strict=True):
        yield


def say_if_taken() -> None:
    """Logs that the run is going to wait, if it is.

    Raises:
        SettingsError: If there is no limit.
    """
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            raise SettingsError(
                f"{LIMIT}: the server has no concurrency limit of this name, so two models could train on one GPU; "
                "create it with make deploy"
            ) from None
    if limit.active_slots >= limit.limit:
        print(f"another model trains: waiting for one of {limit.limit} slots of the limit {LIMIT}")
