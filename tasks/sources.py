"""Sources: the sample, a folder, a zip, a link, a bucket. Each ends as a local folder with a plan of what is used.

A kind of source is one line of ``fetch_source`` and one function that brings the bytes to ``storage.raw`` and hands
them to ``_fetch_archive`` or ``_fetch_folder``.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from tasks.addresses import holds_keys
from tasks.archives import checksum_of, list_members, open_archive, unpack_members
from tasks.layout import plan_layout
from tasks.records import Fetched, Layout, SourceError
from tasks.room import room_in
from tasks.settings import Settings
from tasks.stages import code_version
from tasks.storage import checksum_of_source, digest, make_once, read_json, sha256_of_file, write_json

READERS = 4
KINDS = "give 'sample', a folder, a .zip file, an https link, s3://bucket/prefix or dropbox:/folder"


def fetch_source(settings: Settings) -> Fetched:
    """Brings the source that the settings name to this machine.

    Raises:
        SourceError: If it does not exist, cannot be used, or its checksum is not the expected one.
        DiskError: If there is no room for it.
    """
    with room_in(Path(settings.storage.raw)):
        return _fetch_source(settings)


def _fetch_source(settings: Settings) -> Fetched:
    source = settings.source
    if source.startswith("s3://") and holds_keys(source):
        raise SourceError(
            f"source: {settings.public_source} was given with credentials or a query; name s3://bucket/prefix and set "
            "AWS_PROFILE or the other AWS variables"
        )
    if settings.ingestion.sha256 and not (source.endswith(".zip") or source.startswith("https://")):
        raise SourceError(
            f"ingestion.sha256: {settings.public_source} is no archive, so it has no checksum; leave the setting out"
        )
    if source == "sample":
        return _fetch_sample(settings)
    if source.startswith("https://"):
        return _fetch_link(settings)
    if source.startswith("s3://"):
        return _fetch_bucket(settings)
    if source.startswith("dropbox:"):
        return _fetch_dropbox(settings)
    if "://" in source:
        raise SourceError(f"source: {settings.public_source} is not a kind that is known; {KINDS}")
    path = Path(source)
    try:
        if path.is_dir():
            return _fetch_folder(path, source, "folder", path.resolve().name)
        found = path.is_file()
    except OSError as error:
        raise SourceError(
            f"source: {settings.public_source} cannot be read ({error.strerror}); give another path"
        ) from None
    if found:
        return _fetch_archive(path, settings)
    raise SourceError(f"source: {settings.public_source} does not exist; {KINDS}")


def source_name(source: str) -> str:
    """A short name for run folders: the last part of the address without its ending, in letters, digits, - and _."""
    last = source.rstrip("/").split("/")[-1].removesuffix(".zip")
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in last).strip("-")
    return name[:60] or "source"


def checksums_of_files(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The sha256 of each file below a folder by its name; their digest is that of the source."""
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(names, pool.map(lambda name: checksum_of_source(folder / name), names), strict=True))


def _fetch_link(settings: Settings) -> Fetched:
    from tasks.web_links import fetch_link

    archive = fetch_link(settings.source, Path(settings.storage.raw) / "links", settings.ingestion)
    return replace(_fetch_archive(archive, settings), kind="link", name=source_name(settings.public_source))


def _fetch_dropbox(settings: Settings) -> Fetched:
    from tasks.dropbox_folder import fetch_dropbox_folder

    local = Path(settings.storage.raw) / f"dropbox-{digest(settings.source)[:16]}"
    got = fetch_dropbox_folder(settings.source, local, settings.ingestion)
    name = source_name(settings.source.removeprefix("dropbox:"))
    if got.is_file():
        return replace(_fetch_archive(got, settings), kind="dropbox", name=name)
    return _fetch_folder(got, settings.source, "dropbox", name)


def _fetch_bucket(settings: Settings) -> Fetched:
    from tasks.buckets import fetch_archive_object, fetch_bucket, is_archive_address

    source, name = settings.source, source_name(settings.source)
    local = Path(settings.storage.raw) / f"bucket-{digest(source)[:16]}"
    if is_archive_address(source):
        archive = fetch_archive_object(source, local, settings.ingestion)
        return replace(_fetch_archive(archive, settings), kind="bucket", name=name)

    def select(names: list[str]) -> list[str]:
        layout = plan_layout(names, source)
        return [layout.root + kept for kept in (*layout.images, *layout.tables)]

    copy = fetch_bucket(source, local, settings.ingestion, select)
    layout = plan_layout(copy.names, source)
    root = copy.folder / layout.root
    sums = checksums_of_files(root, [*layout.images, *layout.tables])
    return Fetched("bucket", name, str(root), layout, digest(sums), sums=sums, vanished=copy.vanished)


