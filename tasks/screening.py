"""Screen: which images show a medical device, and which therefore leave the training split.

Reads a review table and ``manifest.parquet``; writes ``has_device``, ``device_reviewed`` and more reasons in
``excluded``, and ``excluded.csv`` for people. Images with devices stay in validation and test on purpose: a device in
the picture is what the network will meet, and the only way to see whether it leans on it.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import show_table
from tasks.records import Facts, TableError
from tasks.settings import Settings
from tasks.storage import (
    SHIPPED_REVIEW,
    read_manifest,
    run_folder,
    run_stage,
    sha256_of_file,
    write_manifest,
    write_whole,
)
from tasks.tables import read_table, refuse_values

SHIPPED_APPLIES_FROM = 0.95
SHOWS_DEVICE = "shows a medical device (reviewed)"


@dataclass(frozen=True)
class Review:
    """Readings by path: 1 a device is seen, 0 none is; ``name`` says where they come from."""

    name: str
    readings: dict[str, int]


@task(name="screen", cache_policy=NO_CACHE)
def screen(settings: Settings, folder: str) -> Facts:
    """Keeps images that are known to show a medical device out of training."""
    run = run_folder(settings)
    review = find_review(settings.screening.review, Path(folder), read_manifest(run)["path"])

    def make(out: Path) -> Facts:
        manifest = apply_review(read_manifest(run), review.readings)
        write_manifest(out, manifest)
        left = manifest.loc[manifest["excluded"].fillna("") != "", ["path", "excluded"]]
        write_whole(out / "excluded.csv", left.rename(columns={"excluded": "reason"}).to_csv(index=False))
        return {"review": review.name, "n_readings": len(review.readings), **count_devices(manifest)}

    inputs = {
        "manifest": sha256_of_file(run / "manifest.parquet"),
        "review": sorted(review.readings.items()),
        "name": review.name,
    }
    facts = run_stage(settings, "screen", module=__name__, inputs=inputs, make=make)
    print(
        f"screened with {facts['review']}: {facts['n_excluded']:,} images with devices leave training, "
        f"{facts['n_unreviewed_train']:,} training images were not reviewed and stay"
        + (" (taken from the cache)" if facts["reused"] else "")
    )
    show_table("devices", facts["rates"], "Share of reviewed images that show a device")
    return facts


def find_review(setting: str | None, folder: Path, paths: "pd.Series[str]") -> Review:
    """The review table that applies: the one named, the source's own, or the shipped one where it belongs.

    Raises:
        TableError: If the table does not fit, or a table that applies holds no path of the source.
    """
    own = folder / "device_review.csv"
    named = Path(setting) if setting is not None else own if own.exists() else None
    if named is not None:
        origin = "screening.review" if setting is not None else "device_review.csv of the source"
        readings = read_review(named, origin)
        if not set(readings) & set(paths):
            raise TableError(
                f"{origin}: no path of {named} is in the source; paths are relative to the data set's root, like "
                f"{paths.iloc[0]}"
            )
        return Review(named.name if setting is not None else "the source's own device_review.csv", readings)
    if SHIPPED_REVIEW.exists():
        shipped = read_review(SHIPPED_REVIEW, "data/device_review.csv")
        present = len(set(shipped) & set(paths))
        if shipped and present >= SHIPPED_APPLIES_FROM * len(shipped):
            return Review("the shipped data/device_review.csv", shipped)
    return Review("no review table", {})


def read_review(path: Path, setting: str) -> dict[str, int]:
    """Readings of a CSV with ``path,device`` (1 seen, 0 not; other columns are for people): path -> 0 or 1.

    Raises:
        TableError: On missing columns, other values, or two different readings of one path.
    """
    table = read_table(path, setting, ("path", "device"))
    refuse_values(table, "device", ("0", "1"), path, setting)
    readings: dict[str, int] = {}
    for row_path, device in zip(table["path"], table["device"], strict=True):
        if readings.setdefault(row_path, int(device)) != int(device):
            raise TableError(f"{setting}: {path} reads {row_path!r} as 0 and as 1; keep one line")
    return readings


def apply_review(manifest: pd.DataFrame, readings: dict[str, int]) -> pd.DataFrame:
    """Fills ``has_device`` and ``device_reviewed``, and excludes training rows that show a device.

    A reading holds for all files with the same content; where these were read differently, a device counts as seen.

    Args:
        manifest: Columns ``path, sha256, split, excluded``.
        readings: path -> 0 or 1.
    """
    manifest = manifest.copy()
    read = manifest["path"].map(readings)
    by_content = read.groupby(manifest["sha256"]).transform("max")
    manifest["has_device"] = by_content.map({0.0: False, 1.0: True}).astype("boolean")
    manifest["device_reviewed"] = by_content.notna()
    reasons = manifest["excluded"].fillna("")
    leaves = (manifest["split"] == "train") & manifest["has_device"].fillna(False) & (reasons == "")
    manifest["excluded"] = reasons.mask(leaves, SHOWS_DEVICE)
    return manifest


def count_devices(manifest: pd.DataFrame) -> Facts:
    """Counts after screening; a rate is ``None`` where nothing was reviewed."""
    reasons = manifest["excluded"].fillna("")
    train = manifest["split"] == "train"
    kept = train & (reasons == "")
    rates = []
    for name, rows in (
        ("train before", train),
        ("train after", kept),
        *((s, manifest["split"] == s) for s in ("val", "test")),
    ):
        for label, label_name in ((0, "normal"), (1, "pneumonia")):
            group = manifest[rows & (manifest["label"] == label)]
            known = group["has_device"].dropna()
            rates.append(
                {
                    "split": name,
                    "class": label_name,
                    "images": len(group),
                    "reviewed": len(known),
                    "with_device": int(known.sum()),
                    "rate": round(float(known.mean()), 4) if len(known) else None,
                }
            )
    return {
        "n_excluded": int((reasons == SHOWS_DEVICE).sum()),
        "n_train_kept": int(kept.sum()),
        "n_unreviewed_train": int((kept & manifest["has_device"].isna()).sum()),
        "rates": rates,
    }
