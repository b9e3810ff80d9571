"""Pack: decodes every image once to uint8 at 224 px, in shards that later stages map into memory.

Reads the files of the source; writes shards into the cache and ``arrays/index.json`` with their names into the run
folder. In ``manifest.parquet`` it marks files that do not decode and equal pictures, and fills ``group_id``;
``same_pictures.csv`` names the pairs. Shards are found by the checksums of their files, so that a later run packs only
new images. They are planned, packed in parallel, and gathered.
"""

import hashlib
import io
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from prefect import task

from tasks.errors import RunError, SourceError
from tasks.files import digest, locked, open_source, read_record, write_json, write_whole
from tasks.pixels.content import MAX_FILE_BYTES, UndecodableError
from tasks.pixels.decoding import decode, in_turn
from tasks.pixels.greys import SIDE_PX
from tasks.pixels.packed import PackedImages
from tasks.pixels.shards import LOST_SHARDS, shards_exist
from tasks.preparing.copies import compare_pictures, count_pairs, write_pairs
from tasks.records import Facts
from tasks.runs.bucket import fetch_files, fetch_lists, keep_files
from tasks.runs.keys import code_version, package_versions
from tasks.runs.manifest import write_manifest
from tasks.runs.run import Run
from tasks.runs.stages import stage_task
from tasks.sources.fetching import fetch

SHARD_IMAGES = 100
DECODERS = ("pillow", "pydicom", "python-gdcm")


@task(name="plan packing")
def plan_packing(run: Run, bits: int) -> list[dict[str, str]]:
    """The shards still to pack: for each its files, sha256 -> path; ``bits`` as ingestion found them."""
    shelf = find_shelf(run, bits)
    waiting = find_packable(run.manifest())
    fetch_shelf(run, shelf, set(waiting["sha256"]))
    waiting = waiting[~waiting["sha256"].isin(list(known_files(shelf)))]
    starts = range(0, len(waiting), SHARD_IMAGES)
    shards = [waiting.iloc[start : start + SHARD_IMAGES] for start in starts]
    return [dict(zip(rows["sha256"], rows["path"], strict=True)) for rows in shards]


@task(name="pack shards")
def pack_shards(run: Run, folder: str, bits: int, shards: Sequence[dict[str, str]]) -> None:
    """Packs shards into the cache, here and shared."""
    shelf = find_shelf(run, bits)
    for files in shards:
        name = pack_shard(find_files(run, Path(folder), files), files, shelf, **read_decoding(run, bits))
        for ending in ("npy", "json"):  # in this order: a list means that its shard exists
            keep_files(run, [f"arrays/{shelf.name}/{name}.{ending}"])


@stage_task("pack")
def pack(run: Run, bits: int, n_new: int) -> Facts:
    """Indexes the shard and row of each image, of which ``n_new`` were packed by this run."""
    shelf = find_shelf(run, bits)

    def make(out: Path) -> Facts:
        manifest = run.manifest()
        wanted = set(find_packable(manifest)["sha256"])
        fetch_shelf(run, shelf, wanted)
        known = known_files(shelf)
        if missing := wanted - set(known):
            raise RunError(f"scaling.runner: {len(missing):,} of the packed images not found; {LOST_SHARDS}")
        manifest = mark_undecodable(manifest, {sha: reason for sha, (_, _, reason) in known.items() if reason})
        index = index_arrays(manifest, known)
        write_json(out / "arrays" / "index.json", index)
        manifest, pairs = compare_pictures(manifest, PackedImages(out, run.cache), index["images"])
        write_manifest(out, manifest)
        write_whole(out / "same_pictures.csv", write_pairs(pairs))
        return {
            "n_packed": len(index["images"]),
            "n_new": n_new,
            "n_shards": len(index["shards"]),
            "n_undecodable": int(manifest["excluded"].fillna("").str.startswith("undecodable").sum()),
            **count_pairs(manifest, pairs),
        }

    facts = run.stage(
        "pack",
        reads=["manifest.parquet"],
        given={"shelf": shelf.name, **read_decoding(run, bits)},
        make=make,
        packages=(*DECODERS, "numpy", "scipy"),
        is_valid=lambda entry: shards_exist(entry / "arrays" / "index.json", run.cache),
    )
    print(
        f"packed {facts['n_packed']:,} images in {facts['n_shards']:,} shards, {n_new:,} of them new; "
        f"{facts['n_undecodable']:,} are refused or do not decode"
    )
    for line in describe_copies(facts):
        print(line)
    return facts


