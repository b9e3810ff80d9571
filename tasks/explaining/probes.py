"""Probes: the same X-rays with a device put on or taken off, or with parts blanked, and what a network says of them.

Every network of an audit is asked about the same changed images; a change is measured in pairs, image by image, in
logits, and as a share of the gap between the classes (mean logit of pneumonia less mean logit of normal images): 1 is
as far as from normal to pneumonia.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.drawings.devices import CONSPICUOUS, KINDS, draw_devices, pick_kinds
from tasks.drawings.transplant import fill_place, grow_mask, lift_density, put_density
from tasks.measures import Array, draw_patients, summarise, to_logit, weighted_measures
from tasks.pixels.covering import cover
from tasks.pixels.greys import to_float
from tasks.pixels.window import window_place
from tasks.records import NORMAL, PNEUMONIA, Facts

Packed = NDArray[np.uint8]


@dataclass(frozen=True)
class Change:
    """Changed copies of some images.

    Attributes:
        at: Which rows they are made of, int ``(n,)``.
        changed: The copies, uint8 ``(n, 224, 224)``.
        control: Copies changed as much, without a device coming or going; ``None`` where there is no such control.
    """

    at: NDArray[np.intp]
    changed: Packed
    control: Packed | None = None


def to_packed(grey: NDArray[np.float32]) -> Packed:
    """float32 0.0 to 1.0 -> uint8."""
    return np.rint(np.clip(grey, 0, 1) * 255).astype(np.uint8)


def pick_rows(rows: pd.DataFrame, has_device: bool, n: int, seed: int) -> NDArray[np.intp]:
    """At most ``n`` rows of each class of which it is known that they show a device, or none; seeded, sorted."""
    rng = np.random.default_rng([seed, int(has_device)])
    known = (rows["has_device"] == has_device).fillna(False).to_numpy(bool)
    picked = [rng.permutation(np.flatnonzero(known & (rows["label"] == label)))[:n] for label in (NORMAL, PNEUMONIA)]
    return np.sort(np.concatenate(picked)).astype(np.intp)


def draw_on(packed: Packed, at: NDArray[np.intp], seed: int) -> dict[str, Change]:
    """Devices drawn on images: each kind alone, ``drawn``, kinds together as often as in the public archive, and
    ``conspicuous``, the same with more contrast: who looks for devices finds these.
    """
    changes = {}
    for number, kind in enumerate((*KINDS, "drawn", "conspicuous")):
        copies = []
        for row in at:
            rng = np.random.default_rng([seed, number, int(row)])
            kinds = (kind,) if kind in KINDS else pick_kinds(rng)
            strength = CONSPICUOUS if kind == "conspicuous" else 1.0
            copies.append(to_packed(draw_devices(_grey(packed, row)[..., None], kinds, rng, strength)[0][..., 0]))
        changes[kind] = Change(at, np.stack(copies))
    return changes


def put_real(packed: Packed, at: NDArray[np.intp], donors: NDArray[np.intp], masks: Packed, seed: int) -> Change:
    """Real devices of other images put on images; the control lifts the same places off images without a device.

    Args:
        packed: All images, uint8 ``(n, 224, 224)``.
        at: Rows that show no device and get one; the control lifts from these too.
        donors: Rows that show one.
        masks: The screener's masks of all images, uint8 of the same shape.
    """
    rng = np.random.default_rng([seed, 11])
    changed, control = [], []
    for row in at:
        grey = _grey(packed, row)
        donor, other = int(rng.choice(donors)), int(rng.choice(at))
        place = grow_mask(masks[donor])
        changed.append(to_packed(put_density(grey, lift_density(_grey(packed, donor), place))))
        control.append(to_packed(put_density(grey, lift_density(_grey(packed, other), place))))
    return Change(at, np.stack(changed), np.stack(control))


def take_off(packed: Packed, at: NDArray[np.intp], masks: Packed, seed: int) -> Change:
    """Devices filled from their surroundings; the control fills the place of another image's device instead."""
    rng = np.random.default_rng([seed, 12])
    changed, control = [], []
    for row in at:
        grey, place = _grey(packed, row), grow_mask(masks[row])
        others = at[at != row]
        other = grow_mask(masks[int(rng.choice(others))]) & ~place if len(others) else np.zeros_like(place)
        changed.append(to_packed(fill_place(grey, place)))
        control.append(to_packed(fill_place(grey, other)))
    return Change(at, np.stack(changed), np.stack(control))


