"""What made a run, in words for the report."""

from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tasks.records import Facts
from tasks.settings import Settings

STAGES = {
    "ingest": "List the images",
    "check_source": "Check the data set as it came",
    "pack": "Decode and pack the pixels",
    "split": "Split by patient",
    "screen": "Screen for devices",
    "segment": "Look for the lungs",
    "check_prepared": "Check what is used",
    "fit": "Train the networks",
    "calibrate": "Join and calibrate the networks",
    "evaluate": "Measure the network",
    "export": "Export the network",
    "explain": "Explain single answers",
    "audit": "Audit what the network looks at",
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