def describe_copies(facts: Facts) -> list[str]:
    """Lines for the log about equal and nearly equal pictures, as far as ``ingest`` could not see them."""
    named = ", such as image " + ", ".join(facts["conflicts_test"]) if facts["conflicts_test"] else ""
    lines = {
        "n_other_files": "{n_other_files:,} files show the picture of a file with other bytes; with these, "
        "{n_duplicates_excluded:,} copies are excluded, {n_test_copies:,} kept in test",
        "n_conflicts": "warning: {n_conflicts:,} images equal one with the other label and are not trained on; "
        f"{{n_conflicts_test:,}} of them stay in test{named}",
        "n_near": "warning: {n_near:,} pairs of pictures are nearly equal; {n_near_apart:,} are of two patients, of "
        "{n_near_test:,} only one is in test; same_pictures.csv in the run folder names them",
    }
    return [line.format(**facts) for name, line in lines.items() if facts[name]]


def read_decoding(run: Run, bits: int) -> dict[str, Any]:
    """What shapes pixels: settings, and the bits in use of the source's pictures with 16."""
    taken = run.settings.ingestion.model_dump(include={"max_side_px", "dicom_classes"})
    return {"padding": run.settings.packing.padding, "bits": bits, **taken}


def find_shelf(run: Run, bits: int) -> Path:
    """The cache folder (shelf) of pixels that were decoded in this way."""
    decoder = {
        "code": code_version("tasks.pixels.decoding"),
        **package_versions(DECODERS),
        **read_decoding(run, bits),
    }
    return run.cache / "arrays" / digest(decoder)[:16]


def find_packable(manifest: pd.DataFrame) -> pd.DataFrame:
    """A row for each distinct image file, in the order of the manifest."""
    undecodable = manifest["excluded"].fillna("").str.startswith("undecodable")
    return manifest[undecodable.ne(True)].drop_duplicates("sha256")


def find_files(run: Run, folder: Path, files: dict[str, str]) -> Path:
    """The folder with the files of a shard: the one given, or on another machine the source fetched there."""
    if run.settings.scaling.reaches_out and not all((folder / path).is_file() for path in files.values()):
        return Path(fetch(run.settings).folder)
    return folder


def fetch_shelf(run: Run, shelf: Path, wanted: Collection[str]) -> None:
    """Fetches from the shared cache the lists of a shelf, and those of its shards that have wanted files."""
    fetch_lists(run, f"arrays/{shelf.name}/")
    lost = [path for path in shelf.glob("[!.]*.json") if not path.with_suffix(".npy").exists()]
    contents = {path: read_listing(path) for path in lost}
    named = [
        path for path, content in contents.items() if not {*content["rows"], *content["failed"]}.isdisjoint(wanted)
    ]
    fetch_files(run, [f"arrays/{shelf.name}/{path.stem}.npy" for path in named])


