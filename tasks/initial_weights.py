"""Initial weights that follow from a seed alone.

A layer without a seed of its own takes one from Python's global generator, which the threads of an engine use too: the
same seed then gave other weights now and then.
"""

import random
from collections.abc import Iterator

from tasks.keras_backend import keras


def draw_kernels(seed: int) -> Iterator[keras.initializers.Initializer]:
    """One initialiser after another for the kernels of a network (Glorot & Bengio 2010), in the order of building."""
    generator = random.Random(seed)
    while True:
        yield keras.initializers.GlorotUniform(seed=generator.randint(1, 10**9))
