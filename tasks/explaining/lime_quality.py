"""How far a LIME map can be believed: is it stable between seeds, and does the network follow it?"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.explaining.lime_sampling import CutImage
from tasks.measures import Array
from tasks.records import Facts

STABLE_FROM = 0.7
"""Mean rank correlation between seeds from which on a map counts as stable."""
N_TOP = 5
N_STEPS = 16
N_RANDOM = 8


def measure_stability(maps: Sequence[Array]) -> Facts:
    """How alike the maps of one image are that differ in their seed alone.

    Args:
        maps: Weights of the same pieces, ``(n_pieces,)`` each.

    Returns:
        ``n_seeds``; means over pairs of maps, or ``None`` for a single map or one without any difference between
        pieces: ``rank_correlation`` (Spearman) of the weights, -1 to 1, and ``top5_overlap``, the share of the five
        pieces with the largest weights, by size, that two maps have in common; and ``stable``, ``None`` where unknown.
    """
    facts: Facts = {"n_seeds": len(maps), "rank_correlation": None, "top5_overlap": None, "stable": None}
    if len(maps) < 2 or any(np.ptp(weights) == 0 for weights in maps):
        return facts
    from scipy.stats import spearmanr

    pairs = [(a, b) for i, a in enumerate(maps) for b in maps[:i]]
    correlation = float(np.mean([spearmanr(a, b).statistic for a, b in pairs]))
    n_top = min(N_TOP, len(maps[0]))
    tops = [set(np.argsort(-np.abs(weights), kind="stable")[:n_top].tolist()) for weights in maps]
    overlap = np.mean([len(a & b) / n_top for i, a in enumerate(tops) for b in tops[:i]])
    facts |= {"rank_correlation": round(correlation, 4), "top5_overlap": round(float(overlap), 4)}
    return facts | {"stable": correlation >= STABLE_FROM}


def measure_faithfulness(
    cut: CutImage, weights: Array, network: Callable[[NDArray[np.float32]], Array], decision: int, seed: int
) -> Facts:
    """Deletion and insertion (Petsiuk et al. 2018): how P(decision) moves as pieces go, or come, in the map's order.

    Pieces that speak for the decision most come first. A faithful map makes the answer fall sooner than a random order
    of the same pieces does, and rise sooner. Hidden pieces have their mean grey, as in LIME itself.

    Args:
        cut: The X-ray.
        weights: Of its pieces, positive for pneumonia, ``(n_pieces,)``.
        network: As in ``tasks.explaining.lime_sampling``.
        decision: 1 where the image was called pneumonia, else 0.
        seed: Seed of the random orders.

    Returns:
        ``deletion`` and ``insertion``, the areas under the curves (mean P(decision) over steps, 0 to 1; a faithful map
        has a small and a large one), ``random``, the mean area for random orders, which is the same for both as the one
        is the other backwards, and the curves: ``hidden`` (shares of the pieces), ``deletion_curve``,
        ``insertion_curve``, ``random_curve`` (of deletion).
    """
    n = cut.n_pieces
    counts = np.unique(np.rint(np.linspace(0, n, N_STEPS + 1)).astype(int))
    counts = np.unique(np.concatenate([counts, n - counts]))  # the same read backwards
    rng = np.random.default_rng(seed)
    order = np.argsort(-weights if decision else weights, kind="stable")
    # Insertion in an order is deletion of its reverse, read backwards.
    orders = [order, order[::-1], *(rng.permutation(n) for _ in range(N_RANDOM))]
    ranks = np.stack([np.argsort(o) for o in orders])  # (orders, n)
    shown = ranks[:, None, :] >= counts[None, :, None]  # (orders, steps, n): what is left after `count` pieces went
    probability = network(cut.show(shown.reshape(-1, n))).reshape(len(orders), len(counts))
    curves: Array = probability if decision else 1 - probability
    shares = counts / n
    areas: Array = np.asarray(np.trapezoid(curves, shares, axis=1))
    series: dict[str, Array] = {"hidden": shares, "deletion_curve": curves[0], "insertion_curve": curves[1][::-1]}
    series["random_curve"] = curves[2:].mean(0)
    return {
        "deletion": round(float(areas[0]), 4),
        "insertion": round(float(areas[1]), 4),
        "random": round(float(areas[2:].mean()), 4),
        **{name: [round(float(v), 4) for v in values] for name, values in series.items()},
    }
