"""Publishing: only a run that is no worse takes over, one step goes back, and nobody's step is lost."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pandas as pd
import pytest
from s3_server import FaultyProxy, faulty_proxy, running_s3, set_aws

from flows.engine.command_line import read_flags, run_command
from flows.publish import PublishFlags
from flows.publish import publish as publish_flow
from tasks.errors import OutsideError, RunError
from tasks.files import read_json, write_json
from tasks.publishing import published as publishing
from tasks.publishing.published import CHECKS, describe_candidate, publish, weigh
from tasks.publishing.rules import Candidate, Published, weigh_candidate
from tasks.records import Facts
from tasks.runs import bucket as run_copies
from tasks.runs.bucket import send
from tasks.runs.run import Run
from tasks.settings import PublishingSettings, Settings

BUCKET = "chest"

# -- run folders -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_s3({BUCKET: {}}) as url:
        yield url


@pytest.fixture(params=["here", "s3"])
def runs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty folder of runs, on this machine and on a real S3 server."""
    if request.param == "here":
        (tmp_path / "runs").mkdir()
        return str((tmp_path / "runs").resolve())
    for name, value in set_aws(request.getfixturevalue("server")).items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}/runs"


def settings_of(runs: str, run: str, tmp_path: Path, **more: Any) -> Settings:
    storage = {"cache": str(tmp_path / "cache"), "raw": str(tmp_path / "raw")}
    given = {"run_dir": f"{runs}/{run}", "storage": storage, "publishing": {"enabled": True, **more}}
    return Settings.model_validate(given | {"ingestion": {"tries": 3, "backoff_s": 0, "timeout_s": 5}})


Make = Callable[..., Settings]


@pytest.fixture
def make(runs: str, tmp_path: Path) -> Make:
    """Makes a finished run, in as far as publishing looks at it; returns its settings."""

    def make(
        run: str,
        val: float = 0.95,
        free: float = 0.94,
        *,
        passed: bool = True,
        test: float = 0.9,
        unjudged: Sequence[Facts] = (),
    ) -> Settings:
        settings = settings_of(runs, run, tmp_path)
        folder = Run(settings).folder
        (folder / "stages").mkdir(parents=True, exist_ok=True)
        aucs = {"val": val, "val_device_free": free, "test": test}
        groups = {name: {"n": 4, "auc": {"value": auc, "low": auc, "high": auc}} for name, auc in aucs.items()}
        write_json(folder / "metrics.json", {"threshold": 0.5, **groups})
        verdict = {"model": {"passed": passed, "failed": [] if passed else ["x"]}}
        write_json(folder / "audit.json", {"verdict": verdict, "split": "val", "n_images": 4})
        table = {"path": list("abcd"), "split": "val", "label": [0, 1, 0, 1], "has_device": [True, False, None, False]}
        pd.DataFrame(table).to_csv(folder / "predictions.csv", index=False)
        (folder / "model.keras").write_text(f"the model of {run}")
        write_json(folder / "run.json", {"news": run})
        write_json(folder / CHECKS, [{"says": "x", "success": True, "reason": ""}, *unjudged])
        send(Run(settings), [CHECKS, "metrics.json", "audit.json", "predictions.csv", "model.keras", "run.json"])
        return settings

    return make


def published_in(runs: str, settings: Settings) -> Facts | None:
    return run_copies.read_shared(runs, "published.json", settings.ingestion)


def change_file(settings: Settings, name: str, content: str | None) -> None:
    """Puts another content in the place of a run's file, or takes it away."""
    if Run(settings).in_bucket:
        place = {"Bucket": BUCKET, "Key": f"{str(settings.run_dir).removeprefix(f's3://{BUCKET}/')}/{name}"}
        client = boto3.client("s3")
        client.delete_object(**place) if content is None else client.put_object(**place, Body=content)
    elif content is None:
        (Run(settings).folder / name).unlink()
    else:
        (Run(settings).folder / name).write_text(content)


def command(capfd: pytest.CaptureFixture[str], settings: Settings, *flags: str) -> tuple[int, str, str]:
    """Exit code, last line of standard output, and standard error of the command."""
    capfd.readouterr()
    storage = ["--storage.cache", settings.storage.cache]
    code = run_command(publish_flow.fn, [*storage, *flags], "test", PublishFlags)
    shown = capfd.readouterr()
    return code, (shown.out.strip().splitlines() or [""])[-1], shown.err.strip()


