"""Stages, cached by content: a stage that any run has finished is reused, not done again.

A stage is described by its inputs, its settings and its code. Their hash names an entry in the cache. The entry holds
the files that the stage made; copies of them are placed in the run folder. An attempt that was cut off leaves a
``.partial`` folder, which a stage that can resume takes up again (``make_once`` in ``files``).
"""

import filecmp
import os
import shutil
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

from prefect import Task, task
from prefect.states import Completed
from pydantic import ValidationError

from tasks.errors import RunError
from tasks.files import digest, inside, make_once, read_json, room_in, write_json
from tasks.records import Facts, StageParts, StageRecord
from tasks.runs.artifacts import in_run
from tasks.runs.bucket import fetch_entry, fetch_shards, keep_entry, send
from tasks.runs.places import SEAL, Place
from tasks.runs.retries import AGAIN

P = ParamSpec("P")
STAGES_FOLDER = "stages"


def run_stage(
    run: Place,
    name: str,
    parts: StageParts,
    make: Callable[[Path], Facts],
    *,
    resumable: bool,
    is_valid: Callable[[Path], bool],
) -> Facts:
    """Implements ``Run.stage``; ``parts`` are those of the stage's key."""
    entry = f"{name}/{digest(parts.model_dump())[:24]}"

    def make_entry(folder: Path) -> None:
        start = time.perf_counter()
        facts = make(folder)
        seconds = round(time.perf_counter() - start, 2)
        write_json(folder / "stage.json", StageRecord(facts=facts, seconds=seconds, parts=parts).model_dump())

    def is_whole(folder: Path) -> bool:
        try:
            read_stage_record(folder / "stage.json")
            return is_valid(folder)
        except RunError:  # missing or damaged: it is made again
            return False

    fetch_entry(run, entry, is_whole)
    folder = run.cache / entry
    if folder.exists():
        fetch_shards(run, folder)
    reused = make_once(folder, make_entry, is_valid=is_whole, resumable=resumable)
    keep_entry(run, entry)  # a reused one too: its first upload may have been cut off
    record = read_stage_record(folder / "stage.json")
    place_files(run, folder, name, record.model_copy(update={"reused": reused, "entry": entry}))
    if reused:
        print(f"{name} is taken from the cache")
    return {**record.facts, "reused": reused, "seconds": record.seconds}


def stage_task(name: str, **options: Any) -> Callable[[Callable[P, Facts]], Task[P, Facts]]:
    """Decorator: makes a function that does a stage a Prefect task; ``options`` are Prefect's.

    A failure of a network or server is retried. A stage reused from the cache ends in the state *Cached*; its message
    lists the facts.
    """

    def decorate(do: Callable[P, Facts]) -> Task[P, Facts]:
        @wraps(do)
        def run(*args: P.args, **named: P.kwargs) -> Facts:
            facts = do(*args, **named)
            if not (facts["reused"] and in_run()):
                return facts
            counts = ", ".join(f"{key} {value}" for key, value in facts.items() if isinstance(value, str | int | float))
            return Completed(name="Cached", message=counts, data=facts)  # type: ignore[return-value]

        return task(run, name=name, **AGAIN | options)  # type: ignore[call-overload,no-any-return]

    return decorate


def place_files(run: Place, entry: Path, stage: str, record: StageRecord) -> None:
    """Replaces a stage's files from an earlier attempt in the run folder, and breaks the run's seal.

    Outdated files are removed first, then the stage's record names the new files, then these are placed. If this is cut
    off, a file is missing, but no old file is left among new ones, and the next attempt knows all that may exist.
    """
    names = sorted(p.relative_to(entry).as_posix() for p in entry.rglob("*") if p.is_file() and p.name != "stage.json")
    record_name = f"{STAGES_FOLDER}/{stage}.json"
    with room_in(folder := run.folder):
        earlier = read_stage_record(folder / record_name).files if (folder / record_name).exists() else []
        same = {name for name in names if (folder / name).is_file() and filecmp.cmp(entry / name, folder / name, False)}
        gone = [SEAL, *sorted({*earlier, *names} - same)]
        for name in gone:
            inside(folder, name).unlink(missing_ok=True)
        send(run, [], gone=gone)
        write_json(folder / record_name, record.model_copy(update={"files": names}).model_dump())
        send(run, [record_name])
        for name in names:
            if name not in same:
                _place(entry / name, folder / name)
        send(run, names)


def withdraw_stage(run: Place, stage: str) -> None:
    """Removes from the run folder what the stage left there in an earlier attempt, its record last, and breaks the
    run's seal; the cache keeps it."""
    record = f"{STAGES_FOLDER}/{stage}.json"
    if (run.folder / record).exists():
        gone = [SEAL, *read_stage_record(run.folder / record).files, record]
        for name in gone:
            inside(run.folder, name).unlink(missing_ok=True)
        send(run, [], gone=gone)


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".partial")
    try:
        shutil.copyfile(source, beside)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def read_stage(run: Path, stage: str) -> StageRecord:
    """The record of a finished stage in a run folder.

    Raises:
        RunError: If it is missing.
    """
    return read_stage_record(run / STAGES_FOLDER / f"{stage}.json")


def read_stage_record(path: Path) -> StageRecord:
    """The record of a stage in the cache or in a run.

    Raises:
        RunError: If it is missing, or not a stage's record.
    """
    try:
        return StageRecord.model_validate(read_json(path))
    except ValidationError:
        raise RunError(f"{path} is not what a run wrote there: remove it and run again") from None
