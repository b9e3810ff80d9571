"""Command lines of the flows: flags from the settings, errors in one sentence, exit codes 0 and 2."""

import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError as CommandLineError

from tasks.errors import PipelineError, SettingsError
from tasks.files import free_bytes, is_full, say_full
from tasks.runs.provenance import find_backend
from tasks.runs.retries import DISK_ERRORS
from tasks.settings import Settings


class _CommandLine(BaseSettings, Settings):
    """The settings as flags; neither the environment nor files are read, so the command determines the run."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=False,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        nested_model_default_partial_update=True,
    )

    @classmethod
    def settings_customise_sources(cls, settings_cls: Any, init_settings: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
        """Only the flags."""
        return (init_settings,)


def read_flags(arguments: Sequence[str], program: str) -> Settings:
    """Settings from flags; ``-`` and ``_`` in a flag's name are the same, booleans take ``true`` and ``false``.

    Raises:
        SettingsError: On a flag that does not exist or a value that does not fit.
        SystemExit: After ``--help``.
    """
    return read_own_flags(arguments, program, BaseModel)[0]


def read_own_flags(arguments: Sequence[str], program: str, extra: type[BaseModel]) -> tuple[Settings, dict[str, Any]]:
    """Settings, and the values of a flow's own flags by name.

    Args:
        arguments: The flags; a boolean one without a value is true.
        program: The command's name in the help.
        extra: The flow's own flags: a field each, described like a setting, under a name that no setting has.

    Raises:
        SettingsError: On a flag that does not exist, is missing, or has a value that does not fit.
        SystemExit: After ``--help``.
    """
    line: type[BaseModel] = type("_OwnCommandLine", (_CommandLine, extra), {"__module__": __name__})
    line.__doc__ = extra.__doc__ if extra is not BaseModel else _CommandLine.__doc__
    named = [re.sub(r"^--[^=]+", lambda match: match[0].replace("_", "-"), argument) for argument in arguments]
    try:
        parsed = line(_cli_parse_args=_spell_out(named, line), _cli_prog_name=program)
    except CommandLineError as error:
        reason = str(error).removeprefix("error parsing CLI: ")
        raise SettingsError(f"{reason}; see --help for the flags") from None
    except ValidationError as error:
        raise SettingsError("; ".join(describe_problem(problem) for problem in error.errors())) from None
    values = parsed.model_dump()
    own = {name: values.pop(name) for name in extra.model_fields}
    return Settings.model_validate(values), own


def _spell_out(arguments: Sequence[str], model: type[BaseModel]) -> list[str]:
    """``--strict`` -> ``--strict=true`` if no value follows: the parser's implicit flags would refuse a value."""
    switches = set(_switches(model))
    following = [*arguments[1:], "--"]
    return [
        f"{argument}=true" if argument in switches and after.startswith("--") else argument
        for argument, after in zip(arguments, following, strict=False)
    ]


def _switches(model: type[BaseModel], prefix: str = "--") -> Iterator[str]:
    for name, field in model.model_fields.items():
        flag = prefix + name.replace("_", "-")
        if field.annotation is bool:
            yield flag
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _switches(field.annotation, f"{flag}.")


def describe_problem(problem: Any) -> str:
    """``training.epochs: input should be greater than or equal to 1, not '0'``."""
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{place}: is missing; give --{place.replace('_', '-')}, see --help"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if isinstance(problem["input"], dict):  # the message of a rule over a whole group is complete
        return f"{place}: {message}; see --help"
    return f"{place}: {message[:1].lower()}{message[1:]}, not {problem['input']!r:.100}; see --help"


