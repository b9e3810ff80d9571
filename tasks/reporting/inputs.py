"""What went into a run and what was left out, for the report and the model card; and words that both share.

Names of files and patients stay out of it.
"""

from pathlib import Path

import pandas as pd

from tasks.records import CLASS_NAMES, SPLITS, Facts
from tasks.runs.manifest import key_pictures
from tasks.runs.stages import read_stage

NOTICE = "Research software. Not a medical device, not for clinical use."
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
KINDS = {"sample": "drawn sample", "zip": "zip archive", "tar": "tar archive"}
REASONS = {
    "duplicate": "Identical copy of an image that is kept",
    "conflict": "Equal pictures with opposite labels: none is kept in training",
    "undecodable": "The file cannot be read as an image",
    "shows a medical device (reviewed)": "A person saw a medical device in it (training images only)",
    "shows a medical device (screener)": "The screener sees a medical device in it (training images only)",
    "may show a medical device": "The screener is not sure whether it shows a medical device (training images only)",
}
OTHER_REASON = "Another reason, named in excluded.csv of the run folder"


def describe_source(run: Path, manifest: pd.DataFrame) -> Facts:
    """Name, kind, checksum and counts of the source, as it came and as it is used."""
    facts = read_stage(run, "ingest").facts
    usable = manifest[manifest["excluded"].fillna("") == ""]
    n_distinct = int(key_pictures(manifest).nunique())
    return {
        "name": facts["name"],
        "kind": KINDS.get(facts["kind"], facts["kind"]),
        "sha256": facts["sha256"],
        "sha256_of": "the archive" if facts.get("archive_sha256") else "names and contents of all files",
        "n_images": len(manifest),
        "n_distinct": n_distinct,
        "n_copies": len(manifest) - n_distinct,
        "came": count_images(manifest, "source_split"),
        "used": count_images(usable, "split"),
    }


def count_images(manifest: pd.DataFrame, column: str) -> list[Facts]:
    """A row per split that exists: of each class and in all, images, known patients, images of unknown ones."""
    rows = []
    for name in SPLITS:
        part = manifest[manifest[column] == name]
        if not len(part):
            continue
        row: Facts = {"split": SPLIT_NAMES[name].capitalize(), "all": _size(part)}
        row |= {CLASS_NAMES[label]: _size(part[part["label"] == label]) for label in CLASS_NAMES}
        rows.append(row)
    return rows


def _size(rows: pd.DataFrame) -> Facts:
    unknown = int(rows["patient_id"].isna().sum())
    return {"images": len(rows), "patients": int(rows["patient_id"].nunique()), "unknown": unknown}


def describe_left_out(run: Path, manifest: pd.DataFrame) -> Facts:
    """Images that are excluded, by reason and split, and what else was left out or stays on purpose."""
    reasons = manifest["excluded"].fillna("")
    excluded = manifest[reasons != ""].assign(why=reasons[reasons != ""].map(plain_reason))
    ingest, pack, screen = (read_stage(run, name).facts for name in ("ingest", "pack", "screen"))
    rows = []
    for why in (*REASONS.values(), OTHER_REASON):
        part = excluded[excluded["why"] == why]
        if len(part) or why != OTHER_REASON:
            counts = {name: int((part["split"] == name).sum()) for name in SPLITS}
            rows.append({"reason": why, **counts, "all": len(part)})
    left_out = ("n_vanished", "n_nested", "n_nested_only", "n_clutter", "n_unused", "n_ignored")
    also = {name: ingest.get(name, 0) for name in left_out}
    also |= {name: pack[name] for name in ("n_test_copies", "n_conflicts_test", "n_near", "n_near_test")}
    also |= {
        "n_patients_unknown": int((manifest["patient_id"].isna() & ~reasons.str.startswith("undecodable")).sum()),
        # Without the examples: they name files, and a report goes to more people than a log.
        "warnings": [sentence.partition(", such as ")[0] for sentence in ingest.get("warnings", ())],
        "n_unscreened_train": screen["n_unscreened_train"],
    }
    return {"n": len(excluded), "reasons": rows, **also}


def plain_reason(reason: str) -> str:
    """A reason of the manifest without the names of files in it."""
    return next((says for start, says in REASONS.items() if reason.startswith(start)), OTHER_REASON)
