"""``make bench``: each benchmark in a process of its own, one JSON object per line."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
DRAWS = "full_size"  # what some of them measure on


def main() -> int:
    """Runs all benchmarks, or those named; the exit code is that of the first that failed, or 0."""
    named = sys.argv[1:] or sorted(path.stem for path in HERE.glob("[!_]*.py") if path.stem != DRAWS)
    for name in named:
        done = subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}"], check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
