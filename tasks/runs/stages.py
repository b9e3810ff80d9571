"""Stages, cached by content: what was done once, in whatever run, is not done again.

A stage is described by its inputs, its settings and the text of its code. Their hash names an entry in the cache; an
entry holds the files that the stage made, and copies of them are placed in the run folder. A stage whose entry exists
is not done again, in the same run folder or another one.
"""

import ast
import filecmp
import importlib.metadata
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec

from prefect import Task, task
from prefect.states import Completed

from tasks.errors import RunError
from tasks.records import Facts
from tasks.runs.artifacts import in_run
from tasks.runs.bucket import fetch_entry, fetch_shards, keep_entry, send
from tasks.runs.files import REPOSITORY, digest, inside, make_once, read_json, read_record, room_in, write_json
from tasks.runs.retries import AGAIN
from tasks.runs.run import SEAL, cache_folder, run_folder
from tasks.settings import Settings

P = ParamSpec("P")
STAGES_FOLDER = "stages"
PARSING = threading.Lock()
"""Python 3.11 parses in one thread at a time without failing now and then."""

SHAPES_NOTHING = (
    "tasks.settings",
    "tasks.addresses",
    "tasks.errors",
    "tasks.runs",
    "tasks.sources",
    "tasks.devices.contact_sheet",
    "tasks.devices.answers",
)
"""Rooms and modules that carry, keep, show or explain, and change no result: what matters of them is in a stage's
inputs. ``SHAPES_RESULTS`` names the exceptions in these rooms."""
SHAPES_RESULTS = ("tasks.runs.manifest", "tasks.sources.layout")


def run_stage(
    settings: Settings,
    stage: str,
    *,
    module: str,
    inputs: Mapping[str, object],
    make: Callable[[Path], Facts],
    packages: Sequence[str] = (),
    resumable: bool = False,
    is_valid: Callable[[Path], bool] = lambda entry: True,
) -> Facts:
    """Does a stage, or takes it from the cache, and places its files in the run folder.

    Args:
        settings: Names the run folder and the cache.
        stage: Name of the stage.
        module: Name of the module whose code (and imports from this repository) does the work.
        inputs: All that the result depends on: hashes of what is read, and settings.
        make: Writes the stage's files into the empty folder it is given and returns counts for log and report.
        packages: Installed distributions whose version matters to the result.
        resumable: Whether ``make`` can go on from what an interrupted attempt left in its folder.
        is_valid: Whether an entry of the cache still holds; one that does not is made again.

    Returns:
        The facts of the stage with ``reused`` (from the cache or not) and ``seconds`` (that the work took when done).
    """
    parts = {"inputs": dict(inputs), "code": code_version(module), "packages": package_versions(packages)}
    key = digest(parts)[:24]
    entry = cache_folder(settings) / stage / key

    name = f"{stage}/{key}"

    def make_entry(folder: Path) -> None:
        start = time.perf_counter()
        facts = make(folder)
        seconds = round(time.perf_counter() - start, 2)
        write_json(folder / "stage.json", {"facts": facts, "seconds": seconds, "parts": parts})

    def is_whole(folder: Path) -> bool:
        try:
            read_record(folder / "stage.json", facts=dict, seconds=(int, float))
            return is_valid(folder)
        except RunError:  # missing or damaged: it is made again
            return False

    fetch_entry(settings, name, is_whole)
    if entry.exists():
        fetch_shards(settings, entry)
    reused = make_once(entry, make_entry, is_valid=is_whole, resumable=resumable)
    keep_entry(settings, name)  # one that is reused, too: its first upload may have broken off
    sealed = read_json(entry / "stage.json")
    place_files(settings, entry, stage, {**sealed, "reused": reused, "entry": name})
    return {**sealed["facts"], "reused": reused, "seconds": sealed["seconds"]}


