"""Which files of a source may belong to the data set: told from names alone, before anything is fetched or unpacked.

A file whose name does not rule it out is an image here; ingestion then looks at its content (``tasks.pixels.content``).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from tasks.errors import SourceError
from tasks.pixels.content import is_candidate
from tasks.records import CLASS_FOLDERS, SPLITS

TABLES = ("index.csv", "device_review.csv")
CLUTTER_FOLDERS = ("__MACOSX",)


@dataclass(frozen=True)
class Layout:
    """Which names of a source belong to the data set (see ``tasks.sources.layout.plan_layout``).

    Attributes:
        root: Prefix of the data set's root inside the source, ``""`` or ending in ``/``.
        images: Paths of the files relative to the root that may be images, sorted.
        tables: Names of the tables found at the root, among ``index.csv`` and ``device_review.csv``.
        n_nested: Files left out as a nested second copy of the data set.
        n_nested_only: How many of these have no counterpart in the kept tree.
        n_clutter: Other files left out (``__MACOSX``, ``.DS_Store``, files that are no images).
    """

    root: str
    images: tuple[str, ...]
    tables: tuple[str, ...]
    n_nested: int
    n_nested_only: int
    n_clutter: int


@dataclass(frozen=True)
class Fetched:
    """A source that was fetched to this machine.

    Attributes:
        kind: ``sample``, ``folder``, ``zip``, ``link``, ``bucket`` or ``dropbox``.
        name: Short name for the run folder and the report.
        folder: Local folder that holds the data set's root directly.
        layout: Which of its files are used.
        sha256: Checksum of the archive as read, or over names and contents of the files that are used.
        archive_sha256: The same for an archive; ``None`` for folders.
        sums: The checksums of a folder's files (see ``tasks.sources.checksums``) that ``sha256`` was made of; empty for
            an archive.
        vanished: Names of files of the last fetch that the source no longer holds.
    """

    kind: str
    name: str
    folder: str
    layout: Layout
    sha256: str
    archive_sha256: str | None = None
    sums: dict[str, list[Any]] = field(default_factory=dict)
    vanished: tuple[str, ...] = ()


def plan_layout(names: Iterable[str], source: str) -> Layout:
    """Decides which files of a source are used.

    The data set's root is the shallowest folder that holds ``index.csv`` or ``train/NORMAL``-like folders. A second
    such tree below it (the public archive has ``chest_xray/chest_xray``) is left out as a nested copy, Finder files
    and everything that is no image as clutter.

    Args:
        names: Paths of all files of the source, with ``/``.
        source: The source as the user named it, for messages.

    Raises:
        SourceError: If there is no such folder, or a class folder of train or test holds no image.
    """
    files = sorted(set(names))
    usable = [name for name in files if not _is_clutter(name)]
    roots = {_class_root(name) for name in usable} | {_index_root(name) for name in usable}
    found = sorted((root for root in roots if root is not None), key=lambda root: (root.count("/"), root))
    if not found:
        raise SourceError(
            f"source: {source} holds neither index.csv nor folders train/NORMAL, train/PNEUMONIA, test/NORMAL, "
            "test/PNEUMONIA; name the folder above these, or add an index.csv (path,label,patient_id)"
        )
    root = found[0]
    has_index = f"{root}index.csv" in files
    kept = [name.removeprefix(root) for name in usable if name.startswith(root)]
    images = tuple(name for name in kept if _is_image(name) and (has_index or _class_root(name) == ""))
    nested = [
        name for name in usable if _is_image(name) and name.startswith(root) and _class_root(name) not in (root, None)
    ]
    nested = [] if has_index else nested
    tables = tuple(name for name in TABLES if f"{root}{name}" in files)
    if not has_index:
        _refuse_missing_classes(images, source)
    above = set(images)
    return Layout(
        root=root,
        images=images,
        tables=tables,
        n_nested=len(nested),
        n_nested_only=sum(name.removeprefix(str(_class_root(name))) not in above for name in nested),
        n_clutter=len(files) - len(images) - len(tables) - len(nested),
    )


def plan_loose_images(names: Iterable[str]) -> tuple[tuple[str, ...], int]:
    """The files of a source of any structure that may be images, sorted, and the number of files left out.

    Left out are Finder files, hidden files, files in hidden folders, and everything that is no image by its name.
    """
    files = set(names)
    images = sorted(name for name in files if _is_image(name) and not _is_clutter(name) and not _is_hidden(name))
    return tuple(images), len(files) - len(images)


def _refuse_missing_classes(images: tuple[str, ...], source: str) -> None:
    present = {tuple(name.split("/")[:2]) for name in images}
    splits = ["train", "test"] + (["val"] if any(split == "val" for split, _ in present) else [])
    missing = [f"{split}/{folder}" for split in splits for folder in CLASS_FOLDERS if (split, folder) not in present]
    if missing:
        raise SourceError(
            f"source: {source} has no images in {', '.join(missing)}; add the folder, or bring an index.csv"
        )


def _is_clutter(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name.startswith(".") or any(part in CLUTTER_FOLDERS for part in path.parts)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _is_image(name: str) -> bool:
    return is_candidate(name)


def _class_root(name: str) -> str | None:
    """``a/b/train/NORMAL/x.jpeg`` -> ``a/b/``; ``None`` for a name that is not in such a folder."""
    parts = name.split("/")
    if len(parts) < 3 or parts[-3] not in SPLITS or parts[-2] not in CLASS_FOLDERS or not _is_image(name):
        return None
    return "".join(f"{part}/" for part in parts[:-3])


def _index_root(name: str) -> str | None:
    return name.removesuffix("index.csv") if PurePosixPath(name).name == "index.csv" else None
