"""Auditing any network over the images of a run, through a real Prefect engine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from foreign_networks import write_onnx
from report_run import Page

from flows.audit import AuditFlags, refuse_out
from flows.engine.command_line import run_command
from tasks.errors import PipelineError, SettingsError
from tasks.files import REPOSITORY, read_json, write_json
from tasks.findings import read_audit
from tasks.foreign.auditing import with_settings_of_run
from tasks.runs.run import Run
from tasks.settings import Settings


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of other people that looks at brightness."""
    return write_onnx(tmp_path_factory.mktemp("foreign") / "other.onnx", "signed", 3, "first", "logits", batch=1)


def run_audit(capfd: pytest.CaptureFixture[str], **flags: object) -> tuple[int, str, str]:
    """Exit code, standard output and error of the command."""
    from flows.audit import audit

    words = [word for name, value in flags.items() for word in ("--" + name.replace("__", "."), str(value))]
    capfd.readouterr()
    code = run_command(audit, words, "test", AuditFlags)
    shown = capfd.readouterr()
    return code, shown.out, shown.err


READ = {"read__scale": "signed", "read__pneumonia": "1", "read__needs": "softmax"}


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_engine")
def test_a_network_is_audited_beside_the_model_of_the_run_and_the_run_stays_as_it_is(
    finished_run: Path, workspace: Path, network: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    out = tmp_path / "looked"
    places = {"run_dir": finished_run, "storage__cache": workspace / "cache", "storage__raw": workspace / "raw"}
    code, said, wrong = run_audit(capfd, model=network, out=out, **READ, **places)
    assert code == 0, wrong
    assert said.splitlines()[-1] == str((out / "index.html").resolve())
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before
    found, own = read_audit(out), read_audit(finished_run)
    assert (found.network["side"], found.network["scale"]) == (16, "signed")
    assert found.verdict.names == ("foreign", "model") and found.split == own.split == "test"
    for part in ("baselines", "insertion", "removal", "blanked", "groups"):
        assert getattr(found, part)["model"] == getattr(own, part)["model"], part
    assert set(found.performance) == {"foreign", "model"}
    assert 0 < found.network["threshold"] < 1
    maps = {path.name for path in (out / "explanations").iterdir()}
    assert maps == {path.name for path in (finished_run / "explanations").iterdir()}
    mine, theirs = (
        read_json(folder / "explanations" / next(iter(maps)).replace(".png", ".json")) for folder in (out, finished_run)
    )
    assert mine["model"]["weights"] == theirs["weights"] != mine["weights"]
    page = Page((out / "index.html").read_text())
    assert "This network The run’s model" in page.text and "other.onnx" in page.text
    assert (page.errors, page.open) == ([], [])
    assert {path.name for path in tmp_path.iterdir()} == {"looked"}


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_engine")
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({}, "error: read.scale: the file leaves it open; give --read.scale (unit, bytes, signed, imagenet)"),
        (READ | {"model": "/none.onnx"}, "error: model: /none.onnx is no file on this machine"),
        (READ | {"run_dir": "/nowhere"}, "error: /nowhere/model.keras is missing"),
    ],
)
def test_what_cannot_be_audited_is_refused_in_one_sentence_and_leaves_nothing(
    finished_run: Path, network: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: Any, says: str
) -> None:
    given = {"model": network, "run_dir": finished_run, "out": tmp_path / "out"} | flags
    code, _, wrong = run_audit(capfd, **given)
    assert code == 2 and says in wrong and "Traceback" not in wrong
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_or_in_the_run_is_refused(tmp_path: Path) -> None:
    run = Run(Settings(run_dir=str(tmp_path / "run")))
    (tmp_path / "file").touch()
    for out, says in (
        (tmp_path, "is there already; name a folder that does not exist yet"),
        (tmp_path / "file", "is there already"),
        (tmp_path / "file" / "out", "lies below a file"),
        (tmp_path / "run" / "audits" / "one", "lies in the run folder, which stays as it is"),
        ("s3://bucket/out", "is no folder on this machine"),
    ):
        with pytest.raises(SettingsError, match=rf"^out: .*{says}"):
            refuse_out(str(out), run)
    refuse_out(str(tmp_path / "out"), run)


def test_settings_are_those_of_the_run_where_the_flags_leave_the_default(tmp_path: Path) -> None:
    had = {
        "seed": 11,
        "explanation": {"n_images": 4, "n_samples": 99},
        "auditing": {"fail_on": ["blanked"], "n_images": 9},
    }
    given = Settings.model_validate({"run_dir": str(tmp_path), "explanation": {"n_images": 5}})
    assert with_settings_of_run(given) == given, "the run is not finished"
    write_json(tmp_path / "run.json", {"settings": had})
    found = with_settings_of_run(given)
    assert (found.seed, found.explanation.n_images, found.explanation.n_samples) == (11, 5, 99)
    assert (found.auditing.n_images, found.auditing.fail_on, found.evaluation) == (9, (), given.evaluation)
    write_json(tmp_path / "run.json", {"settings": had | {"seed": "x"}})
    with pytest.raises(PipelineError, match=r"seed of its run\.json is not what a run wrote"):
        with_settings_of_run(given)


def test_importing_the_flow_loads_neither_tensorflow_nor_onnx() -> None:
    names = "('tensorflow', 'keras', 'onnx', 'onnxruntime', 'lime', 'matplotlib')"
    code = f"import sys, flows.audit; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_flow_is_deployed_on_demand_with_its_parameters_as_a_form() -> None:
    from flows.audit import audit

    deployments = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    ours = [each for each in deployments if each["entrypoint"] == "flows/audit.py:audit"]
    assert [(each["name"], each["work_pool"]["name"]) for each in ours] == [("on-demand", "cpu")]
    assert (audit.name, audit.parameters.required) == ("audit", ["model", "out"])
    assert set(audit.parameters.properties) == {"model", "out", "read", "threshold", "settings"}
    json.dumps(audit.parameters.model_dump())