def _grey(packed: Packed, row: int) -> NDArray[np.float32]:
    return np.asarray(to_float(packed[row : row + 1])[0, ..., 0])


def blank(packed: Packed, inside: bool) -> Packed:
    """Images of which only the outside (``inside`` blanked) or only the inside of the lung window is left."""
    return cover(packed, window_place(packed.shape[1]) == inside)


# -- what a network says of it -----------------------------------------------------------------------------------------


def measure_gap(rows: pd.DataFrame, probability: Array) -> float | None:
    """Mean logit of pneumonia less mean logit of normal images.

    Returns:
        Above 0, or ``None`` where a class is missing or the network tells nothing apart.
    """
    logits, labels = to_logit(probability), rows["label"].to_numpy()
    means = [logits[labels == label] for label in (NORMAL, PNEUMONIA)]
    if not all(len(part) for part in means):
        return None
    gap = float(means[1].mean() - means[0].mean())
    return gap if gap > 0.05 else None


@dataclass(frozen=True)
class Answers:
    """What a network says of changed images.

    Attributes:
        before: Probabilities of the images as they are, ``(n,)``.
        after: Of the changed copies.
        control: Of the control, or ``None``.
        threshold: Of the network.
        gap: As from ``measure_gap``.
    """

    before: Array
    after: Array
    control: Array | None
    threshold: float
    gap: float | None


def measure_change(rows: pd.DataFrame, answers: Answers, n_bootstrap: int, seed: int) -> Facts:
    """How far a change moves a network, for each class.

    Args:
        rows: ``label, group_id`` of the changed images.
        answers: Of the network.
        n_bootstrap: Draws of patients behind each interval.
        seed: Seed of the draws.

    Returns:
        ``normal`` and ``pneumonia``: ``n``; ``logit`` (mean change), ``shift`` (as a share of the gap) and ``flips``,
        the share that the change brings over the threshold to the other class, of those on the right side before; and
        with a control ``net_shift`` and ``net_flips``, what is left of them when the control's are taken off.
    """
    facts: Facts = {}
    labels = rows["label"].to_numpy()
    for label, name in ((NORMAL, "normal"), (PNEUMONIA, "pneumonia")):
        at = labels == label
        if not at.any():
            facts[name] = {"n": 0, "reason": f"no {name} image is among the changed ones"}
            continue
        weights = draw_patients(rows.loc[at, "group_id"], n_bootstrap, seed)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = _changes(answers, answers.after, at, label, weights)
            if answers.control is not None:
                plain = _changes(answers, answers.control, at, label, weights)
                drawn |= {f"net_{key}": drawn[key] - plain[key] for key in ("shift", "flips")}
        reasons = dict.fromkeys(("flips", "net_flips"), "no image is on the right side of the threshold")
        why = "the network does not tell the classes apart"
        facts[name] = {"n": int(at.sum())} | {
            key: summarise(values, reasons.get(key, why)) for key, values in drawn.items()
        }
    return facts


def _changes(answers: Answers, after: Array, at: NDArray[np.bool_], label: int, weights: Array) -> dict[str, Array]:
    """Figures of the images ``at``, all of one label, under each row of weights: ``(draws,)``."""
    before, after = answers.before[at], after[at]
    moved = weights @ (to_logit(after) - to_logit(before)) / weights.sum(1)
    right = (before >= answers.threshold) == label
    flipped = right & ((after >= answers.threshold) != label)
    return {
        "logit": moved,
        "shift": moved / answers.gap if answers.gap else np.full(len(moved), np.nan),
        "flips": weights @ flipped / (weights @ right),
    }


def measure_auc(rows: pd.DataFrame, probability: Array, weights: Array) -> Array:
    """AUC under each row of weights, ``(draws,)``; not finite where a class is missing."""
    return weighted_measures(rows["label"].to_numpy(float), probability, 0.5, weights)["auc"]


def mean_lift(
    on: Sequence[float], area: Sequence[float], patients: "pd.Series[str]", n_bootstrap: int, seed: int
) -> Facts:
    """Share of a map's weight on a place over the place's share of the area, over images: 1 is as by chance."""
    weights = draw_patients(patients, n_bootstrap, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        return summarise(weights @ np.asarray(on) / (weights @ np.asarray(area)), "the place has no area")
