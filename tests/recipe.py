"""The small recipe: settings with which a run goes through every stage in seconds, once for all tests.

A test that needs more changes these settings where it says why.
"""

from collections.abc import Iterator, Mapping
from typing import Any

RECIPE: dict[str, dict[str, Any]] = {
    "sample": {"n_images": 60, "side_px": 128},  # fewer or smaller ones are refused as a sample
    "training": {"side_px": 32, "width": 4, "n_models": 1, "epochs": 2},
    "evaluation": {"n_bootstrap": 20},
    "explanation": {"n_images": 4, "n_samples": 50, "n_segments": 16, "n_repeated": 1, "n_seeds": 2},
    "auditing": {"n_images": 4},
}


def adapt(**sections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The recipe with some settings of its sections changed."""
    return {name: RECIPE.get(name, {}) | dict(sections.get(name, {})) for name in RECIPE | sections}


def to_flags(settings: Mapping[str, Any], prefix: str = "--") -> list[str]:
    """Settings as flags of a command: ``--training.epochs 2``."""
    return list(_flags(settings, prefix))


def _flags(settings: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in settings.items():
        flag = prefix + name.replace("_", "-")
        if isinstance(value, Mapping):
            yield from _flags(value, flag + ".")
        else:
            yield from (flag, str(value))


FLAGS = tuple(to_flags(RECIPE))
LONG_EPOCHS = {"side_px": 128, "width": 24, "n_models": 1}
"""Settings of training for a signal that has to come within an epoch: those of the recipe are over too soon."""
