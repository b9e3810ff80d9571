"""What tests of hostile input share: what a case may end in, a bound on memory, and ways to damage bytes."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_table import FaultTable
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from tasks.errors import PipelineError

# Deterministic, so that a failure in one place is a failure in all; how many cases is for the profile to say.
hostile = hypothesis_settings(derandomize=True, database=None, suppress_health_check=list(HealthCheck))
MEMORY_MB = 512  # the most that a table with a million rows takes is about 300
DAMAGES = ("cut", "flip", "insert", "blank", "other", "swap")


def network(units: int = 1) -> Any:
    """A small network, built and not trained."""
    from tasks.networks.keras_backend import keras

    pixels = keras.Input((4, 4, 1))
    return keras.Model(pixels, keras.layers.Dense(units)(keras.layers.Flatten()(pixels)))


def ends_well(faults: FaultTable, act: Callable[[], Any]) -> bool:
    """Counts a case and does it: whether it ended right; a refusal has to be one of ours and one line."""
    faults.n_cases += 1
    try:
        act()
    except PipelineError as error:
        said = str(error)
        assert said and said.isprintable() and len(said) < 3_000, said
        return False
    return True


def damage(content: bytes, kind: str, seed: int) -> bytes:
    """Bytes that something happened to."""
    dice, data = random.Random(seed), bytearray(content)
    if kind == "cut":
        return bytes(data[: dice.randrange(len(data))])
    if kind == "insert":
        at = dice.randrange(len(data))
        data[at:at] = dice.randbytes(dice.randrange(1, 50))
    elif kind == "blank":
        at = dice.randrange(len(data))
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    elif kind == "other":
        return dice.choice([b"", b"\x00" * 100, b"PK\x03\x04", b"{}", b"\x89HDF\r\n\x1a\n", dice.randbytes(300)])
    elif kind == "swap":
        half = len(data) // 2
        return bytes(data[half:] + data[:half])
    else:
        for _ in range(dice.randrange(1, 6)):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(data)


def memory_mb(field: str) -> float:
    """A line of /proc/self/status, such as VmHWM, the highest memory since it was last reset."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """No test of a module that imports this makes the process grow by more than the limit."""
    if not Path("/proc/self/clear_refs").exists():
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_mb("VmRSS")
    yield
    grown = memory_mb("VmHWM") - before
    assert grown < MEMORY_MB, f"it grew by {grown:,.0f} MB"
