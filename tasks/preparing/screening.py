"""Screen: which images show a medical device, and which therefore leave the training split.

Reads the packed arrays, a review table, people's answers and ``manifest.parquet``; writes ``device_score`` (always the
network's), ``has_device``, ``device_reviewed`` and more reasons in ``excluded``, ``excluded.csv`` for people,
``masks/index.json`` (where the masks are in the cache) and ``review/``, the sheet of doubtful images. Images with
devices stay in validation and test on purpose: a device in the picture is what the network will meet, and the only
way to see whether it leans on it.
"""

import importlib.metadata
import threading
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from prefect import task

from tasks.devices.answers import read_answered, safe_path
from tasks.devices.contact_sheet import TEMPLATE, doubtful_rows, find_doubtful, show_sheet, write_sheet
from tasks.devices.files import ScreenerFiles, find_screener, known_readings
from tasks.devices.quality import judge_screener
from tasks.devices.readings import find_review
from tasks.errors import RunError, SourceError
from tasks.files import digest, locked, read_record, sha256_of_file, write_json, write_whole
from tasks.measures import format_value
from tasks.pixels.decoding import SIDE_PX
from tasks.pixels.masks import DeviceMasks, read_scores, write_shard
from tasks.pixels.packed import open_shard
from tasks.pixels.shards import LOST_SHARDS, shards_exist
from tasks.records import CLASS_NAMES, DEVICE_REASONS, DOUBTFUL_DEVICE, READ_DEVICE, SCORED_DEVICE, Facts
from tasks.runs.artifacts import show_table
from tasks.runs.bucket import fetch_files, keep_files
from tasks.runs.keys import code_version
from tasks.runs.manifest import write_manifest
from tasks.runs.provenance import BACKENDS, find_backend
from tasks.runs.run import Run
from tasks.runs.stages import STAGES_FOLDER, stage_task
from tasks.settings import ScreeningSettings

N_BOOTSTRAP = 1_000
LOADING = threading.Lock()
"""Held while a network is loaded, which threads would otherwise do several times at once."""


@task(name="plan screening")
def plan_screening(run: Run) -> list[str]:
    """Names of the packed shards that nobody screened before with this screener."""
    targets, cache = find_targets(run), run.cache
    fetch_files(run, targets.values())
    return [source for source, target in targets.items() if not (cache / target).exists()]


@task(name="screen shards")
def screen_shards(run: Run, shards: Sequence[str]) -> None:
    """Scores and masks of packed shards, into the cache, here and the shared one."""
    screener, cache = find_screener(run.settings.screening.screener), run.cache
    model = open_screener(screener)
    fetch_files(run, shards)
    for source in shards:
        target = name_target(screener, Path(source))
        with locked((cache / target).with_suffix(".lock")):
            if not (cache / target).exists():  # else another run, at the same time, was faster
                screen_shard(model, cache / source, cache / target)
        keep_files(run, [target])


@stage_task("screen")
def screen(run: Run, folder: str) -> Facts:
    """Scores every image and keeps those that show a medical device, or may, out of training."""
    manifest = run.manifest()
    review = find_review(run.settings.screening.review, Path(folder), manifest["path"])
    refuse_changed_review(run, review.address, Path(folder))
    present = set(manifest["sha256"])
    answered = {sha: device for sha, device in read_answered(run).items() if sha in present}
    screener = find_screener(run.settings.screening.screener)
    known = known_readings(screener.folder)
    index = index_masks(run)
    how = run.settings.screening

    def make(out: Path) -> Facts:
        write_json(out / "masks" / "index.json", index)
        scored = add_scores(manifest, index, run.cache)
        decided = decide(add_readings(scored, review.readings, answered), how)
        write_manifest(out, decided)
        write_whole(out / "excluded.csv", describe_excluded(decided))
        doubtful = doubtful_rows(decided, how)
        write_sheet(
            out,
            doubtful,
            run.images(),
            DeviceMasks(out, run.cache),
            run.settings.public_source,
        )
        judged = keep_fair_readings(decided, review.readings, known)
        quality = judge_screener(judged, known or (), how.threshold, how.leaves_from, N_BOOTSTRAP, run.settings.seed)
        return {
            "review": review.name,
            "n_readings": len(review.readings),
            "n_answers": len(answered),
            "screener": {"sha256": screener.sha256, "name": screener.name},
            "quality": quality,
            "n_doubtful": len(find_doubtful(decided, how)),
            "n_on_sheet": len(doubtful),
            **count_devices(decided),
        }

    given = {
        "review": sorted(review.readings.items()),
        "answers": sorted(answered.items()),
        "name": review.name,
        "masks": index,
        "screener": (screener.sha256, screener.name),
        "known": None if known is None else digest(sorted(known)),
        "sheet": sha256_of_file(TEMPLATE),
        "source": run.settings.public_source,
        "screening": how.model_dump(exclude={"review", "answers", "screener", "wait_for_review"}),
        "seed": run.settings.seed,
    }
    facts = run.stage(
        "screen",
        reads=["manifest.parquet"],
        given=given,
        make=make,
        is_valid=lambda entry: shards_exist(entry / "masks" / "index.json", run.cache),
    )
    for line in describe(facts):
        print(line)
    show_table("devices", facts["rates"], "Share of images that show a device, by class, before and after screening")
    show_sheet(run, facts["n_on_sheet"])
    return facts


