"""Explain: which parts of an X-ray the network's answer rests on, by LIME (Ribeiro et al. 2016).

Reads ``predictions.csv``, ``metrics.json``, the packed arrays and ``model.keras``; writes a ``.json`` and a
``.png`` per image into ``explanations/``. Sampling, kernel and regression are the lime package's own; only the
perturbed copies are made by one array operation in place of its loop over samples.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import Progress
from tasks.images import PackedImages, to_float
from tasks.records import Facts
from tasks.settings import ExplanationSettings, Settings
from tasks.storage import read_json, read_manifest, run_folder, run_stage, sha256_of_file, write_json

PICTURE_PX = 320
FAINTEST = 0.01  # change of probability that a full tint stands for at least
FOR, AGAINST = (214, 73, 51), (47, 110, 186)


@task(name="explain", cache_policy=NO_CACHE)
def explain_images(settings: Settings) -> Facts:
    """Explains a spread of evaluated images, right and wrong ones of each class."""
    run = run_folder(settings)

    def make(out: Path) -> Facts:
        from tasks.network_files import load_network
        from tasks.networks import predict_pixels

        chosen = choose_images(read_predictions(run), settings.explanation.n_images, settings.seed)
        images, network = PackedImages(run), load_network(run)
        size = settings.explanation.batch_size

        def answer(grey: NDArray[np.float32]) -> NDArray[np.float64]:
            # One batch size only: a compiled network is compiled again for each new shape.
            parts = (grey[i : i + size] for i in range(0, len(grey), size))
            padded = (np.pad(part, ((0, size - len(part)), (0, 0), (0, 0))) for part in parts)
            return predict_pixels(network, (part[..., None] for part in padded))[: len(grey)]

        folder = out / "explanations"
        folder.mkdir()
        progress = Progress("explaining", f"LIME on {len(chosen)} images")
        for done, row in enumerate(chosen.to_dict("records")):
            pixels = to_float(images.read([row["image_id"]]))[0]
            result = explain_image(pixels, answer, settings.explanation, settings.seed)
            segments = result.pop("segments")
            draw_explanation(pixels, segments, result["weights"]).save(folder / f"{row['image_id']}.png", optimize=True)
            write_json(folder / f"{row['image_id']}.json", {**row, **result})
            progress.show(done + 1, len(chosen))
        if not len(chosen):
            (folder / "none.txt").write_text("no image was asked for\n")
        return {"n_images": len(chosen), "split": str(chosen["split"].iloc[0]) if len(chosen) else None}

    inputs = {
        "model": sha256_of_file(run / "model.keras"),
        "predictions": sha256_of_file(run / "predictions.csv"),
        "threshold": read_json(run / "metrics.json")["threshold"],
        "explanation": settings.explanation.model_dump(),
        "seed": settings.seed,
    }
    facts = run_stage(settings, "explain", module=__name__, inputs=inputs, make=make, packages=("lime", "scikit-image"))
    print(f"explained {facts['n_images']:,} images" + (" (taken from the cache)" if facts["reused"] else ""))
    return facts


def read_predictions(run: Path) -> pd.DataFrame:
    """``predictions.csv`` with ``image_id`` and ``decision`` (1 from the threshold on), test rows if there are any."""
    table = pd.read_csv(run / "predictions.csv")
    ids = read_manifest(run).set_index("path")["image_id"]
    table["image_id"] = table["path"].map(ids)
    table["decision"] = (table["probability"] >= read_json(run / "metrics.json")["threshold"]).astype(int)
    return table[table["split"] == "test"] if (table["split"] == "test").any() else table


def choose_images(predictions: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """At most ``n`` rows: as even as can be over right and wrong of each class, seeded within each of the four.

    Args:
        predictions: ``image_id, split, label, subtype, has_device, probability, decision``.
    """
    rng = np.random.default_rng(seed)
    groups = [
        rows.iloc[rng.permutation(len(rows))]
        for _, rows in predictions.assign(right=predictions["label"] == predictions["decision"]).groupby(
            ["label", "right"]
        )
    ]
    turns = [(turn, g) for g, rows in enumerate(groups) for turn in range(len(rows))]
    picked = [groups[g].iloc[[turn]] for turn, g in sorted(turns)[:n]]
    columns = ["image_id", "split", "label", "subtype", "has_device", "probability", "decision", "right"]
    chosen = pd.concat(picked) if picked else predictions.assign(right=True).iloc[:0]
    chosen = chosen[columns].astype(object)
    return chosen.where(chosen.notna(), None)


def explain_image(
    pixels: NDArray[np.float32],
    network: Callable[[NDArray[np.float32]], NDArray[np.float64]],
    settings: ExplanationSettings,
    seed: int,
) -> Facts:
    """LIME weights of one X-ray ``(side, side, 1)``.

    Args:
        pixels: float32, 0.0 to 1.0.
        network: Grey images float32 ``(n, side, side)`` to P(label = 1), float64 ``(n,)``.
        settings: Samples, segments and batch size.
        seed: Seed of the perturbations.

    Returns:
        ``segments`` int ``(side, side)``; ``weights``, one per segment, positive where the piece raises P(pneumonia);
        ``r2`` of the local fit, its ``intercept`` and ``local_probability``, and the number of samples and seed.
    """
    from tasks.array_lime import ArrayExplainer, cut_pieces

    grey = pixels[..., 0]
    explainer = ArrayExplainer(random_state=seed, verbose=False)
    explanation = explainer.explain_instance(
        np.repeat(pixels, 3, axis=2).astype(np.float64),
        network,
        labels=(1,),
        top_labels=None,
        num_features=100_000,
        num_samples=settings.n_samples,
        batch_size=settings.batch_size,
        segmentation_fn=lambda _: cut_pieces(grey, settings.n_segments),
        random_seed=seed,
    )
    weights = dict(explanation.local_exp[1])
    return {
        "segments": explanation.segments,
        "weights": [round(float(weights.get(i, 0.0)), 6) for i in range(int(explanation.segments.max()) + 1)],
        "r2": _finite(explanation.score),
        "intercept": _finite(explanation.intercept[1]),
        "local_probability": _finite(np.ravel(explanation.local_pred)[0]),
        "n_samples": settings.n_samples,
        "seed": seed,
    }


def _finite(value: Any) -> float | None:
    """JSON has no NaN; R² of a constant answer has no value."""
    return round(float(value), 6) if np.isfinite(value) else None


def draw_explanation(pixels: NDArray[np.float32], segments: NDArray[np.intp], weights: list[float]) -> Image.Image:
    """The X-ray, and beside it the same with each piece tinted by its weight: red for pneumonia, blue against.

    Tint grows with the weight relative to the largest one of the image, or to ``FAINTEST`` where all are smaller: a map
    on which nothing depends looks as pale as it is.
    """
    from skimage.segmentation import find_boundaries

    side = (PICTURE_PX, PICTURE_PX)
    grey = Image.fromarray((pixels[..., 0] * 255).astype(np.uint8)).resize(side, Image.Resampling.BICUBIC)
    plain = np.repeat(np.asarray(grey)[..., None], 3, axis=2).astype(np.float32)
    pieces = np.asarray(Image.fromarray(segments.astype(np.int32)).resize(side, Image.Resampling.NEAREST))
    relative = np.asarray(weights) / max(np.abs(weights).max(), FAINTEST)
    strength = relative[pieces][..., None]
    colour = np.where(strength > 0, np.array(FOR, np.float32), np.array(AGAINST, np.float32))
    tinted = plain + (colour - plain) * 0.6 * np.abs(strength)
    edges = find_boundaries(pieces, mode="inner")[..., None] & (np.abs(strength) > 0.25)
    tinted = np.where(edges, 0.5 * tinted + 0.5 * colour, tinted)
    gap = np.full((PICTURE_PX, 8, 3), 255, np.float32)
    return Image.fromarray(np.concatenate([plain, gap, tinted], axis=1).clip(0, 255).astype(np.uint8))