def stage_task(name: str, **options: Any) -> Callable[[Callable[P, Facts]], Task[P, Facts]]:
    """Makes a function that does a stage a task of Prefect; ``options`` are Prefect's.

    Where a network or server failed it is tried again. What comes from the cache ends in the state *Cached*, its facts
    the message.
    """

    def decorate(do: Callable[P, Facts]) -> Task[P, Facts]:
        @wraps(do)
        def run(*args: P.args, **named: P.kwargs) -> Facts:
            facts = do(*args, **named)
            if not (facts["reused"] and in_run()):
                return facts
            said = ", ".join(f"{key} {value}" for key, value in facts.items() if isinstance(value, str | int | float))
            return Completed(name="Cached", message=said, data=facts)  # type: ignore[return-value]

        return task(run, name=name, **AGAIN | options)  # type: ignore[call-overload,no-any-return]

    return decorate


def place_files(settings: Settings, entry: Path, stage: str, record: Facts) -> None:
    """Puts a stage's files in the place of those of an earlier try in the run folder, and breaks the run's seal.

    What is no longer right goes first, then the stage's record names what is to be there, then it comes: where this is
    cut off a file is missing, never an old one among new ones, and the next try knows all that may be there.
    """
    run = run_folder(settings)
    names = sorted(p.relative_to(entry).as_posix() for p in entry.rglob("*") if p.is_file() and p.name != "stage.json")
    record_name = f"{STAGES_FOLDER}/{stage}.json"
    with room_in(run):
        earlier = read_record(run / record_name, files=list)["files"] if (run / record_name).exists() else []
        same = {name for name in names if (run / name).is_file() and filecmp.cmp(entry / name, run / name, False)}
        gone = [SEAL, *sorted({*earlier, *names} - same)]
        for name in gone:
            inside(run, name).unlink(missing_ok=True)
        send(settings, [], gone=gone)
        write_json(run / record_name, {**record, "files": names})
        send(settings, [record_name])
        for name in names:
            if name not in same:
                _place(entry / name, run / name)
        send(settings, names)


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".partial")
    try:
        shutil.copyfile(source, beside)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def read_stage(run: Path, stage: str) -> Facts:
    """The record of a finished stage in a run folder: ``facts``, ``seconds``, ``reused``, ``files``, ``entry``.

    Raises:
        RunError: If there is none.
    """
    return read_record(run / STAGES_FOLDER / f"{stage}.json", facts=dict)


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions of distributions."""
    return {name: importlib.metadata.version(name) for name in packages}


def code_version(module: str) -> str:
    """A hash of what a module does, with all modules of this repository that it imports and that shape its result.

    Those that shape nothing, and what only they import, are left out, as are words: see ``strip_words``.
    """
    return digest({name: strip_words(source_of(name)) for name in sorted(imported_modules(module))})


@cache
def source_of(module: str) -> str:
    """The text of a module or package of this repository; empty for anything else, such as a name in a module."""
    path = REPOSITORY.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path.read_text() if path.exists() else ""


def shapes_results(module: str) -> bool:
    """Whether the code of a module belongs to the key of a stage that imports it."""
    carried = any(module == name or module.startswith(f"{name}.") for name in SHAPES_NOTHING)
    return module.startswith("tasks.") and (module in SHAPES_RESULTS or not carried)


def imported_modules(module: str) -> set[str]:
    """The module, and those under ``tasks`` that it imports, directly or through others, and that shape its result."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [n for n in names_imported(source_of(name)) if shapes_results(n) and source_of(n)]
    return found


@cache
def names_imported(text: str) -> frozenset[str]:
    """What a module's text imports, anywhere in it, as ``module`` and ``module.name``."""
    found: set[str] = set()
    for node in ast.walk(_parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


@cache
def strip_words(text: str) -> str:
    """What a module does, without what it says: no comments, docstrings, texts of errors, log lines and artifacts."""
    return ast.dump(_Silence().visit(_parse(text)))


class _Silence(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        call = node.value.func if isinstance(node.value, ast.Call) else None
        says = isinstance(call, ast.Name) and (call.id == "print" or call.id.startswith("show_"))
        return None if says or isinstance(node.value, ast.Constant) else node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise(node.exc.func if isinstance(node.exc, ast.Call) else node.exc, None)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        ours = str(node.module).startswith("tasks.")
        return None if ours and not shapes_results(str(node.module)) else node


def _parse(text: str) -> ast.Module:
    with PARSING:
        return ast.parse(text)
