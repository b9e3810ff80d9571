"""What runs share beside them, and a look at files of any of these runs: in a folder here, or in a bucket."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tasks.records import Facts, RunError
from tasks.run_copies import TRIES, open_bucket
from tasks.settings import Settings
from tasks.storage import is_in_bucket, locked, read_json, run_folder, runs_address, sha256_of_file, write_json


def runs_of(settings: Settings) -> str:
    """The folder of runs that the run lies in: ``s3://bucket/prefix``, or an absolute path."""
    return runs_address(settings) if is_in_bucket(settings) else str(run_folder(settings).resolve().parent)


@contextmanager
def files_of(address: str, names: Iterable[str], settings: Settings) -> Iterator[Path]:
    """A folder here with those of the named files that are there: the folder itself, or copies out of a bucket.

    Args:
        address: A folder here, or ``s3://bucket/prefix``.
        names: Relative to it.
        settings: How to reach the bucket.
    """
    if not address.startswith("s3://"):
        yield Path(address)
        return
    with TemporaryDirectory() as folder:
        for name in names:
            open_bucket(address, settings).get(name, Path(folder, name))
        yield Path(folder)


def checksum_at(address: str, name: str, settings: Settings) -> str | None:
    """The sha256 of a file as it is where it is kept; ``None`` where there is none."""
    with files_of(address, [name], settings) as folder:
        return sha256_of_file(folder / name) if (folder / name).is_file() else None


def read_shared(address: str, name: str, settings: Settings) -> Facts | None:
    """A JSON file beside the runs; ``None`` where there is none.

    Raises:
        RunError: If it is no JSON object.
    """
    with files_of(address, [name], settings) as folder:
        return _read(folder / name, f"{address}/{name}") if (folder / name).exists() else None


def change_shared(address: str, name: str, settings: Settings, change: Callable[[Facts | None], Facts | None]) -> None:
    """Changes a JSON file beside the runs, so that of two that do it at once neither loses the other's step.

    Args:
        address: The folder of runs.
        name: Of the file.
        settings: How to reach the bucket.
        change: From what is there, ``None`` for nothing, to what shall be, ``None`` for what is there. It is asked
            again where somebody else was faster.

    Raises:
        RunError: If the file is no JSON object, or others never stop changing it.
    """
    if not address.startswith("s3://"):
        path = Path(address, name)
        with locked(path.with_name(f".{name}.lock")):
            wanted = change(_read(path, str(path)) if path.exists() else None)
            if wanted is not None:
                write_json(path, wanted)
        return
    bucket, wanted = open_bucket(address, settings), None
    with TemporaryDirectory() as folder:
        old, new = Path(folder, "old"), Path(folder, "new")
        for _ in range(TRIES):
            stored = bucket.get(name, old)
            there = None if stored is None else _read(old, f"{address}/{name}")
            if wanted is not None and there == wanted:
                return  # it was written, only the answer got lost
            wanted = change(there)
            if wanted is None:
                return
            write_json(new, wanted)
            if bucket.put_instead(new, name, None if stored is None else stored.etag):
                return
    raise RunError(f"run_dir: {address}/{name} is changed by others all the time; run again later")


def _read(path: Path, said: str) -> Facts:
    try:
        found = read_json(path)
    except RunError:
        found = None
    if not isinstance(found, dict):
        raise RunError(f"{said} is no JSON object; put back a whole copy, or remove it to begin anew")
    return found
