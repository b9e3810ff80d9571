"""Clean up: removes old run folders, then cache entries that no remaining run uses.

``make clean-runs KEEP=8``, or ``python -m infra.clean_runs --keep 8 --dry-run`` to see what would go. Kept are the
newest finished runs, the target of ``latest``, the runs in ``published.json``, those with a trained screener or
segmenter, all that a process has locked, and all that was written within a day.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field

from flows.engine.command_line import run_command
from tasks.addresses import Place
from tasks.errors import SettingsError
from tasks.files import is_held, read_json
from tasks.publishing.published import read_published
from tasks.runs.places import SEAL
from tasks.runs.stages import STAGES_FOLDER, read_stage_record
from tasks.settings import Settings

DAY_S = 86_400
SHARDS = ("arrays", "masks", "lungs")
ENTRIES_NOT_STAGES = (*SHARDS, "finished", "runs")


class CleanFlags(BaseModel):
    """Removes all but the newest finished runs, and entries of the cache (--storage.cache) that no kept run uses."""

    keep: int = Field(ge=1, description="Number of newest finished runs to keep.")
    runs: Place = Field("data/runs", min_length=1, description="Folder of the runs, on this machine.")
    dry_run: bool = Field(False, description="Only list what would be removed.")


@dataclass(frozen=True)
class FoundRun:
    """A run folder; its time, in seconds since 1970, is when it was finished or, if it is not, last written to."""

    folder: Path
    finished: bool
    time_s: float


def clean_runs(settings: Settings, keep: int, runs: str, dry_run: bool) -> str:
    """Removes runs and then cache entries; returns a summary in a sentence.

    Raises:
        SettingsError: If the runs are in a bucket, where lifecycle rules of the bucket remove old objects.
    """
    if "://" in runs:
        raise SettingsError(f"runs: {runs} is not a folder on this machine; in a bucket, set a lifecycle rule instead")
    folder, cache, now = Path(runs), Path(settings.storage.cache), time.time()
    there = list_runs(folder) if folder.is_dir() else []
    leaving = choose_leaving(there, keep, find_protected(folder), now)
    staying = [run for run in there if run not in leaving]
    verb = "would remove" if dry_run else "removed"
    freed = 0
    for run in leaving:
        size = measure(run.folder)
        freed += size
        if not dry_run:
            remove_run(run.folder)
        state = "finished" if run.finished else "never finished, last touched"
        print(f"{verb} {run.folder} ({state} {time.strftime('%Y-%m-%d', time.gmtime(run.time_s))}, {say_size(size)})")
    stale = [] if not cache.is_dir() else find_stale(cache, staying, leaving, now)
    size = sum(measure(path) for path in stale)
    freed += size
    for path in stale:
        if not dry_run:
            remove(path)
    print(f"{verb} {len(stale):,} entries of {cache} that no run names ({say_size(size)})")
    if not dry_run:
        remove_empty(cache)
    n_finished = sum(run.finished for run in staying)
    return (
        f"{'would free' if dry_run else 'freed'} {say_size(freed)}: {len(leaving):,} runs and {len(stale):,} entries "
        f"of the cache; {n_finished:,} finished runs stay, and {len(staying) - n_finished:,} others"
    )


# -- runs --------------------------------------------------------------------------------------------------------------


def list_runs(folder: Path) -> list[FoundRun]:
    """The run folders in a folder, without links, files, and folders that no run wrote."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_dir() or not ((path / STAGES_FOLDER).is_dir() or (path / SEAL).exists()):
            continue
        finished = (path / SEAL).exists()
        found.append(FoundRun(path, finished, last_written(path / SEAL if finished else path)))
    return found


def choose_leaving(runs: list[FoundRun], keep: int, protected: set[Path], now: float) -> list[FoundRun]:
    """The runs to remove: finished ones after the newest ``keep``, unfinished ones not written to for a day.

    Locked runs are kept: a stage that takes days writes to the cache, not to the run folder.
    """
    finished = sorted((run for run in runs if run.finished), key=lambda run: run.time_s, reverse=True)
    old = [run for run in runs if not run.finished and now - run.time_s > DAY_S]
    leaving = {run.folder for run in [*finished[keep:], *old]}
    return [
        run
        for run in runs
        if run.folder in leaving
        and run.folder.resolve() not in protected
        and not any((run.folder / trained).exists() for trained in ("screener", "segmenter"))
        and not is_held(run.folder / f".{run.folder.name}.lock")
    ]


