"""The manifest of a run: a row per image; each stage reads it and writes it back with more columns."""

import hashlib
import hmac
import os
from pathlib import Path

import pandas as pd

from tasks.errors import RunError
from tasks.files import digest
from tasks.records import group_columns

# Nullable dtypes throughout: missing means unknown, never 0.
MANIFEST_DTYPES: dict[str, str] = {
    "image_id": "string",
    "path": "string",
    "sha256": "string",
    "width_px": "Int32",
    "height_px": "Int32",
    "label": "Int8",
    "subtype": "string",
    "patient_id": "string",
    "group_id": "string",
    "source_split": "string",
    "split": "string",
    "pixels_sha256": "string",
    "duplicate_of": "string",
    "device_score": "Float32",
    "has_device": "boolean",
    "device_reviewed": "boolean",
    "excluded": "string",
}


def image_id(path: str) -> str:
    """The first 16 hex digits of the sha256 of an image's path."""
    return hashlib.sha256(path.encode()).hexdigest()[:16]


def key_pictures(manifest: pd.DataFrame) -> "pd.Series[str]":
    """What tells pictures apart: the checksum of the packed pixels, else, before packing, that of the file."""
    known = manifest.get("pixels_sha256")
    return manifest["sha256"] if known is None else known.fillna(manifest["sha256"])


def hide_patients(patients: "pd.Series[str]", sha256: "pd.Series[str]", n_digits: int = 8) -> "pd.Series[str]":
    """A pseudonym for each patient: ``P-3f9a2c1b``; missing where the patient is.

    A keyed hash; its key is made of the checksums of all files. So the same data give the same names, there is no
    secret to keep, and only people who have the data can trace a name back. With a public salt, or none, every number
    like ``person12`` could be tried, since there are few. When data are added, names change.

    Args:
        patients: Any of them.
        sha256: Of all files of the data set.
        n_digits: Hexadecimal digits of the hash.
    """
    key = digest(["patients", sorted(sha256)]).encode()
    return patients.map(
        lambda patient: f"P-{hmac.new(key, str(patient).encode(), hashlib.sha256).hexdigest()[:n_digits]}",
        na_action="ignore",
    )


# -- the manifest ------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> pd.DataFrame:
    """Reads ``manifest.parquet``: a row per image, nullable dtypes, sorted by path.

    Raises:
        RunError: If it is missing, or not a manifest.
    """
    path = folder / "manifest.parquet"
    if not path.exists():
        raise RunError(f"{path} is missing: run the prepare flow on this run folder first")
    try:
        manifest = pd.read_parquet(path, dtype_backend="numpy_nullable")
    except Exception:  # pyarrow raises many kinds for damaged files
        manifest = pd.DataFrame()
    if not set(MANIFEST_DTYPES) <= set(manifest.columns):
        raise RunError(f"{path} is not what the prepare flow wrote: remove it and run that flow on this run folder")
    return manifest


def write_manifest(folder: Path, manifest: pd.DataFrame) -> None:
    """Writes ``manifest.parquet``: the fixed columns in their dtypes, missing ones empty, and what DICOM files and
    ``ingestion.groups`` add (``notes``, ``by_<name>``)."""
    columns = {
        name: manifest[name].astype(dtype) if name in manifest else pd.array([pd.NA] * len(manifest), dtype=dtype)
        for name, dtype in MANIFEST_DTYPES.items()
    }
    added = [*group_columns(manifest), *(["notes"] if "notes" in manifest else [])]
    columns |= {name: manifest[name].astype("string") for name in added}
    table = pd.DataFrame(columns).sort_values("path", ignore_index=True)
    path = folder / "manifest.parquet"
    beside = path.with_name(path.name + ".partial")
    table.to_parquet(beside, index=False)
    os.replace(beside, path)