def pack_shard(folder: Path, files: dict[str, str], shelf: Path, **decoding: Any) -> str:
    """Decodes files (sha256 -> path below ``folder``) into one shard and its list on the shelf; returns its name.

    ``decoding`` are arguments of ``decode``.
    ``<name>.npy`` is uint8 ``(n, 224, 224)``. ``<name>.json``, written last, has the sha256 of each row, the reason for
    each file that did not decode, and the shard's own sha256. If several runs pack the same shard, one does it and the
    others wait.
    """
    name = digest(sorted(files))[:24]
    shard, listing = shelf / f"{name}.npy", shelf / f"{name}.json"
    with locked(shelf / f".{name}.lock"):
        if not (shard.exists() and listing.exists()):
            pixels, failed = decode_files(folder, files, **decoding)
            stacked = np.stack(list(pixels.values())) if pixels else np.empty((0, SIDE_PX, SIDE_PX), np.uint8)
            content = io.BytesIO()  # when NumPy writes to a file itself, it hides why it failed
            np.save(content, stacked)
            write_whole(shard, content.getvalue())
            sha256 = hashlib.sha256(content.getvalue()).hexdigest()
            write_whole(listing, json.dumps({"rows": list(pixels), "failed": failed, "sha256": sha256}))
    return name


def decode_files(
    folder: Path, files: dict[str, str], **decoding: Any
) -> tuple[dict[str, NDArray[np.uint8]], dict[str, str]]:
    """Pixels ``(224, 224)`` of each file that decodes, and the reason for each other one, both by sha256.

    Raises:
        SourceError: If a file changed since ingestion.
    """
    pixels: dict[str, NDArray[np.uint8]] = {}
    failed: dict[str, str] = {}
    for sha256, path in files.items():
        with open_source(folder / path) as stream:
            n_bytes = min(os.fstat(stream.fileno()).st_size, MAX_FILE_BYTES)  # ingestion excludes larger files
            with in_turn(n_bytes):
                data = stream.read(n_bytes)
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise SourceError(f"source: {path} changed while it was read; run again")
                try:
                    pixels[sha256] = decode(data, **decoding)
                except UndecodableError as error:
                    failed[sha256] = str(error)
                del data  # before the next file is read
    return pixels, failed


def read_listing(path: Path) -> Facts:
    """Reads the list of a shard: ``{"rows": [sha256], "failed": {sha256: reason}, "sha256"}``.

    Raises:
        RunError: If it is not such a list.
    """
    found = read_record(path, rows=list, failed=dict)
    if not all(isinstance(text, str) for text in [*found["rows"], *found["failed"].values()]):
        raise RunError(f"{path} is not what a run wrote there: remove it and run again")
    return found


def known_files(shelf: Path) -> dict[str, tuple[str, int, str]]:
    """The files of a shelf: sha256 -> (name of the shard in the cache, row, "") or ("", -1, why it did not decode)."""
    known: dict[str, tuple[str, int, str]] = {}
    for listing in sorted(shelf.glob("[!.]*.json")):
        shard = listing.with_suffix(".npy")
        if not shard.exists():
            continue
        content = read_listing(listing)
        known |= {sha: (f"arrays/{shelf.name}/{shard.name}", row, "") for row, sha in enumerate(content["rows"])}
        known |= {sha: ("", -1, reason) for sha, reason in content["failed"].items()}
    return known


def mark_undecodable(manifest: pd.DataFrame, reasons: dict[str, str]) -> pd.DataFrame:
    """Excludes rows whose file (by sha256) did not decode, with the reason, in every split."""
    manifest = manifest.copy()
    found = manifest["sha256"].map(reasons)
    broken = found.notna()
    manifest.loc[broken, "excluded"] = "undecodable: " + found[broken].astype("string")
    return manifest


def index_arrays(manifest: pd.DataFrame, known: dict[str, tuple[str, int, str]]) -> Facts:
    """``{"side_px", "shards": [{"name"}], "images": {image_id: [shard, row]}}`` for the decodable rows."""
    shards: dict[str, int] = {}
    images = {}
    for image, sha in zip(manifest["image_id"], manifest["sha256"], strict=True):
        shard, row, reason = known.get(sha, ("", -1, "not packed"))
        if not reason:
            images[image] = [shards.setdefault(shard, len(shards)), row]
    return {"side_px": SIDE_PX, "shards": [{"name": shard} for shard in shards], "images": images}
