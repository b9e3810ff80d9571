"""Taking answers: from the command line, and in a deployed run that is suspended until a person filled in its form."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pandas as pd
import pytest
import yaml
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import FlowRun
from prefect.flow_runs import resume_flow_run
from prefect.settings import PREFECT_API_URL
from s3_server import running_s3, set_aws
from small_run import write_run

from flows.engine.command_line import read_flags, run_command
from flows.engine.run_folders import with_run_folder
from flows.review import ReviewFlags, review
from tasks.devices.answers import read_answered, read_kept
from tasks.devices.contact_sheet import show_sheet
from tasks.files import REPOSITORY
from tasks.runs.bucket import send
from tasks.runs.manifest import read_manifest
from tasks.runs.run import Run
from tasks.settings import Settings

pytestmark = pytest.mark.usefixtures("prefect_engine")


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Path, pd.DataFrame]:
    """A run folder with three doubtful images, and its manifest."""
    return tmp_path / "runs" / "run", write_run(tmp_path / "runs" / "run", [0.5, 0.6, 0.7], tmp_path / "cache")


def run_review(flags: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command, in this process."""
    capfd.readouterr()
    code = run_command(review, flags, "test", ReviewFlags)
    shown = capfd.readouterr()
    return code, shown.out, shown.err


# -- the command -------------------------------------------------------------------------------------------------------


def test_answers_of_a_csv_are_taken_and_the_last_line_says_where_they_are_kept(
    prepared: tuple[Path, pd.DataFrame],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, manifest = prepared
    new = tmp_path / "answers.csv"
    new.write_text(f"path,device\n{manifest['path'][0]},1\n{manifest['path'][1]},0\n")
    code, out, _ = run_review(["--run_dir", str(run), "--answers", str(new), "--reviewer", "Ada"], capfd)
    address = run.parent / "device_answers"
    assert code == 0
    assert out.strip().splitlines()[-1] == str(address)
    assert "2 answers taken" in caplog.text
    assert f"the same pipeline command with --run-dir {run} now uses them" in caplog.text
    assert {a.reviewer for a in read_kept(address)} == {"Ada"}
    assert read_answered(Run(Settings(run_dir=str(run)))) == {manifest["sha256"][0]: 1, manifest["sha256"][1]: 0}


def test_another_address_can_be_named_and_an_unnamed_reviewer_is_the_user(
    prepared: tuple[Path, pd.DataFrame], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, manifest = prepared
    new, address = tmp_path / "answers.csv", tmp_path / "elsewhere" / "kept"
    new.write_text(f"path,device\n{manifest['path'][0]},1\n")
    flags = ["--run-dir", str(run), f"--answers={new}", "--screening.answers", str(address)]
    assert run_review(flags, capfd)[0] == 0
    assert all(answer.reviewer for answer in read_kept(address))
    assert not (run.parent / "device_answers").exists()


def test_answers_about_a_run_in_a_bucket_join_those_that_others_gave_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_s3({"chest": {}}) as url:
        for name, value in set_aws(url).items():
            monkeypatch.setenv(name, value)
        for place in ("there", "here"):
            flags = ["--run-dir", "s3://chest/runs/one", "--storage.cache", str(tmp_path / place)]
            settings = read_flags(flags, "test")
            manifest = write_run(Run(settings).folder, [0.5, 0.6], tmp_path / place)
            send(Run(settings), ["manifest.parquet"])
            new = tmp_path / f"{place}.csv"
            new.write_text(f"path,device\n{manifest['path'][0 if place == 'here' else 1]},1\n")
            code, out, err = run_review([*flags, "--answers", str(new)], capfd)
            assert code == 0, err
        assert len(read_answered(Run(settings))) == 2
        sent = boto3.client("s3").list_objects_v2(Bucket="chest", Prefix="runs/device_answers/")["Contents"]
        names = [path.name for path in sorted(Path(out.strip().splitlines()[-1]).iterdir())]
        assert [one["Key"].rpartition("/")[2] for one in sent] == names and len(names) == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--run-dir", "RUN"], "--answers"),
        (["--run-dir", "RUN", "--answers", "no.csv"], "no.csv does not exist"),
        (
            ["--run-dir", "RUN", "--answers", "UNKNOWN"],
            "none of its 1 paths is an image of the source, such as 'z.png'",
        ),
        (["--run-dir", "nowhere", "--answers", "UNKNOWN"], "prepare flow"),
        (["--answers", "UNKNOWN"], "--run-dir"),
        (["--run-dir", "RUN", "--answers", "KNOWN", "--reviewer", "=1"], "formula"),
        (["--run-dir", "RUN", "--no-such-flag", "1"], "no-such-flag"),
    ],
)
def test_answers_that_cannot_be_taken_end_in_one_sentence_with_code_2(
    prepared: tuple[Path, pd.DataFrame],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    flags: list[str],
    says: str,
) -> None:
    (tmp_path / "unknown.csv").write_text("path,device\nz.png,1\n")
    (tmp_path / "known.csv").write_text(f"path,device\n{prepared[1]['path'].iloc[0]},1\n")
    places = {"RUN": str(prepared[0])} | {name.upper(): str(tmp_path / f"{name}.csv") for name in ("known", "unknown")}
    code, out, err = run_review([places.get(flag, flag) for flag in flags], capfd)
    last = err.strip().splitlines()[-1]
    assert code == 2
    assert out == ""
    assert last.startswith("error: ")
    assert says in last
    assert "Traceback" not in err
    assert not (prepared[0].parent / "device_answers").exists()


