"""A public network of this field, an Xception that was fitted to the same archive: the audit catches it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from recipe import to_flags

from tasks.files import REPOSITORY
from tasks.findings import read_audit

PACKAGE = "pneumonia-model-package==0.3.0"
N_IMAGES = 70
CHEAP = {
    "splitting": {"val_fraction": 0.45},
    "training": {"n_models": 1, "epochs": 1, "width": 4},
    "evaluation": {"splits": "val", "n_bootstrap": 100},
    "explanation": {"n_images": 2, "n_samples": 50, "n_repeated": 0},
    "auditing": {"n_images": 20},
}
READ = {"read": {"scale": "signed", "pneumonia": "1", "needs": "softmax"}}


@pytest.fixture(scope="module")
def xception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its .keras file; the package alone is fetched, none of what it asks for is needed."""
    folder = tmp_path_factory.mktemp("package")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(pip, capture_output=True, check=False, timeout=600).returncode:
        pytest.skip(f"the package index cannot be reached, or has no {PACKAGE}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as members:
        (name,) = (name for name in members.namelist() if name.endswith(".keras"))
        return Path(members.extract(name, folder))


def run_module(name: str, flags: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", name, *flags], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3_000:]


def take_part(source: Path, target: Path) -> None:
    """A data set with some of another one's images: of each folder the first."""
    left = dict.fromkeys(("train/NORMAL", "train/PNEUMONIA"), N_IMAGES) | dict.fromkeys(
        ("test/NORMAL", "test/PNEUMONIA", "val/NORMAL", "val/PNEUMONIA"), 4
    )
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(target, "w") as part:
        for name in sorted(whole.namelist()):
            folder = name.removeprefix("chest_xray/").rpartition("/")[0]
            if name.endswith(".jpeg") and left.get(folder, 0):
                left[folder] -= 1
                part.writestr(name, whole.read(name))


@pytest.mark.slow
def test_a_public_network_that_reads_around_the_lungs_is_caught(
    shared_data: Path, xception: Path, tmp_path: Path
) -> None:
    places = {"run_dir": tmp_path / "run", "storage": {"cache": tmp_path / "cache", "raw": tmp_path / "raw"}}
    take_part(shared_data / "chest_xray_224.zip", tmp_path / "part.zip")
    run_module("flows.pipeline", to_flags(CHEAP | places | {"source": tmp_path / "part.zip"}))
    run_module("flows.audit", to_flags(places | READ | {"model": xception, "out": tmp_path / "out", "threshold": 0.5}))
    found = read_audit(tmp_path / "out")
    assert found.network["side"] == 150 and found.network["channels"] == 3
    auc = found.performance["foreign"].auc
    assert auc is not None and auc["value"] > 0.9
    assert "blanked" in found.verdict.of("foreign").failed, "it tells the classes apart with the lungs covered"
