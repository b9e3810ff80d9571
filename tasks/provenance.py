"""What made a run: settings, source, package versions, commit, hardware and seconds, for the seal and the report."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime

from tasks.records import Facts
from tasks.settings import Settings
from tasks.storage import REPOSITORY, STAGES_FOLDER, read_json, read_stage, run_folder

PACKAGES = (
    "prefect",
    "tensorflow",
    "keras",
    "numpy",
    "pandas",
    "scikit-learn",
    "scikit-image",
    "pillow",
    "lime",
    "great-expectations",
)


def describe_run(settings: Settings) -> Facts:
    """What made this run: settings, source, versions, commit, backend, hardware, seconds per stage."""
    run = run_folder(settings)
    stages = {path.stem: read_json(path) for path in sorted((run / STAGES_FOLDER).glob("*.json"))}
    source = read_stage(run, "ingest")["facts"]
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings.model_dump(mode="json"),
        "seed": settings.seed,
        "source": {"address": source["source"], "kind": source["kind"], "sha256": source["sha256"]},
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "git_commit": read_commit(),
        "keras_backend": read_stage(run, "fit")["facts"]["backend"],
        "hardware": describe_hardware(),
        "seconds": {name: record["seconds"] for name, record in stages.items()},
        "reused": sorted(name for name, record in stages.items() if record["reused"]),
    }


def read_commit() -> str | None:
    """The commit of the code, with ``-dirty`` when files differ from it; ``None`` outside a git checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def describe_hardware() -> Facts:
    """Processor, cores and memory of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"machine": platform.machine(), "cores": os.cpu_count(), "memory_gb": round(memory / 1e9, 1), "system": platform.system()}