def _fetch_sample(settings: Settings) -> Fetched:
    from data.sample import write_sample  # imported here: drawing needs scipy, which takes its time

    parts = {"sample": settings.sample.model_dump(), "seed": settings.seed, "code": code_version("data.sample")}
    folder = Path(settings.storage.raw) / f"sample-{digest(parts)[:16]}"

    def draw(beside: Path) -> None:
        print(f"drawing {settings.sample.n_images:,} chest X-rays into {folder}")
        write_sample(
            beside / "archive",
            beside / "truth",
            n_images=settings.sample.n_images,
            side_px=settings.sample.side_px,
            seed=settings.seed,
            device_effect=settings.sample.device_effect,
        )

    if make_once(folder, draw):
        print(f"the sample is already drawn in {folder}")
    return _fetch_folder(folder / "archive", "sample", "sample", "sample")


def _fetch_folder(folder: Path, source: str, kind: str, name: str) -> Fetched:
    walk = os.walk(folder, onerror=_refuse_folder)
    names = [(Path(parent) / file).relative_to(folder).as_posix() for parent, _, files in walk for file in files]
    layout = plan_layout(names, source)
    for image in layout.images:
        if image != image.encode(errors="replace").decode():
            raise SourceError(f"source: {source} holds the file name {image!a}, which is not UTF-8; rename it")
    root = folder / layout.root
    sums = checksums_of_files(root, [*layout.images, *layout.tables])
    return Fetched(kind, name, str(root), layout, digest(sums), sums=sums)


def _refuse_folder(error: OSError) -> None:
    raise SourceError(
        f"source: {error.filename} cannot be read ({error.strerror}); put it right or remove it, and run again"
    )


def _fetch_archive(path: Path, settings: Settings) -> Fetched:
    limits = settings.ingestion
    with open_archive(path) as archive:
        names = list_members(archive, path, limits)
        layout = plan_layout(names, str(path))
        checksum = checksum_of(archive)
        if limits.sha256 and checksum != limits.sha256:
            raise SourceError(
                f"ingestion.sha256: {path} has {checksum}, not the expected {limits.sha256}; "
                "fetch the archive again or correct the setting"
            )
        folder = Path(settings.storage.raw) / f"{source_name(path.name)}-{checksum[:16]}"

        def unpack(beside: Path) -> None:
            kept = [*layout.images, *layout.tables]
            print(f"unpacking {len(kept):,} files of {path} into {folder}")
            with room_in(
                Path(settings.storage.raw), sum(archive.getinfo(layout.root + name).file_size for name in kept)
            ):
                unpack_members(archive, path, kept, layout.root, beside / "files", limits, _progress("unpacked"))
            write_json(beside / "layout.json", asdict(layout))
            if sha256_of_file(path) != checksum:
                raise SourceError(f"source: {path} changed while it was read; run again")

        if make_once(folder, unpack, is_valid=lambda folder: _is_whole(folder, layout)):
            print(f"{path} is already unpacked in {folder}")
    return Fetched("zip", source_name(path.name), str(folder / "files"), layout, checksum, checksum)


def _is_whole(folder: Path, layout: Layout) -> bool:
    """Whether a folder holds what today's plan of the archive keeps."""
    if not (folder / "layout.json").exists() or read_json(folder / "layout.json") != json.loads(
        json.dumps(asdict(layout))
    ):
        return False
    return all((folder / "files" / name).is_file() for name in [*layout.images, *layout.tables])


def _progress(verb: str) -> Callable[[int, int], None]:
    """A line at each quarter and at most every two seconds: readable in a log as in a terminal."""
    last = {"quarter": 0, "time": time.monotonic()}

    def show(done: int, total: int) -> None:
        quarter = 4 * done // max(total, 1)
        if quarter > last["quarter"] or time.monotonic() - last["time"] > 10:
            last.update(quarter=quarter, time=time.monotonic())
            print(
                f"{verb} {done / 1e6:,.0f} of {total / 1e6:,.0f} MB ({100 * done // max(total, 1)} %)", file=sys.stdout
            )

    return show
