"""The places of a run: on this machine, and in a bucket."""

from pathlib import Path

from tasks.errors import RunError
from tasks.files import digest
from tasks.settings import Settings

SEAL = "run.json"


class Place:
    """The place of a run, from its settings.

    Attributes:
        settings: Of the run.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def cache(self) -> Path:
        """Where this machine keeps finished work."""
        return Path(self.settings.storage.cache)

    @property
    def in_bucket(self) -> bool:
        """Whether the run is kept in a bucket, with a working copy on this machine."""
        return str(self.settings.run_dir).startswith("s3://")

    @property
    def runs(self) -> str:
        """The parent folder of the run: ``s3://bucket/prefix``, or an absolute path."""
        if not self.in_bucket:
            return str(self.folder.resolve().parent)
        address = str(self.settings.run_dir)
        return address.rstrip("/") if address.endswith("/") else address.rpartition("/")[0]

    @property
    def folder(self) -> Path:
        """The run folder that the settings name; for a run in a bucket its working copy, in the cache.

        Raises:
            RunError: If no run folder is named, its path is a file, or it cannot be a folder's name.
        """
        if self.settings.run_dir is None:
            raise RunError("run_dir: no run folder is named; give --run-dir DIR")
        folder = Path(self.settings.run_dir)
        if self.in_bucket:
            folder = self.cache / "runs" / digest(self.runs)[:16] / folder.name
        try:
            in_place = next((part for part in (folder, *folder.parents) if part.exists() and not part.is_dir()), None)
        except OSError as error:
            raise RunError(f"run_dir: {folder} cannot be used ({error.strerror}); name another folder") from None
        if in_place is not None:
            raise RunError(f"run_dir: {in_place} is a file; name a folder, or one that does not exist yet")
        return folder

    def address(self, name: str = "") -> str:
        """The address of the run, or of a file of it: in the bucket, or an absolute path here."""
        if self.in_bucket:
            return f"{self.settings.run_dir}/{name}".rstrip("/")
        return str((self.folder / name).resolve())
