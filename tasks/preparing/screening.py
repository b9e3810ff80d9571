"""Screen: decides which images show a medical device, and excludes them from training.

Reads the masks of devices, a review table, people's answers and ``manifest.parquet``; writes ``device_score`` (always
the network's), ``has_device``, ``device_reviewed`` and more reasons in ``excluded``, ``excluded.csv`` for people,
``masks/index.json`` (where the masks are in the cache) and ``review/``, the sheet of doubtful images. Images with
devices stay in validation and test on purpose: the network will meet devices in use, and only these images show
whether it relies on them. Training leaves out the rows with a reason in ``excluded`` (``used_rows`` in ``twin``).
"""

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from tasks.devices.answers import read_answered, safe_path
from tasks.devices.contact_sheet import TEMPLATE, doubtful_rows, find_doubtful, show_sheet, write_sheet
from tasks.devices.files import find_screener, known_readings
from tasks.devices.quality import judge_screener
from tasks.devices.readings import find_review_of
from tasks.errors import SourceError
from tasks.files import digest, sha256_of_file, write_json, write_whole
from tasks.measures import format_value
from tasks.pixels.masks import Masks, read_scores
from tasks.pixels.shards import shards_exist
from tasks.preparing.mask_shards import index_masks
from tasks.records import CLASS_NAMES, DEVICE_REASONS, DOUBTFUL_DEVICE, READ_DEVICE, SCORED_DEVICE, Facts
from tasks.runs.artifacts import show_table
from tasks.runs.manifest import write_manifest
from tasks.runs.run import Run
from tasks.runs.stages import STAGES_FOLDER, stage_task
from tasks.settings import ScreeningSettings

N_BOOTSTRAP = 1_000


@stage_task("screen")
def screen(run: Run, folder: str) -> Facts:
    """Scores every image and excludes those that show, or may show, a medical device from training."""
    manifest = run.manifest()
    review = find_review_of(run, Path(folder))
    refuse_changed_review(run, review.address, Path(folder))
    present = set(manifest["sha256"])
    answered = {sha: device for sha, device in read_answered(run).items() if sha in present}
    screener = find_screener(run.settings.screening.screener)
    known = known_readings(screener.folder)
    index = index_masks(run, "masks")
    settings = run.settings.screening

    def make(out: Path) -> Facts:
        write_json(out / "masks" / "index.json", index)
        scored = add_scores(manifest, index, run.cache)
        decided = decide_devices(add_readings(scored, review.readings, answered), settings)
        write_manifest(out, decided)
        write_whole(out / "excluded.csv", describe_excluded(decided))
        doubtful = doubtful_rows(decided, settings)
        write_sheet(out, doubtful, run.images(), Masks(out, run.cache), run.settings.public_source)
        judged = keep_fair_readings(decided, review.readings, known)
        quality = judge_screener(
            judged, known or (), settings.threshold, settings.leaves_from, N_BOOTSTRAP, run.settings.seed
        )
        return {
            "review": review.name,
            "n_readings": len(review.readings),
            "n_answers": len(answered),
            "screener": {"sha256": screener.sha256, "name": screener.name},
            "quality": quality,
            "n_doubtful": len(find_doubtful(decided, settings)),
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
        "screening": settings.model_dump(exclude={"review", "answers", "screener", "wait_for_review"}),
        "seed": run.settings.seed,
    }
    facts = run.stage(
        "screen",
        reads=["manifest.parquet"],
        given=given,
        make=make,
        is_valid=lambda entry: shards_exist(entry / "masks" / "index.json", run.cache),
    )
    if review.warning:
        print(f"warning: {review.warning}")
    for line in describe_screening(facts):
        print(line)
    show_table("devices", facts["rates"], "Share of images that show a device, by class, before and after screening")
    show_sheet(run, facts["n_on_sheet"])
    return facts


def describe_excluded(decided: pd.DataFrame) -> str:
    """``excluded.csv``: path and reason of each excluded image; people open it, so no cell may be a formula.

    ``./`` before a path names the same file. Tables that programs read keep paths as they are.

    Args:
        decided: Columns ``path, excluded``.
    """
    left = decided.loc[decided["excluded"].fillna("") != "", ["path", "excluded"]]
    return left.assign(path=left["path"].map(safe_path)).rename(columns={"excluded": "reason"}).to_csv(index=False)