def test_a_model_that_got_worse_is_not_published_and_a_rollback_leads_back(
    runs: str, make: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    first, worse, better = make("first"), make("worse", val=0.93), make("better", val=0.96, free=0.95)
    publish.fn(Run(first))
    assert (published_in(runs, first) or {})["run_dir"] == f"{runs}/first"
    publish.fn(Run(worse))
    said = capfd.readouterr().out
    assert "not published: AUC on validation 0.93 is below the published 0.95 by more than publishing.max_drop" in said
    assert (published_in(runs, first) or {})["run"] == "first"
    publish.fn(Run(better))
    said = capfd.readouterr().out
    assert said.index("published: better (AUC on validation 0.960") < said.index("before: first (AUC on validation 0.9")
    assert command(capfd, first, "--run-dir", f"{runs}/") == (0, f"{runs}/better", "")
    assert command(capfd, first, "--run-dir", f"{runs}/worse", "--roll-back") == (0, f"{runs}/first", "")
    assert command(capfd, first, "--run-dir", f"{runs}/") == (0, f"{runs}/first", "")
    publish.fn(Run(better))
    assert "not published: a person rolled this very model back; published stays: first" in capfd.readouterr().out
    assert command(capfd, first, "--run-dir", f"{runs}/", "--to", "better") == (0, f"{runs}/better", "")
    assert command(capfd, first, "--run-dir", f"{runs}/", "--to", f"{runs}/first") == (0, f"{runs}/first", "")


def test_a_run_whose_audit_failed_or_that_is_not_sealed_is_not_published(runs: str, make: Make) -> None:
    settings = make("failed", passed=False)
    publish.fn(Run(settings))
    assert published_in(runs, settings) is None
    change_file(settings, "run.json", None)
    with pytest.raises(RunError, match="is not finished, so it cannot be published"):
        publish.fn(Run(settings))


def test_a_run_with_unknown_patients_is_published_only_where_a_setting_says_so(runs: str, make: Make) -> None:
    unjudged = [
        {"says": "no patient is in both", "success": None, "reason": "the patient of 3 of 9 images is not known"}
    ]
    settings = make("a", unjudged=unjudged)
    sentence = "not judged: no patient is in both (the patient of 3 of 9 images is not known)"
    decided = publish.fn(Run(settings))
    assert decided is not None and decided["decision"] == "keep"
    assert decided["reasons"] == [f"{sentence}; publishing.unknown_patients true publishes it all the same"]
    allowed = settings.publishing.model_copy(update={"unknown_patients": True})
    decided = publish.fn(Run(settings.model_copy(update={"publishing": allowed})))
    assert decided is not None and (decided["decision"], decided["notes"]) == ("publish", [sentence])
    found = published_in(runs, settings)
    assert found is not None and found["not_judged"] == [sentence.removeprefix("not judged: ")]


def test_the_same_model_out_of_another_folder_stays_where_it_is_unless_that_is_gone(runs: str, make: Make) -> None:
    first, again = make("first"), make("again")
    publish.fn(Run(first))
    change_file(again, "model.keras", "the model of first")
    Run(again).folder.joinpath("model.keras").write_text("the model of first")
    publish.fn(Run(again))
    publish.fn(Run(first))
    published = published_in(runs, first) or {}
    assert (published["run"], published["earlier"]) == ("first", [])
    change_file(first, "model.keras", None)
    publish.fn(Run(again))
    published = published_in(runs, first) or {}
    assert (published["run"], published["earlier"]) == ("again", [])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.keras", None, "it has no model.keras any more"),
        ("model.keras", "tampered", "its model.keras is not the one that was published"),
        ("run.json", None, "it is not finished: it has no run.json"),
    ],
)
def test_nobody_is_led_to_a_run_that_does_not_hold_its_model(
    runs: str, make: Make, capfd: pytest.CaptureFixture[str], name: str, content: str | None, says: str
) -> None:
    first, second = make("first"), make("second")
    publish.fn(Run(first))
    publish.fn(Run(second))
    before = published_in(runs, first)
    change_file(first, name, content)
    code, out, error = command(capfd, first, "--run-dir", f"{runs}/", "--roll-back")
    assert (code, out) == (2, "")
    assert error == (
        f"error: {runs}/first was published before, but {says}; publish another finished run with --to RUN"
    )
    change_file(second, name, content)
    code, out, error = command(capfd, first, "--run-dir", f"{runs}/")
    assert (code, out) == (2, "")
    assert f"{runs}/second is published, but {says}" in error
    assert published_in(runs, first) == before


