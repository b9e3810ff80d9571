"""The files below a folder on this machine, with those behind links."""

import os
from pathlib import Path

from tasks.errors import SourceError


def list_folder(folder: Path, setting: str) -> tuple[list[str], list[str]]:
    """Lists all files below a folder; linked folders are followed like others.

    Args:
        folder: The folder.
        setting: The setting that named it, for messages.

    Returns:
        Paths of the files relative to the folder, with ``/``; and of linked folders that are not followed, because they
        lead to a folder above them.

    Raises:
        SourceError: If a folder cannot be read or is a link that leads nowhere.
    """

    def refuse(error: OSError) -> None:
        raise SourceError(f"{setting}: {error.filename} cannot be read ({error.strerror}); fix or remove it")

    names: list[str] = []
    circles: list[str] = []
    top = folder.absolute()
    for parent, folders, files in os.walk(top, onerror=refuse, followlinks=True):
        below = Path(parent).relative_to(top)
        names += [(below / name).as_posix() for name in files]
        for path in (Path(parent, name) for name in files if "." not in name):
            if path.is_symlink() and not path.exists():  # it has no ending, so most likely it led to a folder
                raise SourceError(f"{setting}: {path} is a link that leads nowhere; fix or remove it")
        for path in [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]:
            target = os.path.realpath(path)
            if any(os.path.realpath(above) == target for above in path.parents):
                circles.append((below / path.name).as_posix())
                folders.remove(path.name)
    return names, sorted(circles)
