"""Provenance of a run: settings, source, package versions, commit, hardware and seconds.

As JSON for the seal (``describe_…``) and in words for the report (``say_…``).
"""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from tasks.errors import SettingsError
from tasks.files import REPOSITORY, sha256_of_file
from tasks.records import Facts
from tasks.runs.run import Run
from tasks.runs.stages import STAGES_FOLDER, read_stage
from tasks.settings import TrainingSettings

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

BACKENDS = {"tensorflow": "tensorflow", "jax": "jax", "torch": "torch"}
"""Keras backend -> its distribution."""


def describe_run(run: Run) -> Facts:
    """Provenance of this run: settings, source, versions, commit, backend, hardware, seconds per stage."""
    stages = {
        path.stem: read_stage(run.folder, path.stem) for path in sorted((run.folder / STAGES_FOLDER).glob("*.json"))
    }
    source = read_stage(run.folder, "ingest").facts
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": run.settings.model_dump(mode="json"),
        "seed": run.settings.seed,
        "source": {"address": source["source"], "kind": source["kind"], "sha256": source["sha256"]},
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "git_commit": read_commit(),
        "keras_backend": read_stage(run.folder, "fit").facts["backend"],
        "hardware": describe_hardware(),
        "seconds": {name: record.seconds for name, record in stages.items()},
        "reused": sorted(name for name, record in stages.items() if record.reused),
    }


def find_backend() -> str:
    """The Keras backend that networks run on: ``KERAS_BACKEND``, else TensorFlow.

    Raises:
        SettingsError: If Keras has no such backend, or it is not installed.
    """
    backend = os.environ.get("KERAS_BACKEND") or "tensorflow"
    if backend not in BACKENDS:
        raise SettingsError(f"KERAS_BACKEND: {backend!r} is not known; set one of {', '.join(BACKENDS)}, or nothing")
    if importlib.util.find_spec(backend) is None:
        raise SettingsError(f"KERAS_BACKEND: {backend} is not installed here; install it, or unset the variable")
    return backend


def checksum_of_weights(settings: TrainingSettings) -> str | None:
    """The sha256 of the weights file that a backbone starts from; ``None`` if no file is named.

    Raises:
        SettingsError: If the file does not exist.
    """
    if settings.weights in (None, "none", "imagenet"):
        return None
    path = Path(settings.weights)
    if not path.is_file():
        raise SettingsError(f"training.weights: {path} does not exist; name a .weights.h5 file, or imagenet")
    return sha256_of_file(path)


def read_commit() -> str | None:
    """The commit of the code, with ``-dirty`` when files differ from it; ``None`` outside a git checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def describe_hardware() -> Facts:
    """Processor, cores and memory of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "system": platform.system(),
    }
