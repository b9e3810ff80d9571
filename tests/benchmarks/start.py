"""How long a fresh interpreter takes to import the pipeline."""

import json
import statistics
import subprocess
import sys
import time

ROUNDS = 5


def main() -> None:
    """Prints ``{"bench": "start", "import_s", …}``: the median over rounds, after one that fills the file cache."""
    seconds = [time_import() for _ in range(ROUNDS + 1)][1:]
    result = {
        "bench": "start",
        "import_s": round(statistics.median(seconds), 2),
        "lowest": round(min(seconds), 2),
        "highest": round(max(seconds), 2),
        "rounds": ROUNDS,
    }
    print(json.dumps(result), flush=True)


def time_import() -> float:
    """Seconds from starting Python to its end, with nothing but the import between."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import flows.pipeline"], check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
