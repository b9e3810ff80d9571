"""Explain: which parts of an X-ray a network's answer rests on, by LIME (Ribeiro et al. 2016), and how sure that is.

Reads ``predictions.csv``, ``metrics.json``, the packed arrays, the masks of devices and lungs, ``model.keras`` and,
when compared, ``unfiltered.keras``; writes a ``.json`` and a ``.png`` per image into ``explanations/``. Images are
explained in shards, each kept in the cache as soon as it is done: planned, explained side by side, and gathered.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from prefect import task

from tasks.drawings.transplant import grow_mask
from tasks.errors import RunError
from tasks.explaining.subjects import Network, load_for_lime, read_threshold_of
from tasks.files import digest, make_once, read_json, sha256_of_file, write_json
from tasks.pixels.covering import find_lungs, widen_lungs
from tasks.pixels.greys import to_float
from tasks.pixels.shards import LOST_SHARDS
from tasks.pixels.window import window_place
from tasks.records import MODEL, Facts
from tasks.runs.bucket import fetch_entry, fetch_run, keep_entry
from tasks.runs.keys import code_version, package_versions
from tasks.runs.manifest import read_manifest
from tasks.runs.run import Run
from tasks.runs.stages import stage_task
from tasks.settings import Settings

if TYPE_CHECKING:
    from tasks.explaining.lime_sampling import CutImage

SHARD_IMAGES = 4
LOADING = threading.Lock()
"""Held while networks are loaded, which threads would otherwise do several times at once."""
PACKAGES = ("lime", "scikit-image", "scikit-learn")


@task(name="plan explanations")
def plan_explanations(run: Run) -> list[int]:
    """Numbers of the shards, of those that the chosen images fall into, that nobody explained before."""
    return [number for number, shard in enumerate(list_shards(run)) if not is_at_hand(run, shard)]


@task(name="explain shards")
def explain_shards(run: Run, shards: Sequence[int]) -> None:
    """Explains the images of shards, each given by its number."""
    if run.settings.scaling.reaches_out:
        fetch_run(run)
    all_shards = list_shards(run)
    n_images = sum(len(shard.rows) for shard in all_shards)
    for number in shards:
        explain_shard(run, all_shards[number])
        first, n = number * SHARD_IMAGES + 1, len(all_shards[number].rows)
        print(f"explained images {first:,} to {first + n - 1:,} of {n_images:,}")


@stage_task("explain")
def gather_explanations(run: Run) -> Facts:
    """Brings the explanations of all shards into the run folder."""
    shards = list_shards(run)
    if missing := [shard for shard in shards if not is_at_hand(run, shard)]:
        raise RunError(f"scaling.runner: {len(missing):,} of the explained shards not found; {LOST_SHARDS}")

    def make(out: Path) -> Facts:
        folder = out / "explanations"
        folder.mkdir()
        for shard in shards:
            for name in shard.files:
                (folder / name).write_bytes((run.cache / shard.name / name).read_bytes())
        if not shards:
            (folder / "none.txt").write_text("no image was asked for\n")
        explained = [read_json(path) for path in sorted(folder.glob("*.json"))]
        return {"n_images": len(explained), "split": explained[0]["split"] if explained else None, **sum_up(explained)}

    facts = run.stage("explain", given={"entries": [shard.name for shard in shards]}, make=make)
    print(say_explanations(facts))
    return facts


def plan_images(run: Run) -> list[Facts]:
    """The chosen images in the order they are explained in: facts of each, its seeds, and which mask is laid on it.

    ``mask_of`` is the image itself where it shows a device, and where it is known to show none another image that does,
    to compare with; ``None`` where nothing is known.
    """
    predictions = read_predictions(run.folder)
    chosen = choose_images(predictions, run.settings.explanation.n_images, run.settings.seed)
    rng = np.random.default_rng([run.settings.seed, 5])
    donors = sorted(predictions.loc[predictions["has_device"].eq(True).fillna(False).astype(bool), "image_id"])
    plan = []
    for turn, row in enumerate(chosen.to_dict("records")):
        other = str(rng.choice(donors)) if donors else None
        mask_of = {True: row["image_id"], False: other}.get(row["has_device"])  # type: ignore[call-overload]
        n_seeds = run.settings.explanation.n_seeds if turn < run.settings.explanation.n_repeated else 1
        plan.append({**row, "n_seeds": n_seeds, "mask_of": mask_of})
    return plan


@dataclass(frozen=True)
class Shard:
    """Some of the chosen images: their rows as from ``plan_images``, and the name of their folder in the cache."""

    rows: tuple[Facts, ...]
    name: str

    @property
    def files(self) -> list[str]:
        """Names of what is written about the images, in the order that it is."""
        return [f"{row['image_id']}.{ending}" for row in self.rows for ending in ("json", "png")]


def list_shards(run: Run) -> list[Shard]:
    """The chosen images in shards; the results of one follow from its rows, the networks and the settings."""
    explanation, plan = run.settings.explanation, plan_images(run)
    if not plan:
        return []
    parts = {
        "networks": {
            name: (sha256_of_file(run.folder / f"{name}.keras"), read_threshold_of(run.folder, name))
            for name in run.settings.networks
        },
        "arrays": read_json(run.folder / "arrays" / "index.json")["shards"],
        "masks": read_json(run.folder / "masks" / "index.json")["shards"],
        "lungs": read_json(run.folder / "lungs" / "index.json")["shards"],
        "explanation": explanation.model_dump(include={"n_samples", "n_segments", "batch_size"}),
        "seed": run.settings.seed,
        "code": code_version(__name__),
        "packages": package_versions(PACKAGES),
    }
    pieces = [plan[start : start + SHARD_IMAGES] for start in range(0, len(plan), SHARD_IMAGES)]
    return [Shard(tuple(rows), f"explanations/{digest({**parts, 'rows': rows})[:24]}") for rows in pieces]


def is_at_hand(run: Run, shard: Shard) -> bool:
    """Whether a shard is explained; what only the shared cache has is brought here."""
    fetch_entry(run, shard.name, lambda entry: is_whole(entry, shard))
    return is_whole(run.cache / shard.name, shard)


def is_whole(entry: Path, shard: Shard) -> bool:
    """Whether a folder of the cache has all files of a shard."""
    return all((entry / name).exists() for name in shard.files)


def explain_shard(run: Run, shard: Shard) -> None:
    """Explains the images of a shard into the cache, here and the shared one."""

    def make(out: Path) -> None:
        with LOADING:
            size = run.settings.explanation.batch_size
            networks = {
                name: (load_for_lime(run.folder, name, size), read_threshold_of(run.folder, name))
                for name in run.settings.networks
            }
        explain_rows(run, shard.rows, networks, out)

    make_once(run.cache / shard.name, make, is_valid=lambda entry: is_whole(entry, shard))
    keep_entry(run, shard.name)


def explain_rows(run: Run, rows: Sequence[Facts], networks: dict[str, tuple[Network, float]], out: Path) -> None:
    """Writes ``.json`` and ``.png`` of images, rows as from ``plan_images``, into a folder."""
    images, masks, lungs = run.images(), run.masks(), run.lungs()
    for row in rows:
        grey = to_float(images.read([row["image_id"]]))[0, ..., 0]
        device = masks.read([row["mask_of"]])[0] if row["mask_of"] else None
        place = widen_lungs(lungs.read([row["image_id"]]))
        film = Film(grey, device, place[0] if find_lungs(place)[0] else None)
        facts, picture = explain_row(row, film, networks, run.settings)
        write_json(out / f"{row['image_id']}.json", facts)
        picture.save(out / f"{row['image_id']}.png", optimize=True)


def read_predictions(run: Path) -> pd.DataFrame:
    """``predictions.csv`` with ``image_id`` and ``decision`` (1 from the threshold on), test rows if there are any."""
    if not (run / "predictions.csv").is_file():
        raise RunError(f"{run / 'predictions.csv'} is missing: run the train flow on this run folder first")
    table = pd.read_csv(run / "predictions.csv")
    ids = read_manifest(run).set_index("path")["image_id"]
    table["image_id"] = table["path"].map(ids)
    table["decision"] = (table["probability"] >= read_threshold_of(run, MODEL)).astype(int)
    return table[table["split"] == "test"] if (table["split"] == "test").any() else table


def choose_images(predictions: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """At most ``n`` rows: as even as can be over right and wrong of each class, with and without a device; seeded.

    Args:
        predictions: ``image_id, split, label, subtype, has_device, probability, decision``.
    """
    rng = np.random.default_rng(seed)
    shown = predictions.assign(
        right=predictions["label"] == predictions["decision"],
        shown=predictions["has_device"].map({True: "yes", False: "no"}).fillna("unknown"),
    )
    groups = [rows.iloc[rng.permutation(len(rows))] for _, rows in shown.groupby(["label", "right", "shown"])]
    turns = [(turn, g) for g, rows in enumerate(groups) for turn in range(len(rows))]
    picked = [groups[g].iloc[[turn]] for turn, g in sorted(turns)[:n]]
    columns = ["image_id", "split", "label", "subtype", "has_device", "probability", "decision", "right"]
    chosen = pd.concat(picked) if picked else shown.iloc[:0]
    chosen = chosen[columns].astype(object)
    return chosen.where(chosen.notna(), None)


# -- one image ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Film:
    """An image and what is known of its places.

    Attributes:
        grey: float32 ``(side, side)``, 0.0 to 1.0.
        device: uint8 of that shape, 255 surely a device; of the image itself, or of another one to compare with.
        lungs: The place of its lungs, bool of that shape; ``None`` where none are found.
    """

    grey: NDArray[np.float32]
    device: NDArray[np.uint8] | None
    lungs: NDArray[np.bool_] | None

    @property
    def places(self) -> dict[str, NDArray[np.bool_]]:
        """The places that weight is weighed on, bool ``(side, side)``, by name."""
        found = {"window": window_place(self.grey.shape[0])}
        found |= {} if self.device is None else {"device": grow_mask(self.device)}
        return found | ({} if self.lungs is None else {"lungs": self.lungs})


def explain_row(
    row: Facts, film: Film, networks: dict[str, tuple[Network, float]], settings: Settings
) -> tuple[Facts, Any]:
    """What is written about an image: the facts of its ``.json``, and its picture.

    Args:
        row: As from ``plan_images``.
        film: Its pixels and places.
        networks: Name -> network and its threshold; facts of the first lie on top, of others below their name.
        settings: ``explanation`` and the seed.
    """
    from tasks.explaining.lime_sampling import cut_image
    from tasks.explaining.pictures import draw_explanation

    cut = cut_image(film.grey, settings.explanation.n_segments)
    own = row["mask_of"] == row["image_id"]
    facts = {k: v for k, v in row.items() if k not in ("mask_of", "n_seeds")}
    facts |= {"mask": None if film.device is None else "own" if own else "other"}
    for name, (network, threshold) in networks.items():
        found = explain_pieces(cut, network, threshold, settings, row["n_seeds"])
        weights = np.array(found["weights"])
        found["places"] = share_weight(weights, cut.pieces, film.places)
        found["places_against"] = share_weight(-weights, cut.pieces, film.places)
        if name == next(iter(networks)):
            found = {k: v for k, v in found.items() if k not in row}  # as predictions.csv has it
            facts |= found
        else:
            facts[name] = found
    return facts, draw_explanation(film.grey, cut.pieces, facts, film.device if own else None, film.lungs)


def explain_pieces(cut: "CutImage", network: Network, threshold: float, settings: Settings, n_seeds: int) -> Facts:
    """LIME weights of one X-ray and how far they can be believed.

    Args:
        cut: The X-ray.
        network: Grey images float32 ``(n, side, side)`` to P(label = 1), float64 ``(n,)``.
        threshold: From which probability on the network calls an image pneumonia.
        settings: Samples and batch size of ``explanation``, and the seed of the perturbations.
        n_seeds: Maps that are made, with this seed and the following; the first is the one that is shown.

    Returns:
        ``probability`` and ``decision``; ``weights``, one per piece, positive where it raises P(pneumonia); ``r2`` of
        the local fit, its ``intercept`` and ``local_probability``; ``n_samples`` and ``seed``; ``stability`` and
        ``faithfulness`` as from ``tasks.explaining.lime_quality``.
    """
    from tasks.explaining.lime_quality import measure_faithfulness, measure_stability
    from tasks.explaining.lime_sampling import weigh_pieces

    recipe, seed = settings.explanation, settings.seed
    maps = [
        weigh_pieces(cut, network, n_samples=recipe.n_samples, batch_size=recipe.batch_size, seed=seed + turn)
        for turn in range(n_seeds)
    ]
    first = maps[0]
    decision = int(first.probability >= threshold)
    return {
        "probability": round(first.probability, 6),
        "decision": decision,
        "weights": first.weights.tolist(),
        "r2": _finite(first.r2),
        "intercept": _finite(first.intercept),
        "local_probability": _finite(first.local_probability),
        "n_samples": recipe.n_samples,
        "seed": seed,
        "stability": measure_stability([one.weights for one in maps]),
        "faithfulness": measure_faithfulness(cut, first.weights, network, decision, seed),
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN; R² of a constant answer has no value."""
    return round(value, 6) if np.isfinite(value) else None


