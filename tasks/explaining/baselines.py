"""Baselines of the audit: how far one gets on the same images without looking at a lung."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.measures import Array
from tasks.pixels.covering import find_lungs, widen_lungs

GRID = 28
RING = 3
"""The outer 3 of 28 pixels, as ``tasks.pixels.shifts.BORDER``."""

Packed = NDArray[np.uint8]

SAYS = {
    "device": "whether a device is seen, and nothing else",
    "ring": "a logistic regression on the outer 3 of 28 pixels",
    "grey": "a logistic regression on mean and spread of grey",
    "size": "a logistic regression on width, height and aspect of the file",
}
SHAPE_SAYS = "a logistic regression on size, extent and place of the outline of the lungs"


def describe_ring(packed: Packed) -> Array:
    """Mean grey of the outer cells of a 28 x 28 grid: uint8 ``(n, 224, 224)`` -> ``(n, 300)``, 0 to 1."""
    cell = packed.shape[1] // GRID
    small = packed.reshape(len(packed), GRID, cell, GRID, cell).mean((2, 4)) / 255
    ring = np.ones((GRID, GRID), bool)
    ring[RING:-RING, RING:-RING] = False
    return np.asarray(small[:, ring])


def describe_grey(packed: Packed) -> Array:
    """Mean and standard deviation of grey, ``(n, 2)``, 0 to 1."""
    flat = packed.reshape(len(packed), -1) / 255
    return np.stack([flat.mean(1), flat.std(1)], axis=1)


def describe_size(rows: pd.DataFrame) -> Array:
    """Width and height in pixels, and their ratio, ``(n, 3)``."""
    width, height = rows["width_px"].to_numpy(float), rows["height_px"].to_numpy(float)
    return np.stack([width, height, width / height], axis=1)


def describe_shape(places: NDArray[np.bool_]) -> Array:
    """The outline of lungs, and nothing of what is in them: bool ``(n, side, side)`` -> ``(n, 10)``, 0 to 1.

    Share of the area left and right of the middle; first and last row and column; middle and spread of rows and of
    columns.
    """
    middle = places.shape[2] // 2
    found = [places[:, :, :middle].mean((1, 2)), places[:, :, middle:].mean((1, 2))]
    for axis in (2, 1):
        along = places.mean(axis)  # (n, side): how much of each row, then of each column, is lung
        at = np.linspace(0, 1, along.shape[1])
        some, total = along > 0, along.sum(1)
        centre = along @ at / total
        spread = np.sqrt(np.maximum(along @ at**2 / total - centre**2, 0))
        found += [at[some.argmax(1)], at[-1 - some[:, ::-1].argmax(1)], centre, spread]
    return np.stack(found, axis=1)


def answer_by(features: Array, labels: NDArray[np.int64], asked: Array) -> Array:
    """P(label = 1) of the asked rows by a logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=2_000))
    return np.asarray(fitted.fit(features, labels).predict_proba(asked)[:, 1])


@dataclass(frozen=True)
class Baseline:
    """What a baseline says of the audited images.

    Attributes:
        says: What it looks at, for people.
        at: Rows it can say something about, bool ``(n,)``.
        answer: P(label = 1) of these rows, ``(at.sum(),)``; ``None`` where it cannot be had.
        reason: Why not; empty where it can.
    """

    says: str
    at: NDArray[np.bool_]
    answer: Array | None
    reason: str = ""


def ask_baselines(train: pd.DataFrame, train_packed: Packed, rows: pd.DataFrame, packed: Packed) -> dict[str, Baseline]:
    """What each baseline of ``SAYS`` says of the audited images, learnt from training images if it has to learn.

    Args:
        train: ``label, width_px, height_px`` of the training images.
        train_packed: Their pixels, uint8 ``(n, 224, 224)``.
        rows: ``has_device, width_px, height_px`` of the audited images.
        packed: Their pixels.
    """
    known, everyone = rows["has_device"].notna().to_numpy(bool), np.ones(len(rows), bool)
    device = rows["has_device"].fillna(False).to_numpy(float)[known]
    found = {"device": Baseline(SAYS["device"], known, device)}
    if not known.any():
        found["device"] = Baseline(SAYS["device"], known, None, "no image was screened")
    elif not np.ptp(device):
        found["device"] = Baseline(SAYS["device"], known, None, "all images are alike: with a device, or without")
    labels = train["label"].to_numpy(int)
    for name, features, asked in (
        ("ring", describe_ring(train_packed), describe_ring(packed)),
        ("grey", describe_grey(train_packed), describe_grey(packed)),
        ("size", describe_size(train), describe_size(rows)),
    ):
        found[name] = _learn(SAYS[name], features, labels, asked, everyone)
    return found


def ask_shape(train: pd.DataFrame, train_lungs: Packed, lungs: Packed) -> Baseline:
    """What the outline of the lungs alone says of the audited images: a hole has a shape too.

    It is none of ``SAYS``, which see no lung at all: who draws an outline has looked at the lungs.

    Args:
        train: ``label`` of the training images.
        train_lungs: Masks of their lungs, uint8 ``(n, 224, 224)``.
        lungs: Those of the audited images; images without lungs are not asked about.
    """
    learnt, asked = widen_lungs(train_lungs), widen_lungs(lungs)
    seen, at = find_lungs(learnt), find_lungs(asked)
    labels = train["label"].to_numpy(int)[seen]
    if not at.any():
        return Baseline(SHAPE_SAYS, at, None, "no lungs are found in the audited images")
    return _learn(SHAPE_SAYS, describe_shape(learnt[seen]), labels, describe_shape(asked[at]), at)


def _learn(says: str, features: Array, labels: NDArray[np.int64], asked: Array, at: NDArray[np.bool_]) -> Baseline:
    if len(np.unique(labels)) < 2:
        return Baseline(says, at, None, "training has one class only")
    if not np.ptp(features, axis=0).any():
        return Baseline(says, at, None, "all training images are alike in it")
    return Baseline(says, at, answer_by(features, labels, asked))
