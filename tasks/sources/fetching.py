"""Fetches a source: the sample, a folder, a zip, a link, a bucket. Each becomes a local folder and a layout.

A kind of source is one line of ``_fetch_source`` and one function that fetches the bytes to ``storage.raw`` and passes
them to ``_fetch_archive`` or ``_fetch_folder``.
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

from prefect import task
from prefect.context import TaskRunContext

from tasks.addresses import holds_keys, is_archive, source_name
from tasks.errors import OutsideError, SourceError
from tasks.files import digest, make_once, read_json, room_in, write_json
from tasks.runs.artifacts import show_bytes
from tasks.runs.keys import code_version
from tasks.runs.retries import retries_of
from tasks.settings import Settings
from tasks.sources.archives import open_archive
from tasks.sources.checksums import keep_sums, read_sums, sum_file, sum_files, sum_stream
from tasks.sources.folders import list_folder
from tasks.sources.layout import Fetched, Layout, plan_layout

KINDS = "give 'sample', a folder, a .zip or .tar.gz file, an https link, s3://bucket/prefix or dropbox:/folder"


def fetch(settings: Settings) -> Fetched:
    """Fetches the source in a task of its own, which Prefect tries ``ingestion.tries`` times."""
    return fetch_once.with_options(**retries_of(settings.ingestion))(settings)


@task(name="fetch")
def fetch_once(settings: Settings) -> Fetched:
    """Fetches the source; waits as long as a server asks, which Prefect's own delay does not know."""
    try:
        return fetch_source(settings)
    except OutsideError as error:
        run = TaskRunContext.get()
        if run is not None and run.task_run.run_count <= run.task.retries:
            pause_s = min(error.retry_after_s, settings.ingestion.max_wait_s)
            asked = f" after the {pause_s:,.0f} s that the server asks for" if pause_s else ""
            print(f"{error}; attempt {run.task_run.run_count + 1} of {run.task.retries + 1} follows{asked}")
            time.sleep(pause_s)
        raise


