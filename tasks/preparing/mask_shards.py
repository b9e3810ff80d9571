"""Masks of the packed shards: of devices by the screener, of lungs by the segmenter.

Reads the packed arrays; writes a compressed shard of masks for each of their shards into the cache, ``masks/…`` with
the screener's scores and ``lungs/…``. A network that changes is applied again, the other one is not.
"""

import importlib.metadata
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from prefect import task

from tasks.errors import RunError
from tasks.files import digest, locked, read_record
from tasks.networks.shipped import Kind, NetworkFiles, find_network
from tasks.pixels.greys import SIDE_PX
from tasks.pixels.masks import MaskKind, write_shard
from tasks.pixels.packed import open_shard
from tasks.pixels.shards import LOST_SHARDS
from tasks.records import Facts
from tasks.runs.bucket import fetch_files, keep_files
from tasks.runs.keys import code_version
from tasks.runs.provenance import BACKENDS, find_backend
from tasks.runs.run import Run

NETWORKS: dict[MaskKind, tuple[Kind, str]] = {
    "masks": ("screener", "tasks.devices.screener"),
    "lungs": ("segmenter", "tasks.networks.segmenter"),
}
"""The network that draws each kind of mask, and its code."""
LOADING = threading.Lock()
"""Held while a network is loaded; otherwise several threads would load it at once."""


@task(name="plan screening")
def plan_masks(run: Run) -> list[str]:
    """Names of the packed shards that lack a mask of devices or of lungs by these networks."""
    targets = {kind: find_targets(run, kind) for kind in NETWORKS}
    fetch_files(run, [name for names in targets.values() for name in names.values()])
    pairs = (pair for names in targets.values() for pair in names.items())
    return list(dict.fromkeys(source for source, name in pairs if not (run.cache / name).exists()))


@task(name="screen shards")
def draw_masks(run: Run, shards: Sequence[str]) -> None:
    """Writes the masks of packed shards that are missing into the cache, here and shared."""
    fetch_files(run, shards)
    for kind in NETWORKS:
        targets = name_targets(run, kind, shards)
        for source in shards:
            target = run.cache / targets[source]
            with locked(target.with_suffix(".lock")):
                if not target.exists():  # otherwise another run was faster, or only the other network is new
                    draw_shard(kind, find_files(run, kind), run.cache / source, target)
            keep_files(run, [targets[source]])


def index_masks(run: Run, kind: MaskKind) -> Facts:
    """``<kind>/index.json``: ``{"shards": [{"name"}], "images": {image_id: [shard, row]}}``, as for the arrays.

    Raises:
        RunError: If a shard was not screened, or this machine cannot find it.
    """
    targets, cache = list(find_targets(run, kind).values()), run.cache
    fetch_files(run, targets)
    if missing := [target for target in targets if not (cache / target).exists()]:
        raise RunError(f"scaling.runner: {len(missing):,} of the screened shards not found; {LOST_SHARDS}")
    arrays = read_record(run.folder / "arrays" / "index.json", shards=list, images=dict)
    return {"shards": [{"name": target} for target in targets], "images": arrays["images"]}


def find_files(run: Run, kind: MaskKind) -> NetworkFiles:
    """The files of the network that draws this kind of mask."""
    network = NETWORKS[kind][0]
    return find_network(network, getattr(run.settings.screening, network))


def find_targets(run: Run, kind: MaskKind) -> dict[str, str]:
    """Name in the cache of each packed shard of a run -> name of its masks."""
    arrays = read_record(run.folder / "arrays" / "index.json", shards=list, images=dict)
    return name_targets(run, kind, [shard["name"] for shard in arrays["shards"]])


def name_targets(run: Run, kind: MaskKind, shards: Sequence[str]) -> dict[str, str]:
    """The same of some shards, also on a machine without the run folder; changes with weights, code and packages."""
    code = [code_version(name) for name in (NETWORKS[kind][1], "tasks.pixels.masks")]
    runs_on = [importlib.metadata.version(name) for name in ("keras", BACKENDS[find_backend()])]
    version = digest({"screener": find_files(run, kind).sha256, "code": code, "runs_on": runs_on})[:16]
    return {name: f"{kind}/{version}/{Path(name).parent.name}/{Path(name).stem}.npz" for name in shards}


def draw_shard(kind: MaskKind, network: NetworkFiles, source: Path, target: Path) -> None:
    """Applies a network to a packed shard, uint8 ``(n, 224, 224)``, and writes a compressed shard of masks."""
    model, packed = open_network(kind, network), open_shard(source)
    none = np.empty((0, SIDE_PX, SIDE_PX), np.uint8)
    if kind == "lungs":
        from tasks.networks.segmenter import segment_pixels

        write_shard(target, np.concatenate([none, *segment_pixels(model, packed)]))
        return
    from tasks.devices.screener import screen_pixels

    batches = list(screen_pixels(model, packed))
    scores = np.concatenate([np.empty(0, np.float32), *(batch.scores for batch in batches)])
    write_shard(target, np.concatenate([none, *(batch.masks for batch in batches)]), scores=scores)


def open_network(kind: MaskKind, network: NetworkFiles) -> Any:
    """The screener or segmenter in a folder, loaded once per process."""
    with LOADING:
        return _load(kind, network.folder.resolve(), network.sha256)


@lru_cache(maxsize=len(NETWORKS))
def _load(kind: MaskKind, folder: Path, sha256: str) -> Any:
    from tasks.devices.screener import load_screener
    from tasks.networks.segmenter import load_segmenter

    return load_segmenter(folder) if kind == "lungs" else load_screener(folder)
