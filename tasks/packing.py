"""Pack: every decodable image once to uint8 at 224 px, in shards that later stages map into memory.

Reads the files of the source; writes shards into the cache, ``arrays/index.json`` with their names into the run
folder, and marks files that do not decode in ``manifest.parquet``. Shards are found by the checksums of the files in
them, so that next week only new images are packed.
"""

import hashlib
import importlib.metadata
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.images import SIDE_PX, UndecodableError, decode
from tasks.records import Facts, SourceError
from tasks.run_copies import fetch_below
from tasks.settings import Settings
from tasks.stages import code_version, run_stage
from tasks.storage import (
    cache_folder,
    digest,
    read_bytes,
    read_manifest,
    run_folder,
    sha256_of_file,
    shards_exist,
    write_json,
    write_manifest,
    write_whole,
)

SHARD_IMAGES = 100
DECODERS = os.cpu_count() or 1


@task(name="pack", cache_policy=NO_CACHE)
def pack(settings: Settings, folder: str) -> Facts:
    """Decodes each image once to a 224 px uint8 array."""
    run = run_folder(settings)
    decoding: dict[str, Any] = {"padding": settings.packing.padding, "max_side_px": settings.ingestion.max_side_px}
    decoder = {"code": code_version("tasks.images"), "pillow": importlib.metadata.version("pillow"), **decoding}
    shelf = cache_folder(settings) / "arrays" / digest(decoder)[:16]

    def make(out: Path) -> Facts:
        manifest = read_manifest(run)
        fetch_below(settings, f"arrays/{shelf.name}/")
        known = known_files(shelf)
        waiting = manifest[(manifest["excluded"].fillna("").str.startswith("undecodable")).ne(True)]
        waiting = waiting[~waiting["sha256"].isin(list(known))].drop_duplicates("sha256")
        starts = range(0, len(waiting), SHARD_IMAGES)
        for done, start in enumerate(starts):
            rows = waiting.iloc[start : start + SHARD_IMAGES]
            pack_shard(Path(folder), dict(zip(rows["sha256"], rows["path"], strict=True)), shelf, **decoding)
            if (done + 1) % 10 == 0 or done + 1 == len(starts):
                print(f"packed {min(start + SHARD_IMAGES, len(waiting)):,} of {len(waiting):,} new images")
        known = known_files(shelf)
        manifest = mark_undecodable(manifest, {sha: reason for sha, (_, _, reason) in known.items() if reason})
        write_manifest(out, manifest)
        index = index_arrays(manifest, known)
        write_json(out / "arrays" / "index.json", index)
        return {
            "n_packed": len(index["images"]),
            "n_new": len(waiting),
            "n_shards": len(index["shards"]),
            "n_undecodable": int(manifest["excluded"].fillna("").str.startswith("undecodable").sum()),
        }

    inputs = {"manifest": sha256_of_file(run / "manifest.parquet"), "shelf": shelf.name, **decoding}
    facts = run_stage(
        settings,
        "pack",
        module=__name__,
        inputs=inputs,
        make=make,
        packages=("pillow", "numpy"),
        is_valid=lambda entry: shards_exist(entry / "arrays" / "index.json", cache_folder(settings)),
    )
    told = " (taken from the cache)" if facts["reused"] else f", {facts['n_new']:,} of them new"
    print(
        f"packed {facts['n_packed']:,} images in {facts['n_shards']:,} shards{told}; "
        f"{facts['n_undecodable']:,} do not decode"
    )
    return facts


def pack_shard(folder: Path, files: dict[str, str], shelf: Path, *, padding: bool, max_side_px: int) -> None:
    """Decodes files (sha256 -> path below ``folder``) into one shard and its list on the shelf.

    ``<name>.npy`` is uint8 ``(n, 224, 224)``; ``<name>.json``, written last, lists the sha256 of each row, and of each
    file that did not decode the reason.
    """

    def read(sha256: str) -> np.ndarray | str:
        data = read_bytes(folder / files[sha256])
        if hashlib.sha256(data).hexdigest() != sha256:
            raise SourceError(f"source: {files[sha256]} changed while it was read; run again")
        try:
            return decode(data, side_px=SIDE_PX, padding=padding, max_side_px=max_side_px)
        except UndecodableError as error:
            return str(error)

    with ThreadPoolExecutor(DECODERS) as pool:
        results = dict(zip(files, pool.map(read, files), strict=True))
    pixels = {sha: result for sha, result in results.items() if not isinstance(result, str)}
    failed = {sha: result for sha, result in results.items() if isinstance(result, str)}
    name = digest(sorted(files))[:24]
    shelf.mkdir(parents=True, exist_ok=True)
    stacked = np.stack(list(pixels.values())) if pixels else np.empty((0, SIDE_PX, SIDE_PX), np.uint8)
    beside = shelf / f".{name}.{os.getpid()}.partial.npy"
    np.save(beside, stacked)
    os.replace(beside, shelf / f"{name}.npy")
    write_whole(shelf / f"{name}.json", json.dumps({"rows": list(pixels), "failed": failed}))


def known_files(shelf: Path) -> dict[str, tuple[str, int, str]]:
    """What the shelf holds: sha256 -> (name of the shard in the cache, row, "") or ("", -1, why it did not decode)."""
    known: dict[str, tuple[str, int, str]] = {}
    for listing in sorted(shelf.glob("[!.]*.json")):
        shard = listing.with_suffix(".npy")
        if not shard.exists():
            continue
        content = json.loads(listing.read_text())
        known |= {sha: (f"arrays/{shelf.name}/{shard.name}", row, "") for row, sha in enumerate(content["rows"])}
        known |= {sha: ("", -1, reason) for sha, reason in content["failed"].items()}
    return known


def mark_undecodable(manifest: pd.DataFrame, reasons: dict[str, str]) -> pd.DataFrame:
    """Excludes rows whose file (by sha256) did not decode, with the reason, in whatever split."""
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
