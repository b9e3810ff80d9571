"""A GPU never trains two models: a deployed training holds a slot of the server's limit ``gpu`` while it works."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_client
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from tasks.errors import SettingsError

LIMIT = "gpu"
LEASE_S = 300
"""How long a slot stays taken after its holder last spoke to the server, which it does every 225 s.

A killed worker's slot is free after that time; a server that is away for less than the difference costs nothing.
"""


@contextmanager
def gpu_slot() -> Iterator[None]:
    """Holds a slot, waiting for it as long as it takes; a run that is not deployed has this machine to itself.

    The limit counts trainings, wherever they run: it holds also where two pools or two workers share a card. Should
    the slot be lost while the training works, the training is stopped: it goes on from its last whole epoch.

    Raises:
        SettingsError: If the server has no such limit; without it nothing would be limited.
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
    """Says that the run is going to wait, where it is.

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
