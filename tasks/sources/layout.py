"""Which files of a source may belong to the data set: told from names alone, before anything is fetched or unpacked.

A file whose name does not rule it out is an image here; ingestion then looks at its content (``tasks.pixels.content``).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from pathlib import PurePosixPath
from typing import Any

from tasks.errors import SourceError
from tasks.pixels.content import is_candidate, suggests_picture
from tasks.records import CLASS_FOLDERS, NORMAL

TABLES = ("index.csv", "device_review.csv")
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_WORDS |= dict.fromkeys(("val", "valid", "validation"), "val")
"""Names of folders, and words in the column ``split``, in any case -> the split."""
SUBTYPE_WORDS = {"bacteria": "bacteria", "virus": "virus", "viral": "virus"}
"""Parts of the names of folders below a class folder, in any case -> the subtype."""
CLUTTER_FOLDERS = (
    *("__macosx", ".trashes", ".trash", ".thumbnails", "lost+found", "network trash folder", "temporary items"),
    *("$recycle.bin", "recycler", "system volume information", "found.000"),
    *("@eadir", "#recycle", "#snapshot", "~snapshot", "@recycle", "@recently-snapshot", "@tmp", ".@__thumb"),
)
"""Folders of macOS and Linux, Windows, and a NAS for thumbnails, deleted and older files; in lower case."""
CLUTTER_FILES = (".", "synophoto_thumb", "synophoto_film", "synoindex_")
"""How names of hidden files and of a NAS's thumbnails start; in lower case."""


@dataclass(frozen=True)
class Layout:
    """Which names of a source belong to the data set (see ``tasks.sources.layout.plan_layout``).

    Attributes:
        root: Prefix of the data set's root inside the source, ``""`` or ending in ``/``.
        images: Paths of the files relative to the root that may be images, sorted.
        tables: Names of the tables found at the root, among ``index.csv`` and ``device_review.csv``.
        n_nested: Files left out as a nested second copy of the data set.
        n_nested_only: How many of these have no counterpart in the kept tree.
        n_clutter: Other files left out that are no X-rays (``__MACOSX``, ``.DS_Store``, texts).
        n_ignored: Files left out by ``ingestion.ignore``.
        n_unused: Pictures left out because they lie beside the class folders, or outside of the root of an index.
        left_out: The names of all files that are neither images nor tables, as they are in the source, sorted.
        unused: One of the pictures that ``n_unused`` counts, or ``""``.
        idle: Patterns of ``ingestion.ignore`` that fit no file.
    """

    root: str
    images: tuple[str, ...]
    tables: tuple[str, ...]
    n_nested: int
    n_nested_only: int
    n_clutter: int
    n_ignored: int
    n_unused: int
    left_out: tuple[str, ...]
    unused: str
    idle: tuple[str, ...]


