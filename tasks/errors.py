"""The errors, drawn as a tree; each message is one sentence that names the file or setting and the way out.

PipelineError            the user can fix it; exit code 2
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

LONGEST_MESSAGE = 2_000


class PipelineError(Exception):
    """An error that the user can fix; its message is one sentence that says how."""

    def __str__(self) -> str:
        """The message on one line: line breaks, terminal codes and right-to-left marks in quoted names are escaped."""
        message = super().__str__()
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE // 2]} … {message[-LONGEST_MESSAGE // 2 :]}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


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
    """A failure of a network or a server, which a retry may resolve.

    Attributes:
        retry_after_s: How long the server asks clients to wait; 0 where it does not say.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class AuditError(PipelineError):
    """The model failed a part of the audit that ``auditing.fail_on`` names."""
