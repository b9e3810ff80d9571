"""What is explained and audited: the model and its twin, loaded and ready to be asked, and the images of an audit."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.findings import read_metrics
from tasks.measures import choose_threshold
from tasks.networks.twin import work_folder
from tasks.records import MODEL

Network = Callable[[NDArray[np.float32]], NDArray[np.float64]]
"""Grey images float32 ``(n, side, side)``, 0.0 to 1.0, to P(label = 1), float64 ``(n,)``."""


@dataclass(frozen=True)
class Scene:
    """The audited images: a row each, their pixels and the masks of devices and lungs, all uint8 ``(n, 224, 224)``."""

    rows: pd.DataFrame
    packed: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    lungs: NDArray[np.uint8]


@dataclass(frozen=True)
class Subject:
    """A network under audit.

    Attributes:
        name: ``model`` or ``unfiltered``.
        ask: Packed images, uint8 ``(n, 224, 224)``, to P(label = 1), ``(n,)``.
        threshold: From which probability on it calls an image pneumonia.
        probability: P(label = 1) of the audited images, ``(n,)``.
    """

    name: str
    ask: Callable[[NDArray[np.uint8]], NDArray[np.float64]]
    threshold: float
    probability: NDArray[np.float64]


def load_subject(run: Path, name: str, packed: NDArray[np.uint8]) -> Subject:
    """A network of a run, and its answers to the audited images, uint8 ``(n, 224, 224)``."""
    from tasks.networks.classifier import predict
    from tasks.networks.files import load_network

    network = load_network(run, name)

    def ask(packed: NDArray[np.uint8]) -> NDArray[np.float64]:
        return predict(network, packed)

    return Subject(name, ask, read_threshold_of(run, name), ask(packed))


def load_for_lime(run: Path, name: str, batch_size: int) -> Network:
    """A network as LIME asks it, ``batch_size`` X-rays at a time; kept, as shards of one process use the same."""
    from tasks.networks.files import read_checksum

    return _load_for_lime(run.resolve(), name, read_checksum(run, name), batch_size)


@lru_cache(maxsize=2)
def _load_for_lime(run: Path, name: str, sha256: str, size: int) -> Network:
    from tasks.networks.classifier import predict_pixels
    from tasks.networks.files import load_network

    network = load_network(run, name)

    def answer(grey: NDArray[np.float32]) -> NDArray[np.float64]:
        # One batch size only: a compiled network is compiled again for each new shape.
        parts = (grey[i : i + size] for i in range(0, len(grey), size))
        padded = (np.pad(part, ((0, size - len(part)), (0, 0), (0, 0))) for part in parts)
        return predict_pixels(network, (part[..., None] for part in padded))[: len(grey)]

    return answer


def read_threshold_of(run: Path, name: str) -> float:
    """From which probability on a network calls an image pneumonia; both thresholds are chosen in the same way."""
    if name == MODEL:
        return read_metrics(run).threshold
    shifts = pd.read_csv(work_folder(run, name) / "shifts.csv")
    return choose_threshold(
        shifts["label"].to_numpy(float), shifts["probability"].to_numpy(float), list(shifts["shift"])
    )