def run_command(
    flow: Callable[..., object], arguments: Sequence[str], program: str, extra: type[BaseModel] = BaseModel
) -> int:
    """Runs a flow with the settings of a command line and prints its result as the last line; returns the exit code.

    0 success, 2 an error that the user can fix, 130 stopped by Ctrl-C, 143 by SIGTERM.

    Args:
        flow: Called with ``settings`` and, by keyword, a value for each field of ``extra``.
        arguments: The flags.
        program: The command's name in the help.
        extra: The flow's own flags besides the settings (see ``read_own_flags``).
    """
    show_own_errors_once()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal cannot show is not a failure
    try:
        settings, own = read_own_flags(arguments, program, extra)
        _refuse_surroundings()
        with _sigterm_raised():
            result = flow(settings=settings, **own)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        if is_full(error):  # when no folder is known
            folders = [Path(settings.storage.cache), Path(settings.storage.raw), Path(settings.run_dir or "data/runs")]
            fullest = min(folders, key=free_bytes)
            message = say_full(fullest, "more than that", free_bytes(fullest))
        else:
            message = f"{error.filename}: {error.strerror}; check path and permissions"
        print(f"error: {message}", file=sys.stderr)
        return 2
    except (httpx.HTTPError, RuntimeError) as error:
        if not (message := _describe_server_problem(error)):
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, _Terminated) as stop:
        way_out = "the same command with the same --run-dir resumes from here"
        print(f"stopped; {way_out if extra is BaseModel else 'give the same command again'}", file=sys.stderr)
        return 143 if isinstance(stop, _Terminated) else 130
    sys.stderr.flush()
    print(result)
    return 0


def _refuse_surroundings() -> None:
    """Refuses at once what would fail later, after minutes or in somebody else's words.

    Raises:
        SettingsError: If ``KERAS_BACKEND`` is not installed; if no client for HTTP can be made with the proxies and
            certificates that are set; without a server of Prefect, if its temporary one may not start or cannot write.
    """
    find_backend()
    try:
        httpx.Client().close()  # Prefect makes the same one
    except (ValueError, ImportError, OSError, httpx.InvalidURL) as error:
        reason = str(error).split("\n")[0][:200]
        raise SettingsError(
            f"HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or SSL_CERT_FILE: cannot be used ({reason}); give http://host:port or "
            "socks5://host:port, and a file of certificates that exists, or unset them"
        ) from None
    if PREFECT_API_URL.value():
        return
    if not PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        raise SettingsError(
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: is false, and no server is named; set PREFECT_API_URL (make ui "
            "starts a server), or unset it"
        )
    home = Path(PREFECT_HOME.value()).absolute()
    with suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
    if not (home.is_dir() and os.access(home, os.W_OK)):
        raise SettingsError(
            f"PREFECT_HOME: {home} cannot be written to; name a folder that can, or set PREFECT_API_URL"
        )


def _describe_server_problem(error: Exception) -> str:
    """One sentence for a Prefect server that cannot be used; ``""`` for other errors."""
    address = PREFECT_API_URL.value()
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED:
        return (
            f"PREFECT_API_AUTH_STRING: is missing or refused by the server at {address}; set it to the user:password "
            "that the server was given as PREFECT_SERVER_API_AUTH_STRING"
        )
    if isinstance(error, httpx.HTTPError) or str(error).startswith("Failed to reach API"):
        return (
            f"PREFECT_API_URL: the server at {address} cannot be used ({type(error).__name__}); see that it runs, or "
            "unset the variable, and give the same command again"
        )
    return ""


class _Terminated(BaseException):
    """Raised on SIGTERM."""


@contextmanager
def _sigterm_raised() -> Iterator[None]:
    """Makes SIGTERM end the block with an exception; Prefect's engine marks its runs first, then passes it on."""

    def end(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def show_own_errors_once() -> None:
    """Keeps Prefect's console log from printing tracebacks of errors that the command reports in one sentence.

    Prefect logs every exception with its traceback, each time it passes a task or flow. The log on its server is kept.
    """

    def wanted(record: logging.LogRecord) -> bool:
        raised = record.exc_info[1] if record.exc_info else None
        ours = isinstance(raised, PipelineError) or (isinstance(raised, OSError) and raised.errno in DISK_ERRORS)
        repeated = record.getMessage().startswith(
            ("Finished in state Failed", "Task run failed", "Stopping temporary", "EventsWorker -")
        )
        return not (ours or repeated)

    for name in ("prefect", "prefect.flow_runs", "prefect.task_runs", ""):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(wanted)