def test_the_help_describes_its_own_flags_and_those_of_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(review, ["--help"], "python -m flows.review", ReviewFlags)
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for text in ("--answers", "CSV saved from the sheet", "--reviewer", "Who answered", "--run-dir"):
        assert text in shown


def test_a_run_that_shall_wait_but_cannot_is_refused_before_any_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from flows.pipeline import pipeline

    flags = ["--run-dir", str(tmp_path / "run"), "--storage.raw", str(tmp_path / "raw")]
    assert run_command(pipeline, [*flags, "--screening.wait-for-review", "true"], "test") == 2
    assert (
        capfd.readouterr().err.strip().splitlines()[-1].startswith("error: screening.wait_for_review: only a deployed")
    )
    assert list(tmp_path.iterdir()) == []


def test_a_run_keeps_the_name_of_its_folder_however_often_it_starts_from_the_top() -> None:
    @flow
    def name_folder() -> tuple[str | None, datetime]:
        from prefect.context import FlowRunContext

        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        due = context.flow_run.expected_start_time
        assert due is not None
        while datetime.now(UTC) < due + timedelta(seconds=1):
            time.sleep(0.05)
        return with_run_folder(Settings()).run_dir, due

    folder, due = name_folder()
    assert folder == f"data/runs/{due.astimezone(UTC):%Y%m%dT%H%M%SZ}-sample"


def test_the_sheet_is_linked_in_the_web_page(tmp_path: Path) -> None:
    @flow
    def show() -> None:
        show_sheet(Run(Settings(run_dir=str(tmp_path / "run"))), 3)

    show()
    with get_client(sync_client=True) as client:
        sheets = ArtifactFilter(key=ArtifactFilterKey(any_=["review-sheet"]))
        shown = [str(artifact.data) for artifact in client.read_artifacts(artifact_filter=sheets)]
    assert any(str(tmp_path / "run" / "review" / "index.html") in text and "3 doubtful" in text for text in shown)


# -- deployed ----------------------------------------------------------------------------------------------------------