@dataclass(frozen=True)
class Fetched:
    """A source that was fetched to this machine.

    Attributes:
        kind: ``sample``, ``folder``, ``zip``, ``tar``, ``link``, ``bucket`` or ``dropbox``.
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


@dataclass(frozen=True)
class Place:
    """Where a picture lies: ``a/Train/NORMAL/b/x.png`` -> ``a/``, ``train``, 0, ``b/x.png``."""

    root: str
    split: str
    label: int
    below: str


def find_place(name: str) -> Place | None:
    """The place of a picture in folders like ``train/NORMAL``, in any case; ``None`` if it is in no such folder.

    Nor is it below one that says otherwise: masks, another class, a split.
    """
    parts = name.split("/")
    for at, (split, group) in enumerate(pairwise(parts[:-1])):
        if split.lower() in SPLIT_WORDS and group.upper() in CLASS_FOLDERS:
            label = CLASS_FOLDERS[group.upper()]
            for part in parts[at + 2 : -1]:
                other = CLASS_FOLDERS.get(part.upper(), label) != label or (label == NORMAL and find_subtypes(part))
                if other or part.lower() in SPLIT_WORDS or "mask" in part.lower():
                    return None
            return Place(
                "".join(f"{p}/" for p in parts[:at]), SPLIT_WORDS[split.lower()], label, "/".join(parts[at + 2 :])
            )
    return None


def find_subtypes(text: str) -> set[str]:
    """The subtypes that a name or path mentions, in any case."""
    return {subtype for word, subtype in SUBTYPE_WORDS.items() if word in text.lower()}


def find_splits(name: str) -> set[str]:
    """The splits that the folders of a name say, at any depth and in any case."""
    return {SPLIT_WORDS[part.lower()] for part in name.split("/")[:-1] if part.lower() in SPLIT_WORDS}


def plan_layout(names: Iterable[str], source: str, ignore: Sequence[str] = ()) -> Layout:
    """Decides which files of a source are used.

    The data set's root is the shallowest folder that holds ``index.csv`` or ``train/NORMAL``-like folders. All pictures
    below a class folder are used. A second such tree below the root (the public archive has ``chest_xray/chest_xray``)
    is left out as a nested copy if at least half of its names are in the first one too. Files of systems are clutter.

    Args:
        names: Paths of all files of the source, with ``/``.
        source: The source as the user named it, for messages.
        ignore: Patterns of files or folders to leave out (``ingestion.ignore``).

    Raises:
        SourceError: If there is no such folder, a class folder of train or test holds no image, or a folder of pictures
            lies beside these folders and is none of them.
    """
    files = sorted(set(names))
    ignored = {name for name in files if _is_ignored(name, ignore)}
    seen = [name for name in files if name not in ignored and not _is_clutter(name)]
    usable = [name for name in seen if not _is_hidden(name)]
    places = {name: place for name in usable if is_candidate(name) and (place := find_place(name))}
    pictures = [name for name in usable if name in places or suggests_picture(name)]
    found = {place.root for place in places.values()}
    found |= {name.removesuffix("index.csv") for name in usable if f"/{name}".endswith("/index.csv")}
    if not found:
        raise SourceError(
            f"source: {source} holds neither index.csv nor folders train/NORMAL, train/PNEUMONIA, test/NORMAL, "
            "test/PNEUMONIA; name the folder above these, or add an index.csv (path,label,patient_id)"
        )
    root = min(found, key=lambda name: (name.count("/"), name))
    _refuse_other_tables(root, usable, source)
    nested: dict[str, str] = {}
    if f"{root}index.csv" in usable:
        used = {name for name in seen if name.startswith(root) and is_candidate(name)}
    else:
        used = {name for name, place in places.items() if place.root == root}
        nested = _find_copies(places, root)
        _refuse_unknown_folders([n for n in pictures if n not in used and n not in nested], used, source)
        refuse_missing_classes({(places[name].split, places[name].label) for name in used}, source)
    unused = [name for name in pictures if name not in used and name not in nested]
    tables = tuple(name for name in TABLES if f"{root}{name}" in usable)
    kept = used | {root + name for name in tables}
    return Layout(
        root=root,
        images=tuple(sorted(name.removeprefix(root) for name in used)),
        tables=tables,
        n_nested=len(nested),
        n_nested_only=sum(root + name not in used for name in nested.values()),
        n_clutter=len(files) - len(kept) - len(nested) - len(ignored) - len(unused),
        n_ignored=len(ignored),
        n_unused=len(unused),
        left_out=tuple(name for name in files if name not in kept),
        unused=next(iter(unused), ""),
        idle=tuple(pattern for pattern in ignore if not any(_is_ignored(name, [pattern]) for name in ignored)),
    )


def _refuse_other_tables(root: str, names: Sequence[str], source: str) -> None:
    """Refuses a table that would be overlooked: called nearly like one of ``TABLES``, or a second index beside."""
    for name in names:
        folder, _, file = name.rpartition("/")
        stem, _, ending = file.lower().rpartition(".")
        if folder == root.rstrip("/") and f"{stem}.csv" in TABLES and ending in ("csv", "xlsx") and file not in TABLES:
            raise SourceError(
                f"source: {source} has {name!r}; call it {stem}.csv (an .xlsx file may be called so too), or leave it "
                "out with ingestion.ignore"
            )
    beside = [name for name in names if name.count("/") == root.count("/") and f"/{name}".endswith("/index.csv")]
    if len(beside) > 1 and f"{root}index.csv" in beside:
        raise SourceError(
            f"source: {source} has {' and '.join(beside[:2])}; join the tables above both folders, name one folder as "
            "the source, or leave one out with ingestion.ignore"
        )


def plan_loose_images(names: Iterable[str]) -> tuple[tuple[str, ...], int]:
    """The files of a source of any structure that may be images, sorted, and the number of files left out.

    Left out are files of systems, hidden files, files in hidden folders, and everything that is no image by its name.
    """
    files = set(names)
    images = sorted(name for name in files if is_candidate(name) and not _is_clutter(name) and not _is_hidden(name))
    return tuple(images), len(files) - len(images)


# -- class folders -----------------------------------------------------------------------------------------------------


def _find_copies(places: dict[str, Place], root: str) -> dict[str, str]:
    """The pictures of trees below the root that repeat at least half of its names -> their names without the tree."""
    trees: dict[str, dict[str, str]] = defaultdict(dict)
    for name, place in places.items():
        if place.root != root and place.root.startswith(root):
            trees[place.root][name] = name.removeprefix(place.root)
    copies = [
        found for found in trees.values() if 2 * sum(root + name in places for name in found.values()) >= len(found)
    ]
    return {name: below for found in copies for name, below in found.items()}


def _refuse_unknown_folders(pictures: list[str], used: set[str], source: str) -> None:
    """Refuses pictures in a folder that is neither a class folder, nor below one, nor above one."""
    known = {folder for name in used for folder in accumulate(f"{part}/" for part in name.split("/")[:-1])}
    unknown: dict[str, list[str]] = defaultdict(list)
    for name in pictures:
        folders = accumulate(f"{part}/" for part in name.split("/")[:-1])
        if folder := next((folder for folder in folders if folder not in known), None):
            unknown[folder].append(name)
    for folder, found in unknown.items():
        raise SourceError(
            f"source: {source} has {len(found):,} pictures in {folder!r}, no class folder of train, val or test, such "
            f"as {found[0]!r} ({len(unknown):,} such folders); move them, name what is to be used in an index.csv "
            f"(path,label,patient_id), or leave them out with ingestion.ignore, such as {folder.rstrip('/')!r}"
        )


def refuse_missing_classes(present: set[tuple[str, int]], source: str) -> None:
    """Refuses a source if a class of train, test, or a val that exists is not among its splits and labels."""
    splits = ["train", "test"] + (["val"] if any(split == "val" for split, _ in present) else [])
    wanted = {f"{split}/{folder}": (split, label) for split in splits for folder, label in CLASS_FOLDERS.items()}
    if missing := [name for name, place in wanted.items() if place not in present]:
        raise SourceError(
            f"source: {source} has no images in {', '.join(missing)}; add the folder, or bring an index.csv"
        )


# -- single names ------------------------------------------------------------------------------------------------------


def _is_clutter(name: str) -> bool:
    path = PurePosixPath(name.lower())
    return path.name.startswith(CLUTTER_FILES) or any(part in CLUTTER_FOLDERS for part in path.parts)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _is_ignored(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits the name or a folder above it; one without ``/`` fits a file or folder at any depth."""
    parts = name.split("/")
    heads = list(accumulate(parts, lambda head, part: f"{head}/{part}")) if patterns else []
    return any(
        part == pattern.rstrip("/") or fnmatchcase(part, pattern.rstrip("/"))
        for pattern in patterns
        for part in (heads if "/" in pattern.rstrip("/") else parts)
    )