# -- scores and masks --------------------------------------------------------------------------------------------------


def add_scores(manifest: pd.DataFrame, index: Facts, cache: Path) -> pd.DataFrame:
    """Fills ``device_score`` of all images that have pixels; that of others stays missing."""
    shards = [read_scores(cache / shard["name"]) for shard in index["shards"]]
    places = index["images"]
    scores = [shards[places[i][0]][places[i][1]] if i in places else pd.NA for i in manifest["image_id"]]
    return manifest.assign(device_score=pd.array(scores, dtype="Float32"))


# -- the decision ------------------------------------------------------------------------------------------------------


def add_readings(manifest: pd.DataFrame, readings: dict[str, int], answered: dict[str, int]) -> pd.DataFrame:
    """Adds ``device_reading``: 1 a person saw a device, 0 none, missing if nobody looked.

    A reading applies to all files with the same content; if these were read differently, a device counts as seen. A
    person's answer about a doubtful image is newer than the table and overrides it.

    Args:
        manifest: Columns ``path, sha256``.
        readings: path -> 0 or 1, of a review table.
        answered: sha256 -> 0 or 1, of people's answers.
    """
    by_content = manifest["path"].map(readings).groupby(manifest["sha256"]).transform("max")
    reading = manifest["sha256"].map(answered).astype("Float64").fillna(by_content.astype("Float64"))
    return manifest.assign(device_reading=reading.astype("Int8"))


def refuse_changed_review(run: Run, table: Path | None, folder: Path) -> None:
    """Refuses a review table of the source that changed since ingestion.

    Raises:
        SourceError: If it changed, or is new.
    """
    if table is None or table.parent != folder or not (run.folder / STAGES_FOLDER / "ingest.json").exists():
        return
    if run.facts("ingest")["table_sha256"].get(table.name) != sha256_of_file(table):
        raise SourceError(f"source: {table} changed while the source was read; run again")


def keep_fair_readings(manifest: pd.DataFrame, readings: dict[str, int], known: Collection[str] | None) -> pd.DataFrame:
    """The manifest with ``device_reading`` only where it may be used to measure the screener.

    Answers about images without a reading in the table are not used, because people are asked about the hardest images
    only. No reading is used if it is unknown what the screener learnt from.

    Args:
        manifest: Columns ``path, sha256, device_reading``.
        readings: path -> 0 or 1, of a review table.
        known: The images that the screener learnt from; ``None`` if unknown.
    """
    in_table = manifest["path"].isin(list(readings)).groupby(manifest["sha256"]).transform("any")
    return manifest.assign(device_reading=manifest["device_reading"].where(in_table & (known is not None)))


def decide_devices(manifest: pd.DataFrame, settings: ScreeningSettings) -> pd.DataFrame:
    """Fills ``has_device`` and ``device_reviewed``, and excludes training rows that show, or may show, a device.

    A reading decides if there is one. Otherwise an image shows a device from ``threshold``, and leaves training from
    ``leaves_from``. Without reading and score, ``has_device`` stays missing and the image stays in training.

    Args:
        manifest: Columns ``split, device_score, device_reading, excluded``; ``usable`` is added: the rows that training
            could have used before screening.
        settings: The cut-offs.
    """
    read, score = manifest["device_reading"], manifest["device_score"]
    reviewed = read.notna()
    has_device = (score >= settings.threshold).astype("boolean").mask(reviewed, (read == 1).astype("boolean"))
    reasons = manifest["excluded"].fillna("")
    usable = reasons == ""
    why = pd.Series("", index=manifest.index, dtype="string")
    why = why.mask(~reviewed & (score >= settings.leaves_from).fillna(False), DOUBTFUL_DEVICE)
    why = why.mask(~reviewed & (score >= settings.threshold).fillna(False), SCORED_DEVICE)
    why = why.mask(reviewed & (read == 1).fillna(False), READ_DEVICE)
    excluded = reasons.mask(usable & (manifest["split"] == "train") & (why != ""), why)
    return manifest.assign(has_device=has_device, device_reviewed=reviewed, usable=usable, excluded=excluded)


def count_devices(manifest: pd.DataFrame) -> Facts:
    """Counts after screening; a rate is ``None`` if nothing is known."""
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


def describe_screening(facts: Facts) -> list[str]:
    """Lines of the log: the images that leave training, the screener's quality, and the doubtful images."""
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
