"""The nouns that cross a task boundary, the columns of the manifest, and the errors.

The errors, drawn as a tree; each message is one sentence that names the file or setting and the way out:

    PipelineError            the user can mend it; exit code 2
    ├── SettingsError        a flag or setting
    ├── SourceError          the source: not there, not readable, not in a known layout
    │   └── ArchiveError     an archive: broken, hostile or beyond a limit
    ├── TableError           index.csv or a review table
    ├── DataCheckError       a critical data check failed
    ├── RunError             a run folder or a file in it: missing, changed, not ours
    ├── DiskError            no room is left where something is to be written
    ├── OutsideError         a network or server failed: the one kind that is retried
    └── AuditError           the audit found a shortcut that the settings do not accept
"""

from dataclasses import dataclass, field
from typing import Any

Facts = dict[str, Any]
"""What a stage tells about itself: JSON, counts and short strings, never arrays."""

NORMAL, PNEUMONIA = 0, 1
CLASS_FOLDERS = {"NORMAL": NORMAL, "PNEUMONIA": PNEUMONIA}
CLASS_NAMES = {NORMAL: "normal", PNEUMONIA: "pneumonia"}
SPLITS = ("train", "val", "test")
SUBTYPES = ("normal", "bacteria", "virus", "unknown")

READ_DEVICE = "shows a medical device (reviewed)"
SCORED_DEVICE = "shows a medical device (screener)"
DOUBTFUL_DEVICE = "may show a medical device (screener)"
DEVICE_REASONS = (READ_DEVICE, SCORED_DEVICE, DOUBTFUL_DEVICE)
"""What ``excluded`` says of training images that screening took out."""

# Nullable dtypes throughout: missing means unknown, never 0.
MANIFEST_DTYPES: dict[str, str] = {
    "image_id": "string",
    "path": "string",
    "sha256": "string",
    "width_px": "Int32",
    "height_px": "Int32",
    "label": "Int8",
    "subtype": "string",
    "patient_id": "string",
    "patient_known": "boolean",
    "source_split": "string",
    "split": "string",
    "duplicate_of": "string",
    "device_score": "Float32",
    "has_device": "boolean",
    "device_reviewed": "boolean",
    "excluded": "string",
}


LONGEST_SAID = 2_000


class PipelineError(Exception):
    """Something that the user can mend; its message is one sentence that says how."""

    def __str__(self) -> str:
        """In one line, whatever names it quotes: line breaks, terminal codes and turned writing come as escapes."""
        said = super().__str__()
        if len(said) > LONGEST_SAID:
            said = f"{said[: LONGEST_SAID // 2]} … {said[-LONGEST_SAID // 2 :]}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in said)


class SettingsError(PipelineError):
    """A setting or flag that does not exist or is out of bounds."""


class SourceError(PipelineError):
    """A source that is not there or not in a known layout."""


class ArchiveError(SourceError):
    """An archive that is broken, hostile or beyond a limit."""


class TableError(PipelineError):
    """An ``index.csv`` or review table with missing columns, unknown values or contradictions."""


class DataCheckError(PipelineError):
    """At least one critical data check failed."""


class RunError(PipelineError):
    """A run folder that lacks a file, or holds one that was changed."""


class DiskError(PipelineError):
    """A disk without room for what is to be written."""


class OutsideError(PipelineError):
    """A failure of a network or a server, which another try may mend.

    Attributes:
        retry_after_s: How long the server asks to be left alone; 0 where it does not say.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Layout:
    """Which names of a source belong to the data set (see ``tasks.layout.plan_layout``).

    Attributes:
        root: Prefix of the data set's root inside the source, ``""`` or ending in ``/``.
        images: Paths of the images relative to the root, sorted.
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
    """A source that now lies on this machine.

    Attributes:
        kind: ``sample``, ``folder``, ``zip``, ``link``, ``bucket`` or ``dropbox``.
        name: Short name for the run folder and the report.
        folder: Local folder that holds the data set's root directly.
        layout: What of it is used.
        sha256: Checksum of the archive as read, or over names and contents of the files that are used.
        archive_sha256: The same for an archive; ``None`` for folders.
        sums: The sums of a folder's files (see ``tasks.file_sums``), as they went into its checksum; empty for an
            archive.
        vanished: Names that the last fetch brought and the source no longer holds.
    """

    kind: str
    name: str
    folder: str
    layout: Layout
    sha256: str
    archive_sha256: str | None = None
    sums: dict[str, list[Any]] = field(default_factory=dict)
    vanished: tuple[str, ...] = ()


class AuditError(PipelineError):
    """The model failed a part of the audit that ``auditing.fail_on`` names."""