def find_protected(folder: Path) -> set[Path]:
    """The target of ``latest``, and the runs that are or were published.

    Raises:
        RunError: If ``published.json`` cannot be read: its runs must be kept.
    """
    protected = {(folder / "latest").resolve()}
    published = read_published(str(folder), Settings())
    for one in (published, *published.earlier) if published else ():  # also by name: the folder may have moved
        protected |= {Path(one.run_dir).resolve(), (folder / one.run).resolve()}
    return protected


def remove_run(folder: Path) -> None:
    """Removes a run, its seal first, so that a half-removed run does not count as finished."""
    (folder / SEAL).unlink(missing_ok=True)
    shutil.rmtree(folder)


# -- the cache ---------------------------------------------------------------------------------------------------------


def find_stale(cache: Path, staying: list[FoundRun], leaving: list[FoundRun], now: float) -> list[Path]:
    """Entries, shards and notes of the cache that no run names.

    Kept runs are those in the folder of runs, finished ones elsewhere that the cache has notes of, and working copies
    of runs in buckets. Other runs may be under way anywhere, without a record yet, so anything locked or written within
    a day is kept.
    """
    gone = {run.folder.resolve() for run in leaving}
    elsewhere = [path for path in find_noted(cache) if path.resolve() not in gone]
    copies = [path for path in (cache / "runs").glob("*/*") if (path / STAGES_FOLDER).is_dir()]
    named: set[str] = set()
    for folder in {*(run.folder for run in staying), *elsewhere, *copies}:
        named |= set(name_used(folder))
    return [
        path
        for name, path in list_cache(cache)
        if name not in named
        and not (path.parent.name == "finished" and is_valid_note(path, gone))
        and now - last_written(path) >= DAY_S
        and not is_worked_on(path)
    ]


def is_worked_on(path: Path) -> bool:
    """Whether a process holds the lock of an entry or shard, or of its unfinished version."""
    key = path.name.removeprefix(".").partition(".")[0]
    return any(is_held(path.with_name(name)) for name in (f".{key}.lock", f"{key}.lock"))


def name_used(run: Path) -> Iterator[str]:
    """Names in the cache that a run folder needs: entries of its stages, shards, and explanations."""
    for record in sorted((run / STAGES_FOLDER).glob("*.json")):
        found = read_stage_record(record)
        yield found.entry
        yield from (str(name) for name in found.parts.given.get("entries", ()))
    for kind in SHARDS:
        if (index := run / kind / "index.json").exists():
            for shard in read_json(index)["shards"]:
                name = str(shard.get("name") or "/".join(Path(shard["address"]).parts[-3:]))
                yield from (name, str(Path(name).with_suffix(".json")))


def list_cache(cache: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of all that can be removed separately: entries of stages, shards and their lists, notes."""
    for kind in sorted(path for path in cache.iterdir() if path.is_dir() and path.name != "runs"):
        parts = kind.rglob("*") if kind.name in SHARDS else kind.iterdir()
        for path in sorted(parts):
            is_entry = path.is_dir() if kind.name not in ENTRIES_NOT_STAGES else path.is_file()
            if is_entry:
                yield path.relative_to(cache).as_posix(), path


def find_noted(cache: Path) -> list[Path]:
    """Existing folders, on this machine, of finished runs that the cache has notes of."""
    noted = [Path(str(read_json(note)["run_dir"])) for note in (cache / "finished").glob("*.json")]
    return [path for path in noted if (path / SEAL).exists()]


def is_valid_note(note: Path, gone: set[Path]) -> bool:
    """Whether a note about a finished run is useful: its run exists, or is in a bucket."""
    address = str(json.loads(note.read_text())["run_dir"])
    return "://" in address or ((Path(address) / SEAL).exists() and Path(address).resolve() not in gone)


# -- small parts -------------------------------------------------------------------------------------------------------


def last_written(path: Path) -> float:
    """When a file, or anything in a folder, was last written to, in seconds since 1970."""
    try:
        return max(part.lstat().st_mtime for part in (path, *path.rglob("*")))
    except FileNotFoundError:  # it was renamed or removed meanwhile
        return math.inf


def measure(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(part.lstat().st_size for part in files if part.is_file() and not part.is_symlink())


def remove(path: Path) -> None:
    """Removes a file or a folder; the record of an entry first, so that half an entry does not count as whole."""
    if path.is_dir():
        (path / "stage.json").unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_empty(cache: Path) -> None:
    """Removes empty shelves."""
    for kind in SHARDS:
        for folder in sorted((cache / kind).rglob("*"), reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def say_size(n_bytes: int) -> str:
    """``0.2 MB``, ``1.35 GB``."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(run_command(clean_runs, sys.argv[1:], "python -m infra.clean_runs", CleanFlags))
