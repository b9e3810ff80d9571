"""Name and tags of a flow run: its source, and the commit of the code."""

from functools import cache
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.context import FlowRunContext

from tasks.addresses import hide_keys, source_name
from tasks.runs.provenance import read_commit
from tasks.settings import Settings


def label_run() -> str:
    """Name of the flow run that is about to start, ``pipeline sample 360cf31e``; also adds its tags.

    Passed to a flow as its ``flow_run_name``: Prefect calls it after validating the parameters and before the flow
    runs, whether the flow was called, deployed, or restarted.
    """
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None and context.flow is not None
    source, commit = find_subject(context.parameters or {}), shorten_commit()
    assert isinstance(context.client, SyncPrefectClient)
    tags = {*context.flow_run.tags, f"source:{source}", f"commit:{commit}"}
    context.client.update_flow_run(context.flow_run.id, tags=sorted(tags))
    return f"{context.flow.name} {source_name(source)} {commit}"


def find_subject(parameters: dict[str, Any]) -> str:
    """The subject of a run: the X-rays or network it is given, the run it takes answers for, or its source."""
    settings = parameters["settings"]
    assert isinstance(settings, Settings)
    if given := parameters.get("images", parameters.get("model")):
        return hide_keys(str(given))
    return str(settings.run_dir) if "answers" in parameters else settings.public_source


@cache
def shorten_commit() -> str:
    """The first 8 digits of the commit, with ``-dirty`` if files differ from it."""
    commit, _, dirty = (read_commit() or "unknown").partition("-")
    return commit[:8] + ("-dirty" if dirty else "")
