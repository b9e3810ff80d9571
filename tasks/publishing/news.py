"""Whether a finished run already did what is asked for, so that there is nothing new to do."""

import importlib.metadata
import os
from pathlib import Path

from prefect import task

from tasks.devices.answers import read_answered, share_answers
from tasks.devices.files import find_screener, known_readings
from tasks.devices.readings import SHIPPED_REVIEW
from tasks.files import REPOSITORY, digest, read_record, sha256_of_file, write_json
from tasks.networks.shipped import find_network
from tasks.runs.bucket import fetch_files, keep_files, read_seal
from tasks.runs.places import SEAL
from tasks.runs.provenance import PACKAGES, checksum_of_weights
from tasks.runs.retries import AGAIN
from tasks.runs.run import Run
from tasks.runs.stages import read_stage


@task(name="note finished", **AGAIN)
def note_finished(run: Run) -> None:
    """Notes in the cache that this sealed run is done with, so that one like it has nothing new to do."""
    path = run.cache / "finished" / f"{read_record(run.folder / SEAL, news=str)['news']}.json"
    used = dict(read_stage(run.folder, "screen").parts.given["answers"])
    contents = set(run.manifest()["sha256"])
    if used == {sha: device for sha, device in read_answered(run).items() if sha in contents}:
        # Else an answer came in while it trained, and the next run has news.
        write_json(path, {"run_dir": run.address(), "report": run.address("report/index.html")})
        keep_files(run, [f"finished/{path.name}"], anew=True)


@task(name="look for news", **AGAIN)
def find_finished(run: Run, source_sha256: str) -> str | None:
    """The report of a finished run of this source with the same readings, answers, screener, settings and code."""
    share_answers(run)
    path = finished_path(run, source_sha256)
    fetch_files(run, [f"finished/{path.name}"], anew=True)
    if not path.exists():
        return None
    finished = read_record(path, run_dir=str, report=str)
    sealed = read_seal(Run(run.settings.model_copy(update={"run_dir": finished["run_dir"]})))
    # The folder may hold another run by now: what it was sealed for counts.
    return str(finished["report"]) if sealed and sealed.get("news") == path.stem else None


def finished_path(run: Run, source_sha256: str) -> Path:
    """Where the cache keeps the address of the finished run of this source with these settings and this code."""
    settings = run.settings
    chosen = settings.model_dump(mode="json", exclude={"run_dir", "train_on", "storage", "scaling", "ingestion"})
    review = Path(settings.screening.review) if settings.screening.review else SHIPPED_REVIEW
    screener = find_screener(settings.screening.screener)
    known = known_readings(screener.folder)
    code = {
        path.relative_to(REPOSITORY).as_posix(): path.read_text()
        for folder in ("flows", "tasks")
        for path in (REPOSITORY / folder).rglob("*.*")
        if path.suffix in (".py", ".j2")
    }
    parts = {
        "source": source_sha256,
        "settings": chosen,
        "ingestion": settings.ingestion.model_dump(
            include={"max_side_px", "ignore", "patients", "dicom_classes", "groups"}
        ),
        "review": sha256_of_file(review) if review.is_file() else None,
        "answers": sorted(read_answered(run).items()),
        "screener": (screener.sha256, None if known is None else sorted(known)),
        "segmenter": find_network("segmenter", settings.screening.segmenter).sha256,
        "weights": checksum_of_weights(settings.training),
        "code": code,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "backend": os.environ.get("KERAS_BACKEND"),
    }
    return run.cache / "finished" / f"{digest(parts)[:24]}.json"
