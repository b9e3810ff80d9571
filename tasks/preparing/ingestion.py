"""Ingest: from a source on this machine to the manifest, one row per image.

Reads the source; writes ``manifest.parquet`` with labels, subtypes, patients, sizes and checksums, and the reasons why
rows are excluded so far (identical files, contradictions, files that are not images).
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import pandas as pd
from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from tasks.addresses import is_archive
from tasks.errors import SourceError
from tasks.files import open_source
from tasks.matching import match_rows
from tasks.pixels.content import HEAD_BYTES, UndecodableError, is_picture, refuse_bytes, suggests_picture
from tasks.pixels.decoding import choose_bits, in_turn, read_header
from tasks.pixels.dicom import describe_dicom
from tasks.preparing.copies import count_copies, exclude_copies
from tasks.preparing.groups import add_tags
from tasks.preparing.patients import add_patients, describe_patients
from tasks.records import CLASS_NAMES, NORMAL, Facts
from tasks.runs.artifacts import show_table
from tasks.runs.manifest import image_id, write_manifest
from tasks.runs.run import Run
from tasks.runs.stages import stage_task
from tasks.settings import IngestionSettings
from tasks.sources.checksums import READERS, Sum, sum_file, sum_stream
from tasks.sources.layout import (
    SPLIT_WORDS,
    Fetched,
    Layout,
    find_place,
    find_splits,
    find_subtypes,
    refuse_missing_classes,
)
from tasks.tables import Label, blank_unknown, list_rows

MANY_FOLDERS = 20
"""More different folders than this below the class folders are patients or series rather than classes."""
LEFT_OUT = ("n_nested", "n_clutter", "n_unused", "n_ignored")


@stage_task("ingest")
def ingest(run: Run, fetched: Fetched) -> Facts:
    """Lists the images of the source."""

    max_unmatched = run.settings.quality.max_unmatched

    def make(out: Path) -> Facts:
        warnings: list[str] = []
        manifest, patients = list_images(fetched, run.settings.ingestion, max_unmatched, warnings.append)
        write_manifest(out, manifest)
        warnings += describe_doubts(manifest, fetched.layout)
        deep = manifest["bits"].dropna()
        deepest = str(manifest["image_id"][deep.idxmax()]) if len(deep) else ""
        more = {
            "bits": choose_bits(deep),
            "n_deep": len(deep),
            "deepest": deepest,
            "patients": patients,
            "warnings": warnings,
        }
        return describe_manifest(manifest, fetched) | {"source": run.settings.public_source} | more

    given = {
        "sha256": fetched.sha256,
        "layout": asdict(fetched.layout),
        "vanished": fetched.vanished,
        "source": run.settings.public_source,
        "max_side_px": run.settings.ingestion.max_side_px,
        "max_unmatched": max_unmatched,
        **run.settings.ingestion.model_dump(include={"patients", "dicom_classes", "groups"}),
    }
    facts = run.stage("ingest", given=given, make=make, packages=("pillow", "pydicom", "pandas"))
    show_manifest(facts)
    return facts


def show_manifest(facts: Facts) -> None:
    """Shows what was listed, left out and is to be warned of."""
    for warning in facts["warnings"]:
        print(f"warning: {warning}")
    more = {"pictures that are not used": facts["n_unused"], "by ingestion.ignore": facts["n_ignored"]}
    print(
        f"left out {sum(facts[name] for name in LEFT_OUT):,} files: {facts['n_nested']:,} of a nested second copy "
        f"({facts['n_nested_only']:,} not present above it), {facts['n_clutter']:,} that are no images of the data set"
        + "".join(f", {n:,} {what}" for what, n in more.items() if n)
    )
    print(
        f"{facts['n_images']:,} files, {facts['n_distinct']:,} distinct; "
        f"{facts['n_duplicates_excluded']:,} copies excluded, {facts['n_test_copies']:,} copies kept in test, "
        f"{facts['n_conflicts']:,} files with contradicting labels"
    )
    used = f"{facts['n_deep']:,} files: {facts['bits']} of 16 bits used, most by image {facts['deepest']}"
    deep = [used] if facts["n_deep"] else []
    patients = describe_patients(facts["patients"], facts["n_patients_unknown"], facts["n_images"])
    for line in [*deep, *facts["dicom"], *patients]:
        print(line)
    show_table("source", facts["counts"], f"Images in {facts['source']}")


def describe_doubts(manifest: pd.DataFrame, layout: Layout) -> list[str]:
    """Sentences to warn of: a test split that is missing, files that are not used, and what may go with the class."""
    warnings = []
    if not (manifest["source_split"] == "test").any():
        warnings.append("the source has no test split: nothing will be measured on one, only on validation")
    if layout.n_unused:
        where = "are in no class folder, or beside the folder of index.csv, and are not used"
        warnings.append(f"{layout.n_unused:,} pictures {where}, such as {layout.unused!r}")
    if layout.idle:
        warnings.append(f"ingestion.ignore: nothing in the source is called {layout.idle[0]!r}")
    if archives := [name for name in layout.left_out if is_archive(name)]:
        warnings.append(
            f"{len(archives):,} archives beside the images are not read, such as {archives[0]!r}; unpack them"
        )
    odd = manifest["path"].map(lambda path: bool(find_subtypes(PurePosixPath(path).name)))
    if n_odd := int((odd & (manifest["label"] == NORMAL)).sum()):
        warnings.append(f"{n_odd:,} images in the class normal are called like a bacterial or viral pneumonia")
    used = manifest.dropna(subset="bits").groupby("label")["bits"].max().map(lambda bits: choose_bits([bits]))
    if used.nunique() > 1:
        counts = " and ".join(f"{bits} of 16 bits in {CLASS_NAMES[label]} images" for label, bits in used.items())
        warnings.append(f"{counts} are used, so that exposure may go with the class; export both in the same way")
    places = [find_place(path) for path in manifest["path"]] if "index.csv" not in layout.tables else []
    folders = [place.below.rpartition("/")[0] for place in places if place]
    below = Counter(folder for folder in folders if folder and not find_subtypes(folder))
    if 0 < len(below) <= MANY_FOLDERS:
        named = ", ".join(sorted(below)[:5])
        warnings.append(
            f"{below.total():,} pictures lie in folders below the class folders ({named}) and count as of these "
            "classes; ingestion.ignore leaves a folder out"
        )
    return warnings


def list_images(
    fetched: Fetched, settings: IngestionSettings, max_unmatched: float = 0.0, warn: Callable[[str], None] = print
) -> tuple[pd.DataFrame, Facts]:
    """The manifest of a source, and what told its patients.

    A row per image, columns up to ``excluded``; only headers are decoded.

    Args:
        fetched: The source.
        settings: Longest side of an image that is decoded, and what tells patients.
        max_unmatched: Largest accepted share of the rows of an ``index.csv`` that name no file.
        warn: Called with each sentence to warn of.

    Raises:
        TableError: If the source has an ``index.csv`` that does not fit.
        SettingsError: If ``ingestion.patients`` does not fit.
        SourceError: If a file changed since the checksum of the source was computed.
    """
    folder = Path(fetched.folder)
    index = folder / "index.csv" if "index.csv" in fetched.layout.tables else None
    if index:
        layout = fetched.layout
        table = read_index_table(index, layout.images, layout.left_out, max_unmatched, warn)
    else:
        table = pd.DataFrame([describe_path(path) for path in fetched.layout.images])
    with ThreadPoolExecutor(READERS) as pool:
        read = pool.map(lambda path: read_file(folder / path, settings, fetched.sums.get(path)), table["path"])
        files = pd.DataFrame(list(read))
    manifest = pd.concat([table.reset_index(drop=True), files], axis=1)
    refuse_changed({**dict(zip(table["path"], files["sha256"], strict=True)), **sum_tables(fetched)}, fetched.sums)
    if index is None:
        manifest = manifest[manifest["is_picture"]]
        refuse_missing_classes({*zip(manifest["source_split"], manifest["label"], strict=True)}, fetched.name)
    manifest = add_tags(manifest, index, settings.groups)
    manifest, patients = add_patients(manifest, settings.patients, index is not None)  # no name of clutter counts
    manifest["image_id"] = [image_id(path) for path in manifest["path"]]
    return exclude_copies(manifest.sort_values("path", ignore_index=True)), patients


def sum_tables(fetched: Fetched) -> dict[str, str]:
    """The sha256 of each table of a source."""
    return {
        name: str(sum_file(Path(fetched.folder) / name, fetched.sums.get(name))[0]) for name in fetched.layout.tables
    }


def refuse_changed(sums: dict[str, str], before: dict[str, Sum]) -> None:
    """Refuses a source if one of its files changed since ``before``; files without an earlier checksum are ignored.

    Raises:
        SourceError: If a file changed.
    """
    changed = [name for name, checksum in sums.items() if before.get(name, [checksum])[0] != checksum]
    if changed:
        raise SourceError(f"source: {changed[0]} changed while it was read; run again")


def read_file(path: Path, settings: IngestionSettings, known: Sum | None = None) -> Facts:
    """``sha256``, ``is_picture``, ``width_px``, ``height_px``, ``bits`` and ``excluded`` of a file.

    ``is_picture`` is whether it gets a row, by content or name; ``excluded`` the reason if its header is not that of a
    picture that is taken; ``bits`` those in use of 16, missing for a picture of 8 bits. A DICOM file also has
    ``patient``, ``groups`` and ``notes`` (see ``read_header``), which are not to be written as they are.

    Args:
        path: The file.
        settings: What is accepted, and which groups are asked for.
        known: Its earlier checksum; an unchanged file is not read again.
    """
    facts: Facts = {"width_px": pd.NA, "height_px": pd.NA, "bits": pd.NA, "excluded": ""}
    with open_source(path) as stream:
        facts["sha256"] = sum_stream(stream, known)[0]
        n_bytes = os.fstat(stream.fileno()).st_size
        stream.seek(0)
        facts["is_picture"] = is_picture(path.name, stream.read(HEAD_BYTES))
        stream.seek(0)
        try:
            refuse_bytes(n_bytes)
            with in_turn(n_bytes):  # data before the pixels is read whole
                header = read_header(stream, settings.max_side_px, settings.dicom_classes, settings.groups)
            facts |= {name: value for name, value in header.items() if value is not None}
        except UndecodableError as error:
            facts["excluded"] = f"undecodable: {error}"
    return facts


def describe_path(path: str) -> Facts:
    """Split, label and subtype from a path such as ``train/NORMAL/IM-0115-0001.jpeg``.

    Args:
        path: Its folders name a split and a class (see ``tasks.sources.layout.find_place``).
    """
    place = find_place(path)
    assert place is not None
    subtype = subtype_of(place.below, place.label)
    return {"path": path, "source_split": place.split, "label": place.label, "subtype": subtype}


def subtype_of(text: str, label: int) -> str:
    """``normal`` for label 0; ``bacteria`` or ``virus`` if a name, or a path below a class folder, says one of them."""
    if label == 0:
        return "normal"
    found = find_subtypes(text)
    return found.pop() if len(found) == 1 else "unknown"


@dataclass(frozen=True, slots=True)
class IndexRow:
    """A row of ``index.csv``."""

    path: str
    label: Label
    patient_id: Annotated[str, BeforeValidator(blank_unknown)]
    subtype: Annotated[
        Literal["", "normal", "bacteria", "virus", "unknown"],
        BeforeValidator(blank_unknown),
    ] = ""
    split: Annotated[
        Literal["", "train", "val", "test"],
        BeforeValidator(lambda word: SPLIT_WORDS.get(word.lower(), blank_unknown(word))),
    ] = ""


def read_index_table(
    path: Path,
    images: tuple[str, ...],
    left_out: tuple[str, ...] = (),
    max_unmatched: float = 0.0,
    warn: Callable[[str], None] = print,
) -> pd.DataFrame:
    """The rows of an ``index.csv``, as ``docs/data.md`` describes it, by image; an empty cell is unknown.

    Args:
        path: The table.
        images: Paths of the images that exist.
        left_out: Names of the source's other files.
        max_unmatched: Largest accepted share of its rows that name no file.
        warn: Called with each sentence to warn of.

    Raises:
        TableError: On missing columns, unknown values, too many paths that fit no image, or one that fits two or is
            listed twice.
    """
    listed = list_rows(path, "index.csv", IndexRow)
    matched = match_rows(listed, f"index.csv: {path}", images, max_unmatched, left_out, warn)
    warn_of_spellings({row.patient_id for row in listed}, warn)
    rows = [
        {
            "path": image,
            "source_split": row.split or (splits.pop() if len(splits := find_splits(image)) == 1 else ""),
            "label": row.label,
            "subtype": row.subtype or subtype_of(PurePosixPath(image).name, row.label),
            "patient_id": row.patient_id or pd.NA,
        }
        for image, row in matched.items()
    ]
    return fill_splits(pd.DataFrame(rows), warn)


def warn_of_spellings(patients: set[str], warn: Callable[[str], None]) -> None:
    """Warns of patients whose names differ in case, or in zeros that a spreadsheet drops: ``7`` and ``007``."""
    spelled = Counter(re.sub(r"(?<!\d)0+(?=\d)|\.0$", "", patient.casefold()) for patient in patients)
    if n_twice := sum(n > 1 for n in spelled.values()):
        warn(
            f"index.csv: {n_twice:,} patients are spelled in several ways, which differ in case or in zeros alone, and "
            "each way counts as a child; spell them alike if they are one"
        )


def fill_splits(table: pd.DataFrame, warn: Callable[[str], None]) -> pd.DataFrame:
    """The table with ``train`` as the ``source_split`` of images of which neither a column nor a folder tells it."""
    unknown = table["source_split"] == ""
    if unknown.any() and not unknown.all():
        warn(
            f"index.csv: {int(unknown.sum()):,} of {len(table):,} images have no split, such as "
            f"{table.loc[unknown, 'path'].iloc[0]!r}; they are used for training and validation"
        )
    return table.assign(source_split=table["source_split"].mask(unknown, "train"))


def describe_manifest(manifest: pd.DataFrame, fetched: Fetched) -> Facts:
    """Counts of a manifest after ingestion, for the log and the report."""
    counts = manifest.groupby(["source_split", "label"]).agg(n=("path", "size"), patients=("patient_id", "nunique"))
    notes = list(manifest["notes"].dropna()) if "notes" in manifest else []
    undecodable = manifest["excluded"].str.startswith("undecodable")
    others = set(fetched.layout.images) - set(manifest["path"])  # that an index does not name, or that are no pictures
    pictures = {name for name in others if "index.csv" in fetched.layout.tables and suggests_picture(name)}
    return {
        "kind": fetched.kind,
        "name": fetched.name,
        "sha256": fetched.sha256,
        "archive_sha256": fetched.archive_sha256,
        "n_vanished": len(fetched.vanished),
        "vanished": list(fetched.vanished),
        "table_sha256": sum_tables(fetched),
        "n_images": len(manifest),
        "n_distinct": int(manifest["sha256"].nunique()),
        "n_clutter": fetched.layout.n_clutter + len(others) - len(pictures),
        "n_unused": fetched.layout.n_unused + len(pictures),
        **{name: getattr(fetched.layout, name) for name in ("n_ignored", "n_nested", "n_nested_only")},
        **count_copies(manifest),
        "n_dicom": len(notes),
        "dicom": describe_dicom(notes),
        "n_undecodable": int(undecodable.sum()),
        "n_patients_unknown": int((manifest["patient_id"].isna() & ~undecodable).sum()),
        "counts": [
            {"split": split, "class": "pneumonia" if label else "normal", "images": int(n), "patients": int(patients)}
            for (split, label), (n, patients) in counts.iterrows()
        ],
    }
