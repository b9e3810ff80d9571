"""What all test processes of a session share: made by the first that needs it, while the others wait."""

import json
import os
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

FOLDER = "X_RAY_TESTS"
"""Names the session's folder to the processes of pytest-xdist, which inherit the variable."""


def shared_folder() -> Path:
    """The session's folder, the same in all its processes."""
    return Path(os.environ[FOLDER])


def make_once(name: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` returns, from whichever process called it first.

    Args:
        name: Of the thing.
        make: Given a folder of its own; returns what JSON can hold. A ``pid`` in it is that of a process that leads its
            group and ends with the session.
    """
    note = shared_folder() / f"{name}.json"
    with FileLock(note.with_suffix(".lock")):
        if not note.exists():
            folder = shared_folder() / name
            folder.mkdir(exist_ok=True)
            note.write_text(json.dumps(make(folder)))
        return dict(json.loads(note.read_text()))


def open_session() -> tempfile.TemporaryDirectory[str]:
    """The folder of a session that begins; in the process that starts all the others."""
    folder = tempfile.TemporaryDirectory(prefix="x_ray_tests-", ignore_cleanup_errors=True)
    os.environ[FOLDER] = folder.name
    return folder


def close_session(folder: tempfile.TemporaryDirectory[str]) -> None:
    """Ends what ``make_once`` started, and removes the folder."""
    for note in Path(folder.name).glob("*.json"):
        if pid := json.loads(note.read_text()).get("pid"):
            with suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(pid, signal.SIGKILL)
    folder.cleanup()
