"""The audit on a sample whose truth is known: a planted shortcut is caught, and screening removes it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.files import REPOSITORY


@pytest.mark.slow
def test_a_network_trained_on_a_planted_shortcut_is_caught_and_the_screened_one_passes(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment["PREFECT_HOME"] = str(tmp_path / "prefect")  # its temporary server, beside nobody else's
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.audit", "strong", "7"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["seeds"], found["caught"], found["passed"]) == (1, 1, 1), found["each"]
    assert "insertion" in found["each"][0]["unfiltered_failed"]