def share_weight(
    weights: NDArray[np.float64], pieces: NDArray[np.intp], places: dict[str, NDArray[np.bool_]]
) -> Facts | None:
    """For each place the share of the positive weight that lies on it, and its share of the area; 0 to 1.

    The weight of a piece is spread evenly over it. ``None`` where no piece has positive weight.
    """
    positive = np.clip(weights, 0, None)
    if not positive.sum():
        return None
    sizes = np.bincount(pieces.ravel(), minlength=len(weights))
    facts: Facts = {}
    for name, place in places.items():
        on = np.bincount(pieces[place], minlength=len(weights)) / sizes
        facts[f"{name}_weight"] = round(float(positive @ on / positive.sum()), 6)
        facts[f"{name}_area"] = round(float(place.mean()), 6)
    return facts


# -- all of them -------------------------------------------------------------------------------------------------------


def sum_up(explained: list[Facts]) -> Facts:
    """How far the maps of a run can be believed: medians, and the share of maps that beat a random order."""
    stable = [item["stability"] for item in explained if item["stability"]["rank_correlation"] is not None]
    faithful = [item["faithfulness"] for item in explained]
    r2 = [item["r2"] for item in explained if item["r2"] is not None]

    def middle(values: list[float]) -> float | None:
        return round(float(np.median(values)), 4) if values else None

    return {
        "n_repeated": len(stable),
        "n_seeds": stable[0]["n_seeds"] if stable else 1,
        "rank_correlation": middle([item["rank_correlation"] for item in stable]),
        "top5_overlap": middle([item["top5_overlap"] for item in stable]),
        "n_unstable": sum(item["stable"] is False for item in stable),
        "r2": middle(r2),
        **{name: middle([item[name] for item in faithful]) for name in ("deletion", "insertion", "random")},
        "n_deletion_better": sum(item["deletion"] < item["random"] for item in faithful),
        "n_insertion_better": sum(item["insertion"] > item["random"] for item in faithful),
    }


def say_explanations(facts: Facts) -> str:
    """One line for the log."""
    text = f"explained {facts['n_images']:,} images"
    if facts["n_repeated"]:
        text += (
            f"; median rank correlation between seeds {facts['rank_correlation']:.2f} on {facts['n_repeated']} of them"
        )
    if facts["n_images"]:
        text += f"; deletion beats a random order on {facts['n_deletion_better']:,} of {facts['n_images']:,}"
    return text
