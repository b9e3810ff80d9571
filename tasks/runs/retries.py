"""Which failures are retried: those from outside, never errors that only the user can fix."""

import errno
from typing import Any

from tasks.errors import OutsideError, PipelineError
from tasks.files import FULL
from tasks.settings import IngestionSettings

DISK_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, *FULL)
"""Errors of paths, permissions and space on this machine: a retry does not help."""

LONGEST_PAUSE_S = 60.0
MOST_PAUSES = 50
"""Prefect takes no longer list of delays; the last one applies to all further attempts."""


def outside_failed(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's retry condition: retry unless the task raised an error that only the user can fix."""
    try:
        state.result()
    except PipelineError as error:
        return isinstance(error, OutsideError)
    except OSError as error:
        return error.errno not in DISK_ERRORS
    except BaseException:
        return True
    return False


def network_failed(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's retry condition: retry only if a network or server failed."""
    try:
        state.result()
    except BaseException as error:
        return isinstance(error, OutsideError)
    return False


AGAIN: dict[str, Any] = {"retries": 2, "retry_delay_seconds": 5, "retry_condition_fn": network_failed}
"""Prefect's options for a task that sends files to a bucket, for failures beyond boto3's own retries."""


def retries_of(settings: IngestionSettings) -> dict[str, Any]:
    """Prefect's options for a task that talks to a server: ``tries`` attempts, pauses that double up to a minute.

    Example: ``fetch.with_options(**retries_of(settings.ingestion))(settings)``.
    """
    n = settings.tries - 1
    pauses = [min(LONGEST_PAUSE_S, settings.backoff_s * 2.0**turn) for turn in range(min(n, MOST_PAUSES))]
    return {
        "retries": n,
        "retry_delay_seconds": pauses,
        "retry_jitter_factor": 0.5,
        "retry_condition_fn": network_failed,
    }
