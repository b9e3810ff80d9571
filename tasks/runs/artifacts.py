"""Prefect artifacts of a run: tables, text, links and progress. Outside of a run these functions do nothing.

If the server cannot be reached, the artifact is missing and the run continues.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import FlowRunContext, TaskRunContext


def in_run() -> bool:
    """Whether the code runs inside a Prefect flow or task run."""
    return TaskRunContext.get() is not None or FlowRunContext.get() is not None


@contextmanager
def if_reachable(key: str) -> Iterator[None]:
    """Continues without the artifact of the block if the server cannot be reached after Prefect's own retries."""
    try:
        yield
    except httpx.HTTPError as error:
        print(f"{key} is not shown in Prefect's page: the server cannot be reached ({type(error).__name__})")


def show_table(key: str, rows: Sequence[dict[str, Any]], description: str) -> None:
    """Shows rows as a table artifact; ``key`` in lower case letters, digits and dashes."""
    if in_run():
        with if_reachable(key):
            create_table_artifact(key=_slug(key), table=[dict(row) for row in rows], description=description)


def show_markdown(key: str, text: str, description: str) -> None:
    """Shows Markdown as an artifact."""
    if in_run():
        with if_reachable(key):
            create_markdown_artifact(key=_slug(key), markdown=text, description=description)


def show_link(key: str, address: str, description: str) -> None:
    """Shows a link to a file of a run, at an absolute path or in a bucket."""
    if in_run():
        with if_reachable(key):
            create_link_artifact(key=_slug(key), link=to_link(address), link_text=address, description=description)


def to_link(address: str) -> str:
    """The link for a browser: an object on its server or, without an own endpoint, in the AWS console; a file as is."""
    if not address.startswith("s3://"):
        return Path(address).as_uri()
    bucket, _, key = address.removeprefix("s3://").partition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        return f"{endpoint.rstrip('/')}/{bucket}/{quote(key)}"
    return f"https://console.aws.amazon.com/s3/object/{bucket}?prefix={quote(key)}"


class Progress:
    """A progress artifact, in percent."""

    def __init__(self, key: str, description: str) -> None:
        self._key = key
        self._id: UUID | None = None
        if in_run():
            with if_reachable(key):
                made = create_progress_artifact(progress=0.0, key=_slug(key), description=description)
                self._id = made if isinstance(made, UUID) else None

    def show(self, done: float, total: float) -> None:
        """Moves the bar to ``done`` of ``total``."""
        if self._id is not None:
            with if_reachable(self._key):
                update_progress_artifact(self._id, progress=round(100.0 * done / max(total, 1e-9), 1))


def show_bytes(verb: str, done: int = 0) -> Callable[[int, int], None]:
    """Returns a function that logs progress at each quarter and every 10 s; ``done`` bytes were there already."""
    last = {"done": done, "time": time.monotonic()}

    def show(done: int, total: int) -> None:
        share = 4 / max(total, 1)
        if int(done * share) > int(last["done"] * share) or time.monotonic() - last["time"] > 10:
            last.update(done=done, time=time.monotonic())
            print(f"{verb} {done / 1e6:,.1f} of {total / 1e6:,.1f} MB ({25 * share * done:.0f} %)")

    return show


def _slug(key: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")
