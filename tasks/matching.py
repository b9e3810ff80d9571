"""Which image a row of a table means: the one join by path, for all tables that people bring.

A path in a table was written by another program on another machine: with ``\\`` for ``/``, in another Unicode form or
case, or relative to another folder. What still fits no image is counted, and refused beyond a share.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tasks.errors import TableError


class HasPath(Protocol):
    """A row of a table that names an image."""

    @property
    def path(self) -> str:
        """Of the image."""


Row = TypeVar("Row", bound=HasPath)


@dataclass(frozen=True)
class Match:
    """What the paths of a table mean.

    Attributes:
        images: Path in the table -> path of the image.
        left_out: Paths that name a file of the source that is no image of the data set.
        missed: Paths that name no file.
        unclear: Path in the table -> two images that it fits.
    """

    images: dict[str, str]
    left_out: list[str]
    missed: list[str]
    unclear: dict[str, tuple[str, str]]


def match_paths(named: Iterable[str], images: Collection[str], left_out: Collection[str] = ()) -> Match:
    """Finds the image that each path of a table means.

    In this order: the same text; the same but for separators, ``./``, Unicode form and case; the same below a folder
    that the paths which are left have in common (``chest_xray/``); the end of an image's path, if only one ends so. The
    last two find no image that another row names in full. Nothing is guessed: a path that fits two images is unclear.

    Args:
        named: Paths in the table.
        images: Paths of the images.
        left_out: Names of the source's other files; a path that means one of them is no miss.
    """
    there, plain = set(images), {row: plain_path(row) for row in named}
    whole, ends = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for image in sorted(there):
        whole[plain_path(image)].append(image)
        for end in _ends(image):
            ends[end].append(image)
    same = {row: [row] if row in there else whole.get(path, []) for row, path in plain.items()}
    taken = {fits[0] for fits in same.values() if len(fits) == 1}
    free = {path for path, fits in whole.items() if not taken & set(fits)}
    prefix = _common_folder([plain[row] for row, fits in same.items() if not fits], free)
    below = {row: plain[row].removeprefix(prefix) for row, fits in same.items() if not fits}
    others = {end for name in left_out for end in _ends(name)}
    match = Match({}, [], [], {})
    for row, fits in same.items():
        if row in below:
            alike = whole.get(below[row]) or ends.get(below[row], [])
            fits = [] if taken.issuperset(alike) and len(alike) == 1 else alike
        if len(fits) == 1:
            match.images[row] = fits[0]
        elif fits:
            match.unclear[row] = (fits[0], fits[1])
        else:
            (match.left_out if below[row] in others else match.missed).append(row)
    return match


def accept_match(match: Match, table: str, images: Collection[str], max_unmatched: float) -> str:
    """Refuses a table that names too few files of the source; returns what is to be warned of, else ``""``.

    Args:
        match: What its paths mean.
        table: The table in messages, ``setting: file``.
        images: Paths of the images, for an example.
        max_unmatched: Largest accepted share of its paths that name no file (``quality.max_unmatched``).

    Raises:
        TableError: If a path fits two images, none fits an image, or too many fit no file.
    """
    for row, (one, other) in match.unclear.items():
        raise TableError(f"{table} has the path {row!r}, which fits {one!r} and {other!r}; write the path of one")
    n_missed, n_other = len(match.missed), len(match.left_out)
    n = len(match.images) + n_missed + n_other
    example = "".join(f", such as {row!r}" for row in (*match.missed, *match.left_out)[:1])
    like = f"paths are relative to the data set's root, like {next(iter(images), 'train/NORMAL/x.jpeg')}"
    if not match.images:
        raise TableError(f"{table}: none of its {n:,} paths is an image of the source{example}; {like}")
    if n_missed > max_unmatched * n:
        raise TableError(
            f"{table}: {n_missed:,} of {n:,} paths name no file of the source{example}; {like}; give the table of "
            "these images, or raise quality.max_unmatched"
        )
    missed = f"{n_missed:,} of {n:,} paths name no file of the source, {n_other:,} name files that are not used"
    return f"{table}: {missed}{example}" if example else ""


def match_rows(
    rows: Collection[Row],
    table: str,
    images: Collection[str],
    max_unmatched: float,
    left_out: Collection[str] = (),
    warn: Callable[[str], None] = print,
) -> dict[str, Row]:
    """The row of each image, of a table that has one line per image; its order is the table's.

    Args:
        rows: Those of the table.
        table: The table in messages, ``setting: file``.
        images: Paths of the images.
        max_unmatched: Largest accepted share of its paths that name no file.
        left_out: Names of the source's other files.
        warn: Called with the sentence to warn of, if there is one.

    Raises:
        TableError: If it lists an image twice, or as ``accept_match``.
    """
    match = match_paths((row.path for row in rows), images, left_out)
    if warning := accept_match(match, table, images, max_unmatched):
        warn(warning)
    found: dict[str, Row] = {}
    for row in rows:
        if (image := match.images.get(row.path)) is None:
            continue
        if image in found:
            raise TableError(f"{table} lists {image!r} twice; keep one line")
        found[image] = row
    return found


def plain_path(path: str) -> str:
    """A path without what differs between systems: ``.\\Train\\x.JPEG`` -> ``train/x.jpeg``, in Unicode's form C."""
    text = unicodedata.normalize("NFC", path.strip().replace("\\", "/")).casefold()
    return "/".join(part for part in text.split("/") if part not in ("", "."))


def _ends(path: str) -> list[str]:
    """The plain path, and it without its first folder, its first two …"""
    parts = plain_path(path).split("/")
    return ["/".join(parts[n:]) for n in range(len(parts))]


def _common_folder(rows: Iterable[str], places: Collection[str]) -> str:
    """The folder without which most of the plain paths are images; ``""`` if there is none, or no single one."""
    votes: Counter[str] = Counter()
    for row in rows:
        parts = row.split("/")
        for n in range(1, len(parts) if ".." not in parts else 0):
            if "/".join(parts[n:]) in places:
                votes["/".join(parts[:n]) + "/"] += 1
                break
    best = votes.most_common(2)
    return best[0][0] if best and (len(best) == 1 or best[0][1] > best[1][1]) else ""
