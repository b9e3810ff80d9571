"""Addresses: of sources, without their secrets (a share link is a key, as is a password), and of folders."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

BARE_LINK = re.compile(
    r"(?P<rest>\W{0,8}(\w{1,5}\W{1,4})?)(([^/\s]*[.@])?dropbox(usercontent)?\.com(:\d+)?/|.*[?&]rlkey=)",
    re.DOTALL | re.IGNORECASE,
)
"""A share link copied without its ``https://``, or without a part of it; it is still a key."""


def hide_keys(address: str) -> str:
    """An address as it may be shown: of a web address only host and file name, since path and query are keys.

    A path on this machine, and an address in a bucket without credentials or query, are shown as they are.
    """
    scheme, found, _ = address.partition("://")
    if not found and (link := BARE_LINK.match(address)):
        return hide_keys("https://" + address[link.end("rest") :]).removeprefix("https://")
    if not found or (scheme == "s3" and not holds_keys(address)):
        return address
    try:
        parts = urlsplit(address)
        folder, _, name = parts.path.rstrip("/").rpartition("/")
        if parts.hostname and name and not (folder or parts.query or parts.fragment or "@" in parts.netloc):
            return address
        return f"{scheme}://{parts.hostname or '…'}/…/{name or '…'}"
    except ValueError:
        return f"{scheme}://…/…/…"


def holds_keys(address: str) -> bool:
    """Whether an address in a bucket holds credentials or the query of a signed request."""
    return "@" in address.partition("://")[2].split("/")[0] or "?" in address


ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


def is_archive(address: str) -> bool:
    """Whether an address or name ends like an archive that can be read."""
    return address.lower().endswith(ARCHIVES)


def without_ending(name: str) -> str:
    """A file name without the ending of an archive."""
    return next((name[: -len(ending)] for ending in ARCHIVES if name.lower().endswith(ending)), name)


def source_name(source: str) -> str:
    """A short name for run folders: the last part of the address without its ending, in letters, digits, - and _."""
    last = without_ending(source.rstrip("/").split("/")[-1])
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in last).strip("-")
    return name[:60] or "source"


def _expand_home(value: str) -> str:
    """``~/x`` and ``~name/x`` as a shell expands them: it does not in ``--flag=~/x``, a deployment, or a form."""
    first, slash, rest = value.partition("/")
    with suppress(RuntimeError):  # no such user: a file may begin with ~ too
        return f"{Path(first).expanduser()}{slash}{rest}" if first.startswith("~") else value
    return value


def _refuse_address(value: str) -> str:
    if "://" in value:
        raise ValueError("should be a folder on this machine")
    return value


def _refuse_other_buckets(value: str) -> str:
    name = r"(?!\.+(/|$))[A-Za-z0-9._=+@-]+"
    if "://" in value and not re.fullmatch(rf"s3://[A-Za-z0-9][A-Za-z0-9._-]{{1,254}}(/{name})+/?", value):
        raise ValueError("should be a folder on this machine, or s3://bucket/prefix/run")
    return value


Place = Annotated[str, AfterValidator(_expand_home)]
"""A path on this machine, or an address; every setting and argument that may be a path has this type or one below."""
Folder = Annotated[Place, AfterValidator(_refuse_address)]
"""A path on this machine."""
RunFolder = Annotated[Place, AfterValidator(_refuse_other_buckets)]
"""A path on this machine, or ``s3://bucket/prefix/run``."""