def start_deployed(entrypoint: str, parameters: dict[str, Any], folder: Path) -> FlowRun:
    """A run of a deployment like those of ``prefect.yaml`` but in this folder, on the server of the session."""
    steps = [{"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}]
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow_from_name(entrypoint.split(":")[1])
        place = str(REPOSITORY / entrypoint)
        deployment_id = client.create_deployment(flow_id, "test", entrypoint=place, pull_steps=steps)
        return client.create_flow_run_from_deployment(deployment_id, parameters=parameters)


@pytest.fixture
def execute(tmp_path: Path) -> Callable[[FlowRun], tuple[str, str]]:
    """Executes a scheduled run in the process that a worker starts for it: name of its state after, and its log."""

    def work(run: FlowRun) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "prefect.engine", str(run.id)],
            cwd=tmp_path,
            env={**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value()), "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(run.id).state
        return str(state and state.name), done.stdout + done.stderr

    return work


@pytest.mark.slow
def test_a_deployed_run_waits_for_its_form_outlives_useless_ones_and_takes_a_good_one(
    prepared: tuple[Path, pd.DataFrame], execute: Callable[[FlowRun], tuple[str, str]]
) -> None:
    folder, manifest = prepared
    address = folder.parent / "device_answers"
    run = start_deployed("flows/review.py:review", {"settings": {"run_dir": str(folder)}}, REPOSITORY)
    state, log = execute(run)
    assert state == "Suspended", log
    assert "3 doubtful images wait for a person" in log

    resume_flow_run(run.id, run_input={"with_device": "0123456789abcdef"})
    state, log = execute(run)
    assert state == "Suspended", log
    assert "this form cannot be used" in log
    assert "'0123456789abcdef' is not an image_id of this run" in log
    assert not address.exists()

    first, second = manifest["image_id"][:2]
    resume_flow_run(run.id, run_input={"with_device": first, "without_device": second, "reviewer": "Ada"})
    filled_in = datetime.now(UTC)
    state, log = execute(run)
    assert state == "Completed", log
    assert "2 answers taken" in log
    answers = read_kept(address)
    assert {(a.sha256, a.device, a.reviewer) for a in answers} == {
        (manifest["sha256"][0], 1, "Ada"),
        (manifest["sha256"][1], 0, "Ada"),
    }
    assert all(a.time is not None and a.time <= filled_in for a in answers), "dated by the form, not by the restart"


def test_the_deployments_name_a_review_on_the_cpu_pool() -> None:
    deployments = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    (found,) = (d for d in deployments if d["entrypoint"] == "flows/review.py:review")
    assert (found["name"], found["work_pool"]["name"]) == ("on-demand", "cpu")


@pytest.mark.slow
def test_a_deployed_pipeline_waits_for_answers_and_finishes_with_them_in_the_folder_it_began(
    workspace: Path, small_flags: list[str], tmp_path: Path, execute: Callable[[FlowRun], tuple[str, str]]
) -> None:
    settings = read_flags(
        [
            *small_flags,
            *("--screening.wait-for-review", "true", "--screening.n-review", "3"),
            *("--screening.exclude-from", "0.5", "--screening.doubtful-to", "1", "--quality.min-train-images", "1"),
            *("--training.epochs", "1", "--explanation.n-images", "0", "--evaluation.n-bootstrap", "20"),
        ],
        "test",
    )
    parameters = {"settings": settings.model_dump(mode="json", exclude_none=True)}
    run = start_deployed("flows/pipeline.py:pipeline", parameters, folder=tmp_path)
    state, log = execute(run)
    assert state == "Suspended", log
    (folder,) = (path for path in (tmp_path / "data" / "runs").iterdir() if path.is_dir())
    doubtful = pd.read_csv(folder / "review" / "doubtful.csv")
    assert len(doubtful) == 3
    assert not (folder / "model.keras").exists()

    (tmp_path / "answers.csv").write_text(doubtful[["path"]].assign(device=[1, 0, 1]).to_csv(index=False))
    resume_flow_run(run.id, run_input={"answers": str(tmp_path / "answers.csv"), "reviewer": "Ada"})
    state, log = execute(run)
    assert state == "Completed", log
    assert {path.name for path in (tmp_path / "data" / "runs").iterdir()} == {
        folder.name,
        "latest",
        "device_answers",
    }
    assert (folder / "run.json").exists()
    manifest = read_manifest(folder).set_index("path").loc[doubtful["path"]]
    assert manifest["has_device"].tolist() == [True, False, True]
    assert manifest["device_reviewed"].all()
