"""Seal: ``run.json``, written last, says what made a run; a run folder without it is unfinished."""

import importlib.metadata
import os
from pathlib import Path

from prefect import task

from tasks.answers import read_answered, share_answers
from tasks.provenance import PACKAGES, checksum_of_weights, describe_run
from tasks.records import Facts
from tasks.retries import AGAIN
from tasks.run_copies import address_of, fetch_files, keep_files, read_seal, send
from tasks.screener_files import find_screener, known_readings
from tasks.settings import Settings
from tasks.stages import read_stage
from tasks.storage import (
    REPOSITORY,
    SEAL,
    SHIPPED_REVIEW,
    cache_folder,
    digest,
    is_in_bucket,
    read_manifest,
    read_record,
    run_folder,
    sha256_of_file,
    write_json,
)


@task(name="seal", **AGAIN)
def seal(settings: Settings) -> Facts:
    """Writes ``run.json``, last of all, and leads ``data/runs/latest`` here."""
    run = run_folder(settings)
    record = describe_run(settings)
    path = _finished_path(settings, record["source"]["sha256"])
    write_json(run / SEAL, {**record, "news": path.stem})
    send(settings, [SEAL])
    if not is_in_bucket(settings):
        _lead_to(run)
    return record


@task(name="note finished", **AGAIN)
def note_finished(settings: Settings) -> None:
    """Notes in the cache that this sealed run is done with, so that one like it has nothing new to do."""
    run = run_folder(settings)
    path = cache_folder(settings) / "finished" / f"{read_record(run / SEAL, news=str)['news']}.json"
    used = dict(read_stage(run, "screen")["parts"]["inputs"]["answers"])
    contents = set(read_manifest(run)["sha256"])
    if used == {sha: device for sha, device in read_answered(settings).items() if sha in contents}:
        # Else an answer came in while it trained, and the next run has news.
        write_json(path, {"run_dir": address_of(settings), "report": address_of(settings, "report/index.html")})
        keep_files(settings, [f"finished/{path.name}"], anew=True)


@task(name="look for news", **AGAIN)
def find_finished(settings: Settings, source_sha256: str) -> str | None:
    """The report of a finished run of this source with the same readings, answers, screener, settings and code."""
    share_answers(settings)
    path = _finished_path(settings, source_sha256)
    fetch_files(settings, [f"finished/{path.name}"], anew=True)
    if not path.exists():
        return None
    finished = read_record(path, run_dir=str, report=str)
    sealed = read_seal(settings.model_copy(update={"run_dir": finished["run_dir"]}))
    # The folder may hold another run by now: what it was sealed for counts.
    return str(finished["report"]) if sealed and sealed.get("news") == path.stem else None


def _finished_path(settings: Settings, source_sha256: str) -> Path:
    """Where the cache keeps the address of the finished run of this source with these settings and this code."""
    chosen = settings.model_dump(mode="json", exclude={"run_dir", "train_on", "storage", "scaling", "ingestion"})
    review = Path(settings.screening.review) if settings.screening.review else SHIPPED_REVIEW
    screener = find_screener(settings.screening.screener)
    known = known_readings(screener.folder)
    code = {
        f"{d}/{p.name}": p.read_text()
        for d in ("flows", "tasks", "data")
        for p in (REPOSITORY / d).glob("*.*")
        if p.suffix in (".py", ".j2")
    }
    parts = {
        "source": source_sha256,
        "settings": chosen,
        "max_side_px": settings.ingestion.max_side_px,
        "review": sha256_of_file(review) if review.is_file() else None,
        "answers": sorted(read_answered(settings).items()),
        "screener": (screener.sha256, None if known is None else sorted(known)),
        "weights": checksum_of_weights(settings.training),
        "code": code,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "backend": os.environ.get("KERAS_BACKEND"),
    }
    return cache_folder(settings) / "finished" / f"{digest(parts)[:24]}.json"


def _lead_to(run: Path) -> None:
    """Makes ``data/runs/latest`` lead to a run, where one may write there: a finished run does not fail for it."""
    runs = Path("data/runs")
    try:
        runs.mkdir(parents=True, exist_ok=True)
        beside = runs / f".latest.{os.getpid()}"
        beside.unlink(missing_ok=True)
        beside.symlink_to(os.path.relpath(run.resolve(), runs.resolve()))
        os.replace(beside, runs / "latest")
    except OSError as error:
        print(f"{runs / 'latest'} does not lead to this run: {error.strerror}")
