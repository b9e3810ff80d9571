"""Which failures deserve another try: those from outside, never the errors that only the user can mend."""

from typing import Any

from tasks.records import PipelineError


def outside_failed(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's retry condition: retry unless the task raised one of our own errors."""
    try:
        state.result()
    except PipelineError:
        return False
    except BaseException:
        return True
    return False
