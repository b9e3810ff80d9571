"""What made a run: settings, source, package versions, commit, hardware and seconds.

As JSON for the seal (``describe_…``) and in words for the report (``say_…``).
"""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tasks.records import Facts, SettingsError
from tasks.settings import Settings, TrainingSettings
from tasks.stages import STAGES_FOLDER, read_stage
from tasks.storage import REPOSITORY, run_folder, sha256_of_file

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
"""Keras backend -> the distribution that brings it."""

STAGES = {
    "ingest": "List the images",
    "check_source": "Check the data set as it came",
    "split": "Split by patient",
    "pack": "Decode and pack the pixels",
    "screen": "Screen for devices",
    "check_prepared": "Check what is used",
    "fit": "Train the networks",
    "calibrate": "Join and calibrate the networks",
    "evaluate": "Measure the network",
    "explain": "Explain single answers",
}


def describe_run(settings: Settings) -> Facts:
    """What made this run: settings, source, versions, commit, backend, hardware, seconds per stage."""
    run = run_folder(settings)
    stages = {path.stem: read_stage(run, path.stem) for path in sorted((run / STAGES_FOLDER).glob("*.json"))}
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


def find_backend() -> str:
    """The Keras backend that networks run on: ``KERAS_BACKEND``, else TensorFlow.

    Raises:
        SettingsError: If Keras has no such backend.
    """
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if backend not in BACKENDS:
        raise SettingsError(f"KERAS_BACKEND: {backend!r} is not known; set one of {', '.join(BACKENDS)}, or nothing")
    return backend


def checksum_of_weights(settings: TrainingSettings) -> str | None:
    """The sha256 of the file of weights that a backbone starts from; ``None`` where no file is named.

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


def say_provenance(record: Facts) -> Facts:
    """Commit, versions, hardware and seconds per stage, in words."""
    hardware = record["hardware"]
    return {
        "commit": record["git_commit"],
        "python": record["python"],
        "backend": record["keras_backend"],
        "packages": record["packages"],
        "hardware": f"{hardware['cores']} cores, {hardware['memory_gb']:g} GB memory, {hardware['system']} "
        f"on {hardware['machine']}",
        "stages": [
            {"name": says, "took": say_seconds(record["seconds"][stage]), "reused": stage in record["reused"]}
            for stage, says in (STAGES | {s: s for s in record["seconds"] if s not in STAGES}).items()
            if stage in record["seconds"]
        ],
    }


def say_seconds(seconds: float) -> str:
    """``0.2 s``, ``38 s``, ``12 min 5 s`` or ``2 h 3 min``."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def say_settings(settings: Settings) -> list[Facts]:
    """Every setting in its group: name, value, whether it differs from the default, and its sentence."""
    general: Facts = {"name": "general", "says": "What is run, where, and with which seed.", "rows": []}
    groups = [general]
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            rows = [_say_setting(key, getattr(value, key), f) for key, f in type(value).model_fields.items()]
            groups.append({"name": name, "says": (field.description or "").replace("``", ""), "rows": rows})
        else:
            general["rows"].append(_say_setting(name, value, field))
    return groups


def _say_setting(name: str, value: Any, field: FieldInfo) -> Facts:
    return {"name": name, "value": say_value(value), "changed": value != field.default, "says": field.description or ""}


def say_value(value: Any) -> str:
    """A setting's value for reading; of a web address only the host, because a share link is a key."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return ", ".join(say_value(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        return f"{urlsplit(value).hostname or 'web'} (address not shown)"
    return str(value)