def fetch_source(settings: Settings) -> Fetched:
    """Fetches the source that the settings name.

    Raises:
        SourceError: If it does not exist, cannot be used, or its checksum is not the expected one.
        OutsideError: If a network or server failed, so that a retry may help.
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
    if settings.ingestion.sha256 and not (is_archive(source) or source.startswith("https://")):
        raise SourceError(
            f"ingestion.sha256: {settings.public_source} is not an archive, so it has no checksum; leave the setting "
            "out"
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
            return replace(_fetch_folder(path, settings), name=path.resolve().name)
        found = path.is_file()
    except OSError as error:
        raise SourceError(
            f"source: {settings.public_source} cannot be read ({error.strerror}); give another path"
        ) from None
    if found:
        return _fetch_archive(path, settings)
    raise SourceError(f"source: {settings.public_source} does not exist; {KINDS}")


def _fetch_link(settings: Settings) -> Fetched:
    from tasks.sources.share_link import fetch_link

    archive = fetch_link(settings.source, Path(settings.storage.raw) / "links", settings.ingestion)
    return replace(_fetch_archive(archive, settings), kind="link", name=source_name(settings.public_source))


def _fetch_dropbox(settings: Settings) -> Fetched:
    from tasks.sources.dropbox_mirror import fetch_dropbox_folder

    local = Path(settings.storage.raw) / f"dropbox-{digest(settings.source)[:16]}"
    got = fetch_dropbox_folder(settings.source, local, settings.ingestion)
    name = source_name(settings.source.removeprefix("dropbox:"))
    if got.is_file():
        return replace(_fetch_archive(got, settings), kind="dropbox", name=name)
    return replace(_fetch_folder(got, settings), kind="dropbox", name=name)


def _fetch_bucket(settings: Settings) -> Fetched:
    from tasks.sources.bucket_mirror import fetch_bucket

    source, name = settings.source, source_name(settings.source)
    local = Path(settings.storage.raw) / f"bucket-{digest(source)[:16]}"

    def select(names: list[str]) -> list[str]:
        if is_archive(source):
            return names
        layout = plan_layout(names, source, settings.ingestion.ignore)
        return [layout.root + kept for kept in (*layout.images, *layout.tables)]

    copy = fetch_bucket(source, local, settings.ingestion, select, show_bytes("fetched"))
    if is_archive(source):
        return replace(_fetch_archive(copy.folder / copy.names[0], settings), kind="bucket", name=name)
    return replace(
        _describe_folder(copy.folder, plan_layout(copy.names, source, settings.ingestion.ignore), settings),
        kind="bucket",
        name=name,
        vanished=copy.vanished,
    )


def _fetch_sample(settings: Settings) -> Fetched:
    from tasks.drawings.sample import write_sample  # imported here: drawing needs scipy, which is slow to import

    parts = {
        "sample": settings.sample.model_dump(),
        "seed": settings.seed,
        "code": code_version("tasks.drawings.sample"),
    }
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
    return replace(_fetch_folder(folder / "archive", settings), kind="sample", name="sample")


def _fetch_folder(folder: Path, settings: Settings) -> Fetched:
    names, circles = list_folder(folder, "source")
    if circles:
        print(f"warning: {len(circles):,} links lead to a folder above them and are not followed, such as {circles[0]}")
    layout = plan_layout(names, settings.source, settings.ingestion.ignore)
    for image in layout.images:
        if image != image.encode(errors="replace").decode():
            raise SourceError(f"source: {settings.source} holds the file name {image!a}, which is not UTF-8; rename it")
    return _describe_folder(folder, layout, settings)


def _describe_folder(folder: Path, layout: Layout, settings: Settings) -> Fetched:
    root = folder / layout.root
    sums = sum_files(root, [*layout.images, *layout.tables], _record_of(root, settings))
    sha256 = digest({name: found[0] for name, found in sums.items()})
    return Fetched("folder", folder.name, str(root), layout, sha256, sums=sums)


def _record_of(source: Path, settings: Settings) -> Path:
    """Where the checksums of a folder or archive are kept for the next time."""
    return Path(settings.storage.raw) / "sums" / f"{digest(str(source.resolve()))[:16]}.json"


def _fetch_archive(path: Path, settings: Settings) -> Fetched:
    limits, record = settings.ingestion, _record_of(path, settings)
    with open_archive(path, limits, Path(settings.storage.raw)) as archive:
        layout = plan_layout(archive.names, str(path), limits.ignore)
        known = read_sums(record)
        found = sum_stream(
            archive.stream, known.get(path.name)
        )  # of the file that is open, even if its name now means another one
        checksum = str(found[0])
        if limits.sha256 and checksum != limits.sha256:
            raise SourceError(
                f"ingestion.sha256: {path} has {checksum}, not the expected {limits.sha256}; "
                "fetch the archive again or correct the setting"
            )
        folder = Path(settings.storage.raw) / f"{source_name(path.name)}-{checksum[:16]}"

        def unpack(beside: Path) -> None:
            kept = [*layout.images, *layout.tables]
            print(f"unpacking {len(kept):,} files of {path} into {folder}")
            n_bytes = sum(archive.count_bytes(layout.root + name) for name in kept)
            with room_in(Path(settings.storage.raw), n_bytes):
                archive.unpack(kept, layout.root, beside / "files", show_bytes("unpacked"))
            write_json(beside / "layout.json", asdict(layout))
            if sum_file(path, found)[0] != checksum:
                raise SourceError(f"source: {path} changed while it was read; run again")

        if make_once(folder, unpack, is_valid=lambda folder: _is_whole(folder, layout)):
            print(f"{path} is already unpacked in {folder}")
    keep_sums(record, {path.name: found}, known)
    kind = "zip" if path.name.lower().endswith(".zip") else "tar"
    return Fetched(kind, source_name(path.name), str(folder / "files"), layout, checksum, checksum)


def _is_whole(folder: Path, layout: Layout) -> bool:
    """Whether a folder holds all that the layout of the archive names."""
    if not (folder / "layout.json").exists() or read_json(folder / "layout.json") != json.loads(
        json.dumps(asdict(layout))
    ):
        return False
    return all((folder / "files" / name).is_file() for name in [*layout.images, *layout.tables])
