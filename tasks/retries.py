"""Which failures deserve another try: those from outside, never the errors that only the user can mend."""

import errno
from typing import Any

from tasks.records import PipelineError
from tasks.room import FULL

DISK_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, *FULL)
"""Of paths, rights and space on this machine: trying again does not help."""


def outside_failed(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's retry condition: retry unless the task raised one of our own errors."""
    try:
        state.result()
    except PipelineError:
        return False
    except OSError as error:
        return error.errno not in DISK_ERRORS
    except BaseException:
        return True
    return False
