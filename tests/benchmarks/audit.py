"""Whether the audit is right where the truth is known: the drawn sample with a shortcut planted in it.

Each seed draws its own sample, screens it, trains the model on what is left and its twin on as many images that were
not screened. The twin has to be caught, the model to pass. ``python -m tests.benchmarks.audit strong 7`` takes one kind
of shortcut (``sample.device_effect``) and seed 7 alone.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tasks  # noqa: F401  sets Prefect's environment before anything imports Prefect

EFFECTS = ("strong", "over_lungs", "outside_lungs")
SEEDS = (1, 2, 3, 4, 5)
PLANTED = {
    # With the default field no network learns what lies outside of the lungs; one that does has to be caught.
    "training": {"n_models": 1, "epochs": 14, "field": "whole"},
    "explanation": {"n_images": 0},
    "auditing": {"compare_unfiltered": True},
}


def main(effects: tuple[str, ...], seeds: tuple[int, ...]) -> None:
    """Prints a line ``{"bench": "audit", "planted", "seeds", "caught", "passed", …}`` for each kind of shortcut."""
    for effect in effects:
        each = [measure(effect, seed) for seed in seeds]
        result = {
            "bench": "audit",
            "planted": effect,
            "seeds": len(seeds),
            "caught": sum(one["unfiltered_passed"] is False for one in each),
            "passed": sum(one["model_passed"] is True for one in each),
            "each": each,
        }
        print(json.dumps(result), flush=True)


def measure(effect: str, seed: int) -> dict[str, Any]:
    """What the audit finds in one sample."""
    from flows.pipeline import pipeline
    from tasks.settings import Settings

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        storage = {"cache": f"{place}/cache", "raw": f"{place}/raw"}
        run = Path(place) / "run"
        sample = {"n_images": 1200, "device_effect": effect}
        settings = {**PLANTED, "sample": sample, "seed": seed, "storage": storage, "run_dir": str(run)}
        pipeline(Settings.model_validate(settings))
        audit = json.loads((run / "audit.json").read_text())
    verdicts = audit["verdict"]
    return {
        "seed": seed,
        **{f"{name}_failed": verdict["failed"] for name, verdict in verdicts.items()},
        **{f"{name}_passed": verdict["passed"] for name, verdict in verdicts.items()},
        **{f"{name}_auc": audit["baselines"][name]["auc"]["value"] for name in verdicts},
        "seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        tuple(each for each in given if each in EFFECTS) or EFFECTS,
        tuple(int(e) for e in given if e.isdigit()) or SEEDS,
    )