def test_commands_that_cannot_be_done_end_in_one_sentence(
    runs: str, make: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    first, worse = make("first"), make("worse", val=0.93)
    at = ("--run-dir", f"{runs}/")

    def refused(*flags: str) -> str:
        code, out, error = command(capfd, first, *flags)
        assert (code, out) == (2, "")
        assert error.startswith("error: ") and "\n" not in error
        return error

    assert "nothing is published in" in refused(*at)
    assert "nothing is published in" in refused(*at, "--roll-back")
    assert "no-such is no finished run (it has no run.json)" in refused(*at, "--to", "no-such")
    assert "does not lie in" in refused(*at, "--to", "s3://other/runs/first")
    assert "give --roll-back or --to RUN" in refused(*at, "--roll-back", "--to", "first")
    publish.fn(Run(first))
    assert "names nothing that was published before" in refused(*at, "--roll-back")
    assert "is not published: AUC on validation 0.93 is below the published 0.95" in refused(*at, "--to", "worse")
    lenient = [*at, "--to", "worse", "--publishing.max-drop", "0.05"]
    assert command(capfd, first, *lenient) == (0, f"{runs}/worse", "")
    address = f"{runs}/published.json"
    for broken in ("{", "[]", '{"run": "first"}', '{"earlier": [1], "withdrawn": []}'):
        if runs.startswith("s3://"):
            boto3.client("s3").put_object(Bucket=BUCKET, Key=address.removeprefix(f"s3://{BUCKET}/"), Body=broken)
        else:
            Path(address).write_text(broken)
        assert f"{address} is " in refused(*at)
        with pytest.raises(RunError, match=r"published\.json is "):
            publish.fn(Run(worse))


def test_with_publishing_off_nothing_is_weighed_or_published(runs: str, make: Make) -> None:
    settings = make("run")
    assert weigh.fn(Run(settings)) is not None
    assert (Run(settings).folder / "publishing.json").exists()
    off = settings.model_copy(update={"publishing": PublishingSettings()})
    assert weigh.fn(Run(off)) is None and publish.fn(Run(off)) is None
    assert not (Run(settings).folder / "publishing.json").exists()
    assert published_in(runs, settings) is None


def test_a_run_is_weighed_against_what_is_published_and_against_itself_is_the_same(runs: str, make: Make) -> None:
    first, worse = make("first"), make("worse", free=0.9)
    publish.fn(Run(first))
    weighed = weigh.fn(Run(worse))
    assert weighed == read_json(Run(worse).folder / "publishing.json")
    assert weighed is not None
    assert (weighed["decision"], weighed["this"]["run"], weighed["published"]["run"]) == ("keep", "worse", "first")
    (Run(first).folder / "run.json").unlink()
    send(Run(first), [], gone=["run.json"])
    assert (weigh.fn(Run(first)) or {})["decision"] == "same", "though its seal is broken while it runs again"


def test_a_published_run_whose_folder_was_used_again_is_named_and_its_figures_count_still(
    runs: str, make: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    publish.fn(Run(make("run")))
    again = make("run", val=0.9)
    (Run(again).folder / "model.keras").write_text("another model")
    send(Run(again), ["model.keras"])
    publish.fn(Run(again))
    said = capfd.readouterr().out
    assert "not published: AUC on validation 0.9 is below" in said
    assert "the published run run cannot be used any more: its model.keras is not the one that was published" in said


def test_the_test_split_decides_nothing_and_images_are_told_apart(make: Make) -> None:
    run = Run(make("run", test=0.9)).folder
    first = describe_candidate(run, "/runs/run")
    make("run", test=0.1)
    assert describe_candidate(run, "/runs/run") == first
    table = pd.read_csv(run / "predictions.csv")
    table.assign(has_device=[True, True, None, False]).to_csv(run / "predictions.csv", index=False)
    second = describe_candidate(run, "/runs/run")
    assert second.val.images == first.val.images
    assert second.val_device_free.images != first.val_device_free.images


# -- several at once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", ["s3"], indirect=True)
def test_of_two_that_publish_at_once_the_later_is_weighed_against_the_earlier(
    runs: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, slow, fast = make("first"), make("slow", val=0.96), make("fast", val=0.98)
    publish.fn(Run(first))
    asked: list[str] = []

    def decide_slowly(candidate: Candidate, published: Published, *rest: Any, **more: Any) -> Facts:
        if candidate.run == "slow":
            asked.append(published.run)
            if len(asked) == 1:
                publish.fn(Run(fast))  # between the reading and the writing of the other one
        return weigh_candidate(candidate, published, *rest, **more)

    monkeypatch.setattr(publishing, "weigh_candidate", decide_slowly)
    publish.fn(Run(slow))
    published = published_in(runs, first) or {}
    assert asked == ["first", "fast"]
    assert (published["run"], [one["run"] for one in published["earlier"]]) == ("fast", ["first"])


@pytest.mark.parametrize("runs", ["here"], indirect=True)
def test_of_many_that_publish_at_once_on_one_machine_no_step_is_lost(tmp_path: Path, make: Make, runs: str) -> None:
    made = [make(f"run-{i}") for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(publish.fn, map(Run, made)))
    published = published_in(runs, made[0]) or {}
    assert {published["run"], *(one["run"] for one in published["earlier"])} == {f"run-{i}" for i in range(8)}
    assert not list(Path(runs).glob(".published*"))


def test_a_rollback_of_something_that_was_changed_meanwhile_is_refused(
    runs: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = make("first"), make("second"), make("third")
    publish.fn(Run(first))
    publish.fn(Run(second))

    step_back = Published.step_back

    def step_back_slowly(published: Published, now: str) -> Published:
        publish.fn(Run(third))
        return step_back(published, now)

    monkeypatch.setattr(Published, "step_back", step_back_slowly)
    with pytest.raises(RunError, match="was changed meanwhile; look at what is published"):
        publishing.roll_back(runs, first)
    assert (published_in(runs, first) or {})["run"] == "third"


@pytest.mark.parametrize("runs", ["s3"], indirect=True)
def test_a_rollback_whose_answer_got_lost_goes_back_one_step_and_not_two(
    server: str, make: Make, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = made = [make(name) for name in ("first", "second", "third")]
    for settings in made:
        publish.fn(Run(settings))

    def is_first_write(proxy: FaultyProxy) -> Callable[[str], bool]:
        return lambda request: request.startswith("PUT") and not proxy.n_failed

    with faulty_proxy(server, share=1.0, faults=["lost"]) as proxy:
        proxy.only = is_first_write(proxy)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert publishing.roll_back(runs, first) == f"{runs}/second"
        assert proxy.n_failed["lost"] == 1
        assert sum(request.startswith("PUT") for request in proxy.requests) == 2, "it was tried again"
    published = published_in(runs, first) or {}
    assert (published["run"], [one["run"] for one in published["earlier"]]) == ("second", ["first"])


@pytest.mark.parametrize("runs", ["s3"], indirect=True)
def test_a_file_that_others_change_all_the_time_is_given_up_with_a_sentence(
    runs: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_copies, "TRIES", 3)
    settings, client = make("run"), boto3.client("s3")
    key = f"{runs.removeprefix(f's3://{BUCKET}/')}/notes.json"
    turns: list[Facts | None] = []

    def change(there: Facts | None) -> Facts:
        turns.append(there)
        client.put_object(Bucket=BUCKET, Key=key, Body=json.dumps({"others": len(turns)}))
        return {"mine": len(turns)}

    with pytest.raises(OutsideError, match="keeps being changed by others"):
        run_copies.change_shared(runs, "notes.json", settings.ingestion, change)
    assert turns == [None, {"others": 1}, {"others": 2}]


# -- on this machine ---------------------------------------------------------------------------------------------------


def test_the_folder_of_runs_is_named_by_itself_or_by_a_run_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "data" / "runs"
    (runs / "run" / "stages").mkdir(parents=True)
    (runs / "latest").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    for named in (runs, runs / "run", runs / "latest", "data/runs/", "data/runs/run/", None):
        settings = Settings(run_dir=None if named is None else str(named))
        assert publishing.find_runs(settings) == str(runs.resolve())


@pytest.mark.parametrize("runs", ["here"], indirect=True)
def test_when_the_folder_of_runs_has_moved_what_is_published_is_found_where_it_is_now(
    runs: str, make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = make("first")
    publish.fn(Run(first))
    publish.fn(Run(make("second")))
    moved = Path(shutil.move(runs, tmp_path / "elsewhere"))
    assert command(capfd, first, "--run-dir", str(moved)) == (0, f"{moved}/second", "")
    assert command(capfd, first, "--run-dir", str(moved), "--roll-back") == (0, f"{moved}/first", "")


# -- through the engine ------------------------------------------------------------------------------------------------


def test_the_pipeline_weighs_reports_and_publishes_nothing_without_a_verdict(
    finished_run: Path, small_flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from flows.pipeline import pipeline
    from tasks.publishing.news import find_finished, note_finished
    from tasks.publishing.sealing import seal
    from tasks.sources.fetching import fetch_source

    flags = [*small_flags, "--run-dir", str(tmp_path / "runs" / "run"), "--publishing.enabled", "true"]
    settings = read_flags(flags, "test")
    report = pipeline(settings)
    weighed = read_json(tmp_path / "runs" / "run" / "publishing.json")
    audit = read_json(finished_run / "audit.json")["verdict"]["model"]
    assert weighed["this"]["val"]["n"] == read_json(finished_run / "metrics.json")["val"]["n"] > 0
    assert weighed["this"]["audit"]["passed"] is audit["passed"] is not True
    assert weighed["decision"] == "keep"
    assert "Compared with the published model" in Path(str(report)).read_text()
    assert "not published: the audit" in caplog.text
    assert not (tmp_path / "runs" / "published.json").exists()
    other = read_flags([*flags, "--publishing.max-drop", "0.02"], "test")
    seal.fn(Run(other))
    sha256 = fetch_source(other).sha256
    assert find_finished.fn(Run(other), sha256) is None, "killed before it was published, it is not done"
    note_finished.fn(Run(other))
    assert find_finished.fn(Run(other), sha256) == report
