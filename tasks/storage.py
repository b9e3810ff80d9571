"""Where runs and finished work live: files that appear whole or not at all, and stages cached by content.

A stage is described by its inputs, its settings and the text of its code. Their hash names an entry in the cache; an
entry holds the files that the stage made, and copies of them are placed in the run folder. A stage whose entry exists
is not done again, in the same run folder or another one.
"""

import dis
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any, BinaryIO

import pandas as pd

from tasks.records import MANIFEST_DTYPES, Facts, RunError, SourceError
from tasks.settings import Settings

REPOSITORY = Path(__file__).resolve().parent.parent
SHIPPED_REVIEW = REPOSITORY / "data" / "device_review.csv"
STAGES_FOLDER = "stages"
SEAL = "run.json"


def run_folder(settings: Settings) -> Path:
    """The run folder that the settings name.

    Raises:
        RunError: If no run folder is named, or a file is in its place.
    """
    if settings.run_dir is None:
        raise RunError("run_dir: no run folder is named; give --run-dir DIR")
    folder = Path(settings.run_dir)
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise RunError(f"run_dir: {part} is a file; name a folder, or one that does not exist yet")
    return folder


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file's content, 64 hex digits, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_bytes(path: Path) -> bytes:
    """The content of a file of the source.

    Raises:
        SourceError: If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise SourceError(
            f"source: {path} cannot be read ({reason}); put it right or remove it, and run again"
        ) from None


def digest(value: object) -> str:
    """The sha256 of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a file beside its place and renames it after the block, so that it is whole whenever it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with beside.open("wb") as stream:
            yield stream
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes a file beside its place and renames it, so that it is whole whenever it is there."""
    with open_whole(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: object) -> None:
    """Writes JSON whole; a value that is not finite is refused, because JSON has no NaN."""
    write_whole(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run.

    Raises:
        RunError: If the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{path} is missing: run the stage that writes it first") from None
    except ValueError:
        raise RunError(f"{path} is not JSON: remove it and run again") from None


def make_once(
    target: Path,
    make: Callable[[Path], None],
    *,
    is_valid: Callable[[Path], bool] = lambda target: True,
    resumable: bool = False,
) -> bool:
    """Makes a folder unless it is there already; whole or not at all, and by one process at a time.

    Args:
        target: The folder that shall exist afterwards.
        make: Fills the folder it is given, which is renamed to ``target`` when it returns.
        is_valid: Whether a folder that is there still holds; one that does not is made again.
        resumable: Keep what an interrupted attempt left, so that ``make`` can go on from it.

    Returns:
        Whether the folder was there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".partial")
    with locked(target.with_name(f".{target.name}.lock")):
        if target.exists() and is_valid(target):
            return True
        for stale in [target] if resumable else [target, beside]:
            shutil.rmtree(stale, ignore_errors=True)
        beside.mkdir(exist_ok=True)
        try:
            make(beside)
        except BaseException:
            if not resumable:
                shutil.rmtree(beside, ignore_errors=True)
            raise
        os.replace(beside, target)
    return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file; waits, and says so, while another process does. The system frees it when a process dies."""
    while True:
        with path.open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another run is making {path.name.removeprefix('.').removesuffix('.lock')}; waiting for it")
                fcntl.flock(stream, fcntl.LOCK_EX)
            # The one before us removed the file as it left: what we hold then is no longer what others lock.
            if not _names(path, stream.fileno()):
                continue
            try:
                yield
            finally:
                path.unlink()
            return


def _names(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def shards_exist(index: Path) -> bool:
    """Whether all shards are there that an index (``{"shards": [{"address"}], …}``) names."""
    return all(Path(shard["address"]).exists() for shard in read_json(index)["shards"])


# -- the manifest ------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> pd.DataFrame:
    """Reads ``manifest.parquet``: a row per image, nullable dtypes, sorted by path.

    Raises:
        RunError: If the folder has none.
    """
    path = folder / "manifest.parquet"
    if not path.exists():
        raise RunError(f"{path} is missing: run the prepare flow on this run folder first")
    return pd.read_parquet(path, dtype_backend="numpy_nullable")


def write_manifest(folder: Path, manifest: pd.DataFrame) -> None:
    """Writes ``manifest.parquet`` with the fixed columns first, in their dtypes; columns not known yet are added."""
    columns = {
        name: manifest[name].astype(dtype) if name in manifest else pd.array([pd.NA] * len(manifest), dtype=dtype)
        for name, dtype in MANIFEST_DTYPES.items()
    }
    table = pd.DataFrame(columns).sort_values("path", ignore_index=True)
    path = folder / "manifest.parquet"
    beside = path.with_name(path.name + ".partial")
    table.to_parquet(beside, index=False)
    os.replace(beside, path)


# -- stages, cached by content -----------------------------------------------------------------------------------------


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
    parts = {
        "inputs": dict(inputs),
        "code": code_version(module),
        "packages": package_versions(packages),
    }
    key = digest(parts)[:24]
    entry = Path(settings.storage.cache) / stage / key

    def make_entry(folder: Path) -> None:
        start = time.perf_counter()
        facts = make(folder)
        seconds = round(time.perf_counter() - start, 2)
        write_json(folder / "stage.json", {"facts": facts, "seconds": seconds, "parts": parts})

    def is_whole(folder: Path) -> bool:
        return (folder / "stage.json").exists() and is_valid(folder)

    reused = make_once(entry, make_entry, is_valid=is_whole, resumable=resumable)
    sealed = read_json(entry / "stage.json")
    place_files(entry, run_folder(settings), stage, {**sealed, "reused": reused, "entry": str(entry.resolve())})
    return {**sealed["facts"], "reused": reused, "seconds": sealed["seconds"]}


def place_files(entry: Path, run: Path, stage: str, record: Facts) -> None:
    """Copies a stage's files into the run folder, removes those of an earlier try, and breaks the run's seal."""
    run.mkdir(parents=True, exist_ok=True)
    (run / SEAL).unlink(missing_ok=True)
    names = sorted(p.relative_to(entry).as_posix() for p in entry.rglob("*") if p.is_file() and p.name != "stage.json")
    record_path = run / STAGES_FOLDER / f"{stage}.json"
    earlier = set(read_json(record_path).get("files", [])) if record_path.exists() else set()
    for name in earlier - set(names):
        (run / name).unlink(missing_ok=True)
    for name in names:
        target = run / name
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(target.name + ".partial")
        shutil.copyfile(entry / name, beside)
        os.replace(beside, target)
    write_json(record_path, {**record, "files": names})


def read_stage(run: Path, stage: str) -> Facts:
    """The record of a stage in a run folder: ``facts``, ``seconds``, ``reused``, ``files``, ``entry``."""
    return dict(read_json(run / STAGES_FOLDER / f"{stage}.json"))


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions of distributions."""
    return {name: importlib.metadata.version(name) for name in packages}


