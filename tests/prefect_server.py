"""A real Prefect server in a process of its own, for tests that need what a temporary one lacks."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 180.0


class PrefectServer:
    """``prefect server`` on a port that stays the same, with a database that outlives it."""

    def __init__(self, folder: Path, auth: str | None = None, database: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.folder, self.auth, self.database = folder, auth, database
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it, for the first time or again; returns when it is healthy."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
            "PREFECT_HOME": str(self.folder),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_UI_API_URL": self.api,
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        }
        if self.auth is not None:
            environment |= {
                "PREFECT_SERVER_API_AUTH_STRING": self.auth,
                "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
            }
        if self.database is not None:
            environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = self.database
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        log = self.folder / "server.log"
        with log.open("a") as out:
            self.process = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        wait_until_healthy(self.api, self.process, log)

    def kill(self) -> None:
        """Ends it at once, as a machine that loses its power."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def stop(self) -> None:
        """Ends it."""
        if self.process is not None:
            stop_group(self.process)


@contextmanager
def running_server(folder: Path, auth: str | None = None, database: str | None = None) -> Iterator[str]:
    """Starts ``prefect server`` on a free port; the address of its API.

    Args:
        folder: Its ``PREFECT_HOME``: the SQLite file, the leases, and ``server.log``.
        auth: ``user:password`` that clients have to give; with it the check of CSRF tokens is on as well.
        database: Address of another database than SQLite in that folder.
    """
    server = PrefectServer(folder, auth, database)
    try:
        server.start()
        yield server.api
    finally:
        server.stop()


def wait_until_healthy(api: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{api}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"the Prefect server did not start:\n{log.read_text()[-4000:]}")


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started: asked first, then killed."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(timeout=10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
