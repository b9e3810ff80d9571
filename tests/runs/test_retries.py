"""Prefect tries a task again when the outside failed, and never when only the user can help."""

import errno

import pytest
from prefect import task

from tasks.errors import OutsideError, RunError, SettingsError
from tasks.runs.retries import outside_failed

pytestmark = pytest.mark.usefixtures("prefect_engine")


@pytest.mark.parametrize(
    ("error", "n_tries"),
    [
        (ConnectionResetError("the network"), 3),
        (OSError(errno.EIO, "the disk of a server"), 3),
        (RuntimeError("anything else"), 3),
        (OutsideError("a server is away"), 3),
        (SettingsError("a setting does not fit"), 1),
        (RunError("a file is missing"), 1),
        (OSError(errno.ENOSPC, "no space left"), 1),
        (PermissionError(errno.EACCES, "no right"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_a_task_is_tried_again_only_when_the_outside_failed(error: Exception, n_tries: int) -> None:
    tries = []

    @task(retries=2, retry_delay_seconds=0, retry_condition_fn=outside_failed)
    def fail() -> None:
        tries.append(1)
        raise error

    with pytest.raises(type(error)):
        fail()
    assert len(tries) == n_tries
