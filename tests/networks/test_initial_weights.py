"""Initial weights follow from a seed alone, whatever other threads draw meanwhile."""

import random
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tasks.devices.screener import build_core
from tasks.networks.classifier import build_member
from tasks.networks.keras_backend import keras
from tasks.settings import TrainingSettings


@pytest.fixture
def busy_neighbour() -> Iterator[None]:
    """A thread that draws from Python's global generator all the time, as an engine's threads do now and then."""
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            random.random()

    thread = threading.Thread(target=draw)
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.mark.parametrize(
    "build",
    [lambda seed: build_member(TrainingSettings(side_px=32, width=4), seed), lambda seed: build_core(seed, (4, 4))],
    ids=["member", "screener"],
)
def test_a_seed_gives_the_same_weights_while_another_thread_draws(
    build: Callable[[int], keras.Model], busy_neighbour: None
) -> None:
    one, again, other = (build(seed).get_weights() for seed in (3, 3, 4))
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))
