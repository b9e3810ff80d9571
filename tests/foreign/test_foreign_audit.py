"""A network of other people over a small run made by hand: what is written about it, and what is asked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_networks import write_onnx
from report_run import Page
from small_run import write_run

from tasks.errors import AuditError, SettingsError
from tasks.explaining.auditing import refuse_failed
from tasks.files import read_json, write_json
from tasks.findings import NetworkVerdict, read_audit
from tasks.foreign.auditing import audit_network, check_on_validation, read_network
from tasks.foreign.network import ForeignNetwork
from tasks.foreign.page import write_page
from tasks.foreign.reading import ReadAs
from tasks.networks.files import save_network
from tasks.runs.manifest import write_manifest
from tasks.runs.run import Run
from tasks.settings import Settings

N_IMAGES = 24
SECTIONS: dict[str, Any] = {
    "evaluation": {"splits": ["val"], "n_bootstrap": 20},
    "explanation": {"n_images": 2, "n_samples": 50, "n_segments": 8, "n_repeated": 0, "batch_size": 50},
    "auditing": {"n_images": 2, "min_images": 2},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run whose pneumonia images are the brighter ones; two of three images are for training."""
    from tasks.networks.keras_backend import keras

    folder = tmp_path_factory.mktemp("foreign")
    manifest = write_run(folder / "run", [0.9, 0.1] * (N_IMAGES // 2), folder / "cache")
    number = np.arange(N_IMAGES)
    manifest = manifest.assign(
        label=(number >= N_IMAGES // 2).astype(int),
        split=np.where(number % 3 == 0, "val", "train"),
        has_device=manifest["device_score"] > 0.5,
        group_id=[f"p{i}" for i in number],
        subtype="unknown",
        width_px=1_000 + number % 5,
        height_px=800 + number % 3,
    )
    write_manifest(folder / "run", manifest)
    val = manifest[manifest["split"] == "val"].assign(bacteria=0.5, probability=[i / 8 + 0.05 for i in range(8)])
    columns = ["path", "split", "label", "subtype", "has_device", "probability", "bacteria"]
    val[columns].to_csv(folder / "run" / "predictions.csv", index=False)
    write_json(folder / "run" / "metrics.json", {"threshold": 0.5})
    pixels = keras.Input((224, 224, 1))
    small = keras.layers.Flatten()(keras.layers.AveragePooling2D(56)(pixels))
    one = keras.layers.Dense(1, activation="sigmoid", kernel_initializer="ones")(small)
    save_network(keras.Model(pixels, dict.fromkeys(("probability", "bacteria", "members"), one)), folder / "run")
    places = {"run_dir": str(folder / "run"), "storage": {"cache": str(folder / "cache")}}
    return Run(Settings.model_validate(SECTIONS | places))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network that looks at brightness."""
    folder = tmp_path_factory.mktemp("network")
    return str(write_onnx(folder / "other.onnx", "signed", 3, "first", "sigmoid", batch=4))


def test_the_network_is_audited_explained_and_shown_beside_the_model_and_the_run_stays_as_it_is(
    run: Run, network: str, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    reading = read_network.fn(run, network, ReadAs(scale="signed"))
    verdict = audit_network.fn(run, network, reading, None, tmp_path)
    write_page.fn(tmp_path, run)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before
    assert {path.name for path in tmp_path.iterdir()} == {"audit.json", "explanations", "index.html"}
    found = read_audit(tmp_path)
    assert found.verdict.names == ("foreign", "model") and (found.split, found.n_images) == ("val", 8)
    assert found.verdict.of("foreign").passed == verdict["passed"]
    for part in ("baselines", "insertion", "removal", "blanked", "attribution", "groups", "performance"):
        assert {"foreign", "model"} <= set(getattr(found, part)), part
    auc = found.performance["foreign"].auc
    assert auc is not None and auc["value"] == 1.0 and 0 < found.network["threshold"] < 1
    assert found.network["file"] == "other.onnx" and found.network["scale"] == "signed"
    maps = [read_json(path) for path in (tmp_path / "explanations").glob("*.json")]
    assert len(maps) == 2 and all(one["weights"] != one["model"]["weights"] for one in maps)
    page = Page((tmp_path / "index.html").read_text())
    assert (page.errors, page.open) == ([], [])
    assert "other.onnx" in page.text and "This network The run’s model" in page.text
    assert "twin" not in page.text and "without screening" not in page.text.lower()
    assert "-1 (black) to 1 (white) --read.scale" in page.text


def test_a_threshold_that_is_given_is_taken(run: Run, network: str) -> None:
    reading = read_network.fn(run, network, ReadAs(scale="signed"))
    assert check_on_validation(run, ForeignNetwork(Path(network), reading), 0.25) == 0.25


def test_a_network_that_calls_normal_images_pneumonia_is_asked_about_unless_somebody_said_so(
    run: Run, tmp_path: Path
) -> None:
    path = write_onnx(tmp_path / "other.onnx", "unit", 1, "last", "logits")
    how = {"scale": "unit", "needs": "softmax"}
    turned = read_network.fn(run, str(path), ReadAs(pneumonia="0", **how))
    assert 0 <= check_on_validation(run, ForeignNetwork(path, turned), None) <= 1
    guessed = turned.model_copy(update={"guessed": ("pneumonia",)})
    with pytest.raises(SettingsError, match=r"^read\.pneumonia: AUC on validation is 0\.000 .* --read\.pneumonia rest"):
        check_on_validation(run, ForeignNetwork(path, guessed), 0.5)


def test_a_failed_part_that_was_named_ends_in_an_error_that_names_the_report(run: Run) -> None:
    verdict = NetworkVerdict(passed=False, failed=["blanked"])
    refuse_failed(verdict, run.settings.auditing, "out/index.html")
    asked = run.settings.auditing.model_copy(update={"fail_on": ("blanked",)})
    with pytest.raises(AuditError, match=r"failed blanked; the report in out/index\.html"):
        refuse_failed(verdict, asked, "out/index.html")
