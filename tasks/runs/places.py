"""The folder of a run, and where it lies."""

from pathlib import Path

from tasks.errors import RunError
from tasks.files import digest
from tasks.settings import Settings

SEAL = "run.json"


def address_of(settings: Settings, name: str = "") -> str:
    """Where people find a run, or a file of it: in the bucket, or the absolute path here."""
    if is_in_bucket(settings):
        return f"{settings.run_dir}/{name}".rstrip("/")
    return str((run_folder(settings) / name).resolve())


def cache_folder(settings: Settings) -> Path:
    """Where this machine keeps finished work."""
    return Path(settings.storage.cache)


def is_in_bucket(settings: Settings) -> bool:
    """Whether the run is kept in a bucket, with a working copy on this machine."""
    return str(settings.run_dir).startswith("s3://")


def runs_address(settings: Settings) -> str:
    """Where the runs lie that this one belongs to, in a bucket."""
    address = str(settings.run_dir)
    return address.rstrip("/") if address.endswith("/") else address.rpartition("/")[0]


def run_folder(settings: Settings) -> Path:
    """The run folder that the settings name, or for one in a bucket its working copy, in the cache.

    Raises:
        RunError: If no run folder is named, a file is in its place, or no folder can have that name.
    """
    if settings.run_dir is None:
        raise RunError("run_dir: no run folder is named; give --run-dir DIR")
    folder = Path(settings.run_dir)
    if is_in_bucket(settings):
        folder = cache_folder(settings) / "runs" / digest(runs_address(settings))[:16] / folder.name
    try:
        in_place = next((part for part in (folder, *folder.parents) if part.exists() and not part.is_dir()), None)
    except OSError as error:
        raise RunError(f"run_dir: {folder} cannot be used ({error.strerror}); name another folder") from None
    if in_place is not None:
        raise RunError(f"run_dir: {in_place} is a file; name a folder, or one that does not exist yet")
    return folder
