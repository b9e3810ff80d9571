"""Whether the audit is right where the truth is known: the drawn sample with a shortcut planted in it.

Each seed draws its own sample, screens it, trains the model on what is left and its twin on as many images that were
not screened. The twin has to be caught, the model to pass. ``python -m tests.benchmarks.audit 7`` takes seed 7 alone.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import tasks  # noqa: F401  sets Prefect's environment before anything imports Prefect

SEEDS = (1, 2, 3, 4, 5)
PLANTED = {
    "sample": {"n_images": 1200, "device_effect": "strong"},
    "training": {"n_models": 1},
    "explanation": {"n_images": 12, "n_repeated": 0},
    "auditing": {"compare_unfiltered": True},
}


def main(seeds: tuple[int, ...]) -> None:
    """Prints ``{"bench": "audit", "seeds", "caught", "passed", …}``: counts, and what each seed gave."""
    from flows.pipeline import pipeline
    from tasks.settings import Settings

    said = []
    for seed in seeds:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            storage = {"cache": f"{place}/cache", "raw": f"{place}/raw"}
            run = Path(place) / "run"
            pipeline(Settings.model_validate({**PLANTED, "seed": seed, "storage": storage, "run_dir": str(run)}))
            audit = json.loads((run / "audit.json").read_text())
        verdicts = audit["verdict"]
        said.append(
            {
                "seed": seed,
                **{f"{name}_failed": verdict["failed"] for name, verdict in verdicts.items()},
                **{f"{name}_passed": verdict["passed"] for name, verdict in verdicts.items()},
                **{f"{name}_auc": audit["baselines"][name]["auc"]["value"] for name in verdicts},
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    result = {
        "bench": "audit",
        "seeds": len(seeds),
        "caught": sum(one["unfiltered_passed"] is False for one in said),
        "passed": sum(one["model_passed"] is True for one in said),
        "each": said,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(tuple(int(seed) for seed in sys.argv[1:]) or SEEDS)
