"""A real PostgreSQL server in a process of its own, on a free port, with its files in a folder of the test."""

import os
import pwd
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def find_programs() -> Path | None:
    """The folder of PostgreSQL's programs where Debian puts them; ``None`` where there is none."""
    return next((path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)


@contextmanager
def running_postgres(folder: Path, programs: Path) -> Iterator[str]:
    """Starts it; yields the address for SQLAlchemy. It refuses to run as root, and then runs as ``postgres``."""
    folder.mkdir(parents=True)
    who: dict[str, object] = {}
    if os.getuid() == 0:
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
        for parent in folder.parents:
            if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o111)
        who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = folder / "data"

    def call(program: str, *arguments: str, check: bool = True) -> None:
        command = [str(programs / program), *arguments]
        subprocess.run(command, check=check, capture_output=True, cwd=folder, **who)  # type: ignore[call-overload]

    call("initdb", "--pgdata", str(data), "--username", "prefect", "--auth", "trust", "--encoding", "UTF8", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    call("pg_ctl", "--pgdata", str(data), "--wait", "--log", str(folder / "log"), "--options", options, "start")
    try:
        call("createdb", "--host", "127.0.0.1", "--port", str(port), "--username", "prefect", "prefect")
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
    finally:
        # One that has ended by itself is no error here: the tests that need it have failed then.
        call("pg_ctl", "--pgdata", str(data), "--mode", "immediate", "stop", check=False)