def describe_excluded(decided: pd.DataFrame) -> str:
    """``excluded.csv``, path and reason of what is left out; a person opens it, so no cell may be a formula.

    ``./`` before a path names the same file. Tables that programs read keep paths as they are.

    Args:
        decided: Columns ``path, excluded``.
    """
    left = decided.loc[decided["excluded"].fillna("") != "", ["path", "excluded"]]
    return left.assign(path=left["path"].map(safe_path)).rename(columns={"excluded": "reason"}).to_csv(index=False)


# -- scores and masks --------------------------------------------------------------------------------------------------


def find_targets(run: Run) -> dict[str, str]:
    """Names in the cache: of each packed shard of a run, and of the scores and masks that this screener gives it."""
    screener = find_screener(run.settings.screening.screener)
    arrays = read_record(run.folder / "arrays" / "index.json", shards=list, images=dict)
    return {shard["name"]: name_target(screener, Path(shard["name"])) for shard in arrays["shards"]}


def name_target(screener: ScreenerFiles, source: Path) -> str:
    """Name of the scores and masks of a packed shard: other weights, code or packages, another name."""
    code = [code_version(name) for name in ("tasks.devices.screener", "tasks.pixels.masks")]
    runs_on = [importlib.metadata.version(name) for name in ("keras", BACKENDS[find_backend()])]
    how = digest({"screener": screener.sha256, "code": code, "runs_on": runs_on})[:16]
    return f"masks/{how}/{source.parent.name}/{source.stem}.npz"


def index_masks(run: Run) -> Facts:
    """``masks/index.json``: ``{"shards": [{"name"}], "images": {image_id: [shard, row]}}``, as of the arrays.

    Raises:
        RunError: If a shard was not screened, or out of this machine's reach.
    """
    targets, cache = list(find_targets(run).values()), run.cache
    fetch_files(run, targets)
    if missing := [target for target in targets if not (cache / target).exists()]:
        raise RunError(f"scaling.runner: {len(missing):,} of the screened shards not found; {LOST_SHARDS}")
    arrays = read_record(run.folder / "arrays" / "index.json", shards=list, images=dict)
    return {"shards": [{"name": target} for target in targets], "images": arrays["images"]}


def open_screener(screener: ScreenerFiles) -> Any:
    """The network of a screener; kept, as shards of one process use the same."""
    with LOADING:
        return _load(screener.folder.resolve(), screener.sha256)


@lru_cache(maxsize=1)
def _load(folder: Path, sha256: str) -> Any:
    from tasks.devices.screener import load_screener

    return load_screener(folder)


def screen_shard(model: Any, source: Path, target: Path) -> None:
    """Scores and masks of one packed shard, uint8 ``(n, 224, 224)`` -> a compressed shard of masks."""
    from tasks.devices.screener import screen_pixels

    said = list(screen_pixels(model, open_shard(source)))
    scores = np.concatenate([batch.scores for batch in said] or [np.empty(0, np.float32)])
    masks = np.concatenate([batch.masks for batch in said] or [np.empty((0, SIDE_PX, SIDE_PX), np.uint8)])
    write_shard(target, scores, masks)


def add_scores(manifest: pd.DataFrame, index: Facts, cache: Path) -> pd.DataFrame:
    """Fills ``device_score`` of all images that have pixels; the others stay unknown."""
    shards = [read_scores(cache / shard["name"]) for shard in index["shards"]]
    places = index["images"]
    scores = [shards[places[i][0]][places[i][1]] if i in places else pd.NA for i in manifest["image_id"]]
    return manifest.assign(device_score=pd.array(scores, dtype="Float32"))


# -- the decision ------------------------------------------------------------------------------------------------------


def add_readings(manifest: pd.DataFrame, readings: dict[str, int], answered: dict[str, int]) -> pd.DataFrame:
    """Adds ``device_reading``: 1 a person saw a device, 0 none, missing where nobody looked.

    A reading holds for all files with the same content; where these were read differently, a device counts as seen.
    What a person answered about a file in doubt is the later word and overrides the table.

    Args:
        manifest: Columns ``path, sha256``.
        readings: path -> 0 or 1, of a review table.
        answered: sha256 -> 0 or 1, of people's answers.
    """
    by_content = manifest["path"].map(readings).groupby(manifest["sha256"]).transform("max")
    reading = manifest["sha256"].map(answered).astype("Float64").fillna(by_content.astype("Float64"))
    return manifest.assign(device_reading=reading.astype("Int8"))