def code_version(module: str) -> str:
    """A hash of the text of a module and of all modules of this repository that it imports, however deep.

    Settings are left out (their values are in the key), as are flows and other stages, which no stage imports.
    """
    return digest({name: source_of(name) for name in sorted(imported_modules(module) - {"tasks.settings"})})


@cache
def source_of(module: str) -> str:
    """The text of a module of this repository; empty for a package or a name in a module."""
    path = REPOSITORY.joinpath(*module.split(".")).with_suffix(".py")
    return path.read_text() if path.exists() else ""


def imported_modules(module: str) -> set[str]:
    """The module and the modules under ``tasks`` and ``data`` that it imports, directly or through others."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        named = names_imported(source_of(name))
        waiting += [n for n in named if n.split(".")[0] in ("tasks", "data") and source_of(n)]
    return found


@cache
def names_imported(text: str) -> frozenset[str]:
    """What a module's text imports, anywhere in it, as ``module`` and ``module.name``.

    Read from the compiled code: in Python 3.11 ``ast.parse`` fails now and then when threads call it at once.
    """
    found: set[str] = set()
    waiting = [compile(text, "module", "exec", dont_inherit=True)]
    while waiting:
        code = waiting.pop()
        waiting += [part for part in code.co_consts if isinstance(part, CodeType)]
        module = ""
        for step in dis.get_instructions(code):
            if step.opname == "IMPORT_NAME":
                module = step.argval
                found.add(module)
            elif step.opname == "IMPORT_FROM":
                found.add(f"{module}.{step.argval}")
    return frozenset(found)