def refuse_changed_review(run: Run, table: Path | None, folder: Path) -> None:
    """Refuses a review table of the source that is not the one that ingestion took the checksum of.

    Raises:
        SourceError: If it changed, or came, since then.
    """
    if table is None or table.parent != folder or not (run.folder / STAGES_FOLDER / "ingest.json").exists():
        return
    if run.facts("ingest")["table_sha256"].get(table.name) != sha256_of_file(table):
        raise SourceError(f"source: {table} changed while the source was read; run again")


def keep_fair_readings(manifest: pd.DataFrame, readings: dict[str, int], known: Collection[str] | None) -> pd.DataFrame:
    """The manifest with ``device_reading`` only where it may judge the screener.

    Answers do not judge it where the table has no reading: people are asked about the hardest images only. Nor does
    any reading judge a screener of which nobody knows what it learnt from.

    Args:
        manifest: Columns ``path, sha256, device_reading``.
        readings: path -> 0 or 1, of a review table.
        known: What the screener learnt from; ``None`` where that is not known.
    """
    in_table = manifest["path"].isin(list(readings)).groupby(manifest["sha256"]).transform("any")
    return manifest.assign(device_reading=manifest["device_reading"].where(in_table & (known is not None)))


def decide(manifest: pd.DataFrame, how: ScreeningSettings) -> pd.DataFrame:
    """Fills ``has_device`` and ``device_reviewed``, and excludes training rows that show a device, or may.

    A reading decides where there is one. Else an image shows a device from ``threshold`` on, and leaves training from
    ``leaves_from`` on already. Without a reading and a score, an image stays unknown and stays.

    Args:
        manifest: Columns ``split, device_score, device_reading, excluded``; ``usable`` is added, which rows training
            could have used before.
        how: The cut-offs.
    """
    read, score = manifest["device_reading"], manifest["device_score"]
    reviewed = read.notna()
    has_device = (score >= how.threshold).astype("boolean").mask(reviewed, (read == 1).astype("boolean"))
    reasons = manifest["excluded"].fillna("")
    usable = reasons == ""
    why = pd.Series("", index=manifest.index, dtype="string")
    why = why.mask(~reviewed & (score >= how.leaves_from).fillna(False), DOUBTFUL_DEVICE)
    why = why.mask(~reviewed & (score >= how.threshold).fillna(False), SCORED_DEVICE)
    why = why.mask(reviewed & (read == 1).fillna(False), READ_DEVICE)
    excluded = reasons.mask(usable & (manifest["split"] == "train") & (why != ""), why)
    return manifest.assign(has_device=has_device, device_reviewed=reviewed, usable=usable, excluded=excluded)


def count_devices(manifest: pd.DataFrame) -> Facts:
    """Counts after screening; a rate is ``None`` where nothing is known."""
    reasons = manifest["excluded"].fillna("")
    train = manifest["split"] == "train"
    kept = train & (reasons == "")
    rates = []
    for name, rows in (
        ("train before", train),
        ("train after", kept),
        *((s, manifest["split"] == s) for s in ("val", "test")),
    ):
        for label, label_name in CLASS_NAMES.items():
            group = manifest[rows & (manifest["label"] == label)]
            known = group["has_device"].dropna()
            rates.append(
                {
                    "split": name,
                    "class": label_name,
                    "images": len(group),
                    "screened": len(known),
                    "reviewed": int(group["device_reviewed"].sum()),
                    "with_device": int(known.sum()),
                    "rate": round(float(known.mean()), 4) if len(known) else None,
                }
            )
    counts = {"reviewed": READ_DEVICE, "scored": SCORED_DEVICE, "doubtful": DOUBTFUL_DEVICE}
    return {
        **{f"n_excluded_{name}": int((reasons == reason).sum()) for name, reason in counts.items()},
        "n_excluded": int(reasons.isin(DEVICE_REASONS).sum()),
        "n_train_kept": int(kept.sum()),
        "n_unscreened_train": int((kept & manifest["has_device"].isna()).sum()),
        "rates": rates,
    }


def describe(facts: Facts) -> list[str]:
    """What a person following the log needs: what left, how good the screener is, what is left to do."""
    lines = [
        f"screened with {facts['screener']['name']} and {facts['review']}: {facts['n_excluded']:,} images leave "
        f"training, {facts['n_excluded_reviewed']:,} by readings, {facts['n_excluded_scored']:,} by score and "
        f"{facts['n_excluded_doubtful']:,} in doubt; {facts['n_train_kept']:,} training images stay"
    ]
    quality = facts["quality"]
    if quality["all"]["n"]:
        lines.append(
            f"the screener on {quality['all']['n']:,} readings it has not learnt from: "
            + ", ".join(
                f"{name} {format_value(quality['all'][name])}" for name in ("auc", "sensitivity", "specificity")
            )
            + f"; by score alone {format_value(quality['residual'])} of the training images would still show a device"
        )
    if facts["n_doubtful"]:
        lines.append(
            f"{facts['n_doubtful']:,} images are in doubt; {facts['n_on_sheet']:,} of them are on review/index.html"
        )
    return lines
