"""Answers of people about doubtful images: what is read, what counts, what is refused, what is kept."""

import csv
import hashlib
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import boto3  # type: ignore[import-untyped]
import pandas as pd
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as budget
from hypothesis import strategies as st
from s3_server import running_s3, set_aws

from tasks.devices.answers import (
    Answer,
    answers_folder,
    keep_answers,
    match_answers,
    name_images,
    newest,
    read_answered,
    read_answers,
    read_kept,
    share_answers,
    write_table,
)
from tasks.errors import PipelineError, SettingsError, TableError
from tasks.records import Facts
from tasks.runs.run import Run
from tasks.settings import ScreeningSettings, Settings

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
EARLY, LATE = "2026-01-01T08:00:00Z", "2026-02-01T08:00:00Z"


def sha_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_manifest(contents: dict[str, str]) -> pd.DataFrame:
    """A manifest of path -> text that stands for the file."""
    return pd.DataFrame(
        {
            "image_id": [sha_of(path)[:16] for path in contents],
            "path": list(contents),
            "sha256": [sha_of(text) for text in contents.values()],
        }
    )


MANIFEST = make_manifest({"a.png": "a", "b.png": "b", "copy.png": "b", "=c.png": "c"})


def write(path: Path, *lines: str, header: str = "path,sha256,device,reviewer,time") -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def take(tmp_path: Path, *lines: str, header: str = "path,sha256,device,reviewer,time", now: datetime = NOW) -> Facts:
    new = write(tmp_path / "new.csv", *lines, header=header)
    return take_file(new, MANIFEST, tmp_path / "kept", now=now)


def take_file(new: Path, manifest: pd.DataFrame, folder: Path, now: datetime = NOW) -> Facts:
    answers = read_answers(new, "answers")
    return keep_answers(
        match_answers(answers, manifest, f"answers: {new}"),
        folder,
        reviewer="someone",
        place=f"answers: {new}",
        now=now,
    )


def kept(tmp_path: Path) -> list[Answer]:
    return read_kept(tmp_path / "kept")


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- reading -----------------------------------------------------------------------------------------------------------


def test_path_and_device_are_enough(tmp_path: Path) -> None:
    assert read_answers(write(tmp_path / "a.csv", "a.png,1", header="path,device"), "x") == [Answer("a.png", 1)]


def test_all_columns_are_read_and_times_are_utc(tmp_path: Path) -> None:
    line = f"a.png,{sha_of('a').upper()},0,Ada,2026-01-01T10:00:00+02:00"
    (answer,) = read_answers(write(tmp_path / "a.csv", line), "x")
    assert answer == Answer("a.png", 0, sha_of("a"), "Ada", datetime(2026, 1, 1, 8, tzinfo=UTC))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a.png,,2,,", "device = '2'"),
        ("a.png,,,,", "device = ''"),
        ("a.png,,1,,yesterday", "time = 'yesterday'"),
        ("a.png,,1,,0001-01-01T00:00:00+14:00", "time = "),
        ("a.png,abc,1,,", "sha256 = 'abc'"),
        (",,1,,", "path = ''"),
        ("a.png,,1,=HYPERLINK(1),", "formula"),
        ("a.png,,1,+Ada,", "formula"),
        ("a.png,,1,-Ada,", "formula"),
        ("a.png,,1,@Ada,", "formula"),
        (f"a.png,,1,{'x' * 101},", "100 characters"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_file_and_line(tmp_path: Path, line: str, says: str) -> None:
    path = write(tmp_path / "a.csv", "b.png,,0,,", line)
    with pytest.raises(TableError) as caught:
        read_answers(path, "answers")
    assert says in str(caught.value)
    assert f"{path} line 3" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("time", ["", EARLY])
def test_answers_of_the_same_time_or_none_that_contradict_are_refused_by_name(tmp_path: Path, time: str) -> None:
    path = write(tmp_path / "a.csv", f"a.png,,1,Ada,{time}", f"a.png,,0,Bob,{time}")
    with pytest.raises(TableError, match=r"a\.csv says 0 and 1 about 'a\.png'"):
        read_answers(path, "answers")


def test_a_path_with_two_contents_contradicts_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", f"a.png,{sha_of('a')},1,,", f"a.png,{sha_of('other')},0,,")
    assert newest(read_answers(path, "x")) == {sha_of("a"): 1, sha_of("other"): 0}


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="lacks the column device"):
        read_answers(write(tmp_path / "a.csv", "a.png", header="path"), "answers")


# -- what counts -------------------------------------------------------------------------------------------------------


def said(path: str, device: Literal[0, 1], time: datetime | None = None) -> Answer:
    return Answer(path, device, sha_of("a"), time=time)


def test_of_dated_answers_the_newest_counts_and_a_dated_one_beats_an_undated_one() -> None:
    old, new = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
    assert newest([said("a", 1, new), said("a", 0, old)]) == {sha_of("a"): 1}
    assert newest([said("a", 0, old), said("a", 1)]) == {sha_of("a"): 0}


def test_identical_files_that_were_answered_differently_count_as_showing_a_device() -> None:
    assert newest([said("a", 1, NOW), said("b", 0, NOW + timedelta(days=9))]) == {sha_of("a"): 1}


TIMES = st.none() | st.integers(0, 5).map(lambda hours: NOW - timedelta(hours=hours))
DEVICES: st.SearchStrategy[Literal[0, 1]] = st.sampled_from([0, 1])
PATHS = st.sampled_from(["a.png", "b.png", "copy.png", "=c.png"])


@st.composite
def consistent_answers(draw: st.DrawFn) -> list[Answer]:
    """Answers without contradictions of the same time."""
    drawn = draw(st.lists(st.tuples(PATHS, TIMES, st.sampled_from(["Ada", "Bob"]), DEVICES), max_size=12))
    devices: dict[tuple[str, datetime | None], Literal[0, 1]] = {}
    return [
        Answer(path, devices.setdefault((path, time), device), "", name, time) for path, time, name, device in drawn
    ]


@budget(deadline=None)
@given(consistent_answers(), st.randoms())
def test_the_order_of_answers_does_not_matter(answers: list[Answer], random: object) -> None:
    mixed = list(answers)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert newest(mixed) == newest(answers)


@budget(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(consistent_answers(), st.integers(0, 12))
def test_answers_taken_in_two_parts_are_all_kept_and_the_newest_of_each_image_counts(
    tmp_path_factory: pytest.TempPathFactory, answers: list[Answer], cut: int
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    dated = [a for a in answers if a.time is not None]
    for part in (dated[:cut], dated[cut:]):
        keep_answers(match_answers(part, MANIFEST, "test"), folder, reviewer="x", place="test", now=NOW)
    contents = dict(zip(MANIFEST["path"], MANIFEST["sha256"], strict=True))
    expected = {Answer(a.path, a.device, contents[a.path], a.reviewer, a.time) for a in dated}
    found = read_kept(folder)
    assert set(found) == expected
    assert len(found) == len(expected)
    (folder / "again.csv").write_text(write_table(found))
    assert set(read_answers(folder / "again.csv", "x")) == expected
    last = {p: max((a for a in dated if a.path == p), key=lambda a: a.time or NOW, default=None) for p in contents}
    for path, answer in last.items():
        same = [a for p, a in last.items() if contents[p] == contents[path] and a is not None]
        assert (answer is None and not same) or newest(found)[contents[path]] == max(a.device for a in same)


# -- taking ------------------------------------------------------------------------------------------------------------


def test_what_is_taken_is_counted_and_gets_sha256_reviewer_and_time(tmp_path: Path) -> None:
    facts = take(tmp_path, "a.png,1", "b.png,0", header="path,device")
    assert facts == {
        "n_taken": 2,
        "n_new": 2,
        "n_changed": 0,
        "n_unchanged": 0,
        "n_older": 0,
        "n_with_device": 1,
        "n_kept": 2,
    }
    assert kept(tmp_path) == [
        Answer("a.png", 1, sha_of("a"), "someone", NOW),
        Answer("b.png", 0, sha_of("b"), "someone", NOW),
    ]


def test_changed_unchanged_and_older_answers_are_told_apart_and_all_are_kept(tmp_path: Path) -> None:
    take(tmp_path, f"a.png,,1,Ada,{LATE}", f"b.png,,1,Ada,{EARLY}", f"copy.png,,0,Ada,{EARLY}")
    facts = take(tmp_path, f"a.png,,0,Bob,{EARLY}", f"b.png,,0,Bob,{LATE}", f"copy.png,,0,Bob,{LATE}", "=c.png,,1,Bob,")
    counts = [facts[f"n_{name}"] for name in ("taken", "new", "changed", "unchanged", "older", "with_device", "kept")]
    assert counts == [4, 1, 1, 1, 1, 2, 7]


def test_taking_the_same_list_again_changes_nothing(tmp_path: Path) -> None:
    take(tmp_path, "a.png,,1,,", f"b.png,,0,Ada,{EARLY}")
    before = files_in(tmp_path / "kept")
    facts = take(tmp_path, "a.png,,1,,", f"b.png,,0,Ada,{EARLY}", now=NOW + timedelta(hours=1))
    assert files_in(tmp_path / "kept") == before
    assert (facts["n_taken"], facts["n_unchanged"]) == (2, 2)


def test_each_submission_is_a_file_of_its_own_named_by_time_and_content_that_never_changes(tmp_path: Path) -> None:
    take(tmp_path, "a.png,,1,,")
    before = files_in(tmp_path / "kept")
    take(tmp_path, "a.png,,1,,", "b.png,,0,,", now=NOW + timedelta(hours=1))
    after = files_in(tmp_path / "kept")
    (first, second) = sorted(after)
    assert before == {first: after[first]}
    assert second == f"20260501T130000Z-{hashlib.sha256(after[second]).hexdigest()[:8]}.csv"
    assert [answer.path for answer in read_answers(tmp_path / "kept" / second, "x")] == ["b.png"]


def test_the_one_table_of_earlier_versions_is_read_and_never_written(tmp_path: Path) -> None:
    table = write(tmp_path / "kept.csv", f"a.png,{sha_of('a')},1,Ada,{EARLY}")
    before = table.read_bytes()
    facts = take(tmp_path, f"a.png,,0,Ada,{LATE}", f"a.png,,1,Ada,{EARLY}")
    assert (facts["n_changed"], facts["n_kept"]) == (1, 2)
    assert table.read_bytes() == before
    assert newest(kept(tmp_path)) == {sha_of("a"): 0}


def test_two_files_that_contradict_each_other_at_the_same_time_are_refused(tmp_path: Path) -> None:
    for name, device in (("one", 0), ("two", 1)):
        write(tmp_path / f"{name}.csv", f"a.png,{sha_of('a')},{device},Ada,{EARLY}")
    with pytest.raises(TableError, match=rf"{tmp_path} says 0 and 1 about 'a\.png' at 2026-01-01T08:00:00Z"):
        read_kept(tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("z.png,,1,,", "1 of 2 paths name no file of the source, such as 'z.png'"),
        (f"a.png,{sha_of('other')},1,,", "another file 'a.png'"),
        ("a.png,,1,,2026-05-03T00:00:00Z", "lies ahead"),
    ],
)
def test_an_answer_about_another_file_or_from_the_future_is_refused_and_nothing_is_written(
    tmp_path: Path, line: str, says: str
) -> None:
    take(tmp_path, "b.png,,1,,")
    before = files_in(tmp_path / "kept")
    with pytest.raises(TableError) as caught:
        take(tmp_path, "b.png,,0,,", line)
    assert says in str(caught.value)
    assert str(tmp_path / "new.csv") in str(caught.value)
    assert files_in(tmp_path / "kept") == before


def test_an_answer_that_contradicts_a_kept_one_of_the_same_time_is_refused(tmp_path: Path) -> None:
    take(tmp_path, f"a.png,,1,Ada,{EARLY}")
    with pytest.raises(TableError, match=r"new\.csv and .*kept together"):
        take(tmp_path, f"a.png,,0,Bob,{EARLY}")


def test_a_default_reviewer_like_a_formula_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="formula"):
        keep_answers(match_answers([], MANIFEST, "x"), tmp_path / "kept", reviewer="=1+1", place="x", now=NOW)


def test_no_cell_of_the_kept_table_starts_like_a_formula_and_paths_survive_it(tmp_path: Path) -> None:
    take(tmp_path, "=c.png,,1,,")
    (text,) = files_in(tmp_path / "kept").values()
    cells = [cell for row in csv.reader(text.decode().splitlines()) for cell in row]
    assert "./=c.png" in cells and not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    assert [answer.path for answer in kept(tmp_path)] == ["=c.png"]
    assert take(tmp_path, "./=c.png,,1,,")["n_unchanged"] == 1


def test_answers_taken_at_the_same_time_from_many_sides_are_all_kept(tmp_path: Path) -> None:
    manifest = make_manifest({f"{i}.png": str(i) for i in range(12)})
    files = [write(tmp_path / f"{i}.csv", f"{i}.png,1", header="path,device") for i in range(12)]

    def work(path: Path) -> None:
        take_file(path, manifest, tmp_path / "deep" / "kept")

    threads = [threading.Thread(target=work, args=(path,)) for path in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_kept(tmp_path / "deep" / "kept")) == len(files_in(tmp_path / "deep" / "kept")) == 12


def test_image_ids_name_images_and_unknown_or_twice_named_ones_are_refused() -> None:
    first, second = MANIFEST["image_id"][:2]
    assert name_images(f" {first.upper()} ,", second, MANIFEST) == [Answer("a.png", 1), Answer("b.png", 0)]
    with pytest.raises(TableError, match="with_device: 'nobody' is not an image_id"):
        name_images(f"{first} nobody", "", MANIFEST)
    with pytest.raises(TableError, match=r"0 and 1 about 'a\.png'"):
        name_images(first, first, MANIFEST)


# -- the address -------------------------------------------------------------------------------------------------------


def test_answers_lie_beside_the_run_folder_unless_another_place_is_named(tmp_path: Path) -> None:
    def folder_of(named: str) -> Path:
        return answers_folder(Run(Settings(screening=ScreeningSettings(answers=named))))

    assert answers_folder(Run(Settings(run_dir=str(tmp_path / "run")))) == tmp_path / "device_answers"
    assert answers_folder(Run(Settings())) == Path("data/runs/device_answers").resolve()
    assert folder_of("there.csv") == folder_of("there") == Path("there")
    with pytest.raises(SettingsError, match=r"screening\.answers: s3://bucket/answers\.csv is not on this machine"):
        folder_of("s3://bucket/answers.csv")
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"screening\.answers: .*file is a file; name a folder"):
        folder_of(str(tmp_path / "file"))


def test_what_is_answered_is_known_by_content_and_nothing_is_while_nobody_answered(tmp_path: Path) -> None:
    settings = Settings(screening=ScreeningSettings(answers=str(tmp_path / "kept")))
    assert read_answered(Run(settings)) == {}
    take(tmp_path, f"a.png,,1,Ada,{EARLY}", f"a.png,,0,Ada,{LATE}", "b.png,,1,,", "copy.png,,0,,")
    assert read_answered(Run(settings)) == {sha_of("a"): 0, sha_of("b"): 1}


def test_a_new_answer_is_news_for_a_run_that_would_end_early_because_nothing_is_new(tmp_path: Path) -> None:
    from tasks.publishing.news import finished_path

    settings = Settings(screening=ScreeningSettings(answers=str(tmp_path / "kept")))
    before = finished_path(Run(settings), "source")
    take(tmp_path, "a.png,,1,,")
    assert finished_path(Run(settings), "source") != before


def test_a_kept_row_without_sha256_is_refused_because_it_could_be_about_another_file(tmp_path: Path) -> None:
    address = write(tmp_path / "kept.csv", "a.png,,1,,")
    with pytest.raises(TableError, match=r"no sha256 for 'a\.png'"):
        read_answered(Run(Settings(screening=ScreeningSettings(answers=str(address)))))


# -- beside runs in a bucket -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_s3({"chest": {}}) as url:
        yield url


@pytest.fixture
def runs(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address for runs in a bucket."""
    for name, value in set_aws(server).items():
        monkeypatch.setenv(name, value)
    return f"s3://chest/{tmp_path.name}"


def machine(tmp_path: Path, name: str, runs: str, run: str = "run") -> Settings:
    """Settings of a machine that works on a run there."""
    quick = {"tries": 2, "backoff_s": 0, "timeout_s": 5}
    storage = {"cache": str(tmp_path / name)}
    return Settings.model_validate({"run_dir": f"{runs}/{run}", "storage": storage, "ingestion": quick})


def answer_here(settings: Settings, path: str) -> None:
    folder = answers_folder(Run(settings))
    keep_answers(
        match_answers([Answer(path, 1)], make_manifest({path: path}), "x"), folder, reviewer="x", place="x", now=NOW
    )


def answered_here(settings: Settings) -> list[str]:
    return sorted(answer.path for answer in read_kept(answers_folder(Run(settings))))


def put_table(runs: str, *paths: str) -> None:
    """Puts there what earlier versions kept in one table."""
    rows = [f"{path},{sha_of(path)},1,Ada,{EARLY}\n" for path in paths]
    body = "path,sha256,device,reviewer,time\n" + "".join(rows)
    boto3.client("s3").put_object(Bucket="chest", Key=f"{runs.rpartition('/')[2]}/device_answers.csv", Body=body)


def names_there(runs: str) -> list[Any]:
    prefix = f"{runs.rpartition('/')[2]}/"
    return [
        (found["Key"].removeprefix(prefix), found["LastModified"])
        for found in boto3.client("s3").list_objects_v2(Bucket="chest", Prefix=prefix).get("Contents", ())
    ]


def test_answers_lie_beside_the_runs_and_of_two_people_who_answer_at_once_neither_loses_any(
    tmp_path: Path, runs: str
) -> None:
    here, other = machine(tmp_path, "here", runs), machine(tmp_path, "there", runs, "next")
    for settings, path in ((here, "a.png"), (other, "b.png")):
        share_answers(Run(settings))
        answer_here(settings, path)
    for settings in (here, other, here):
        share_answers(Run(settings))
    assert answered_here(here) == answered_here(other) == ["a.png", "b.png"]
    before = names_there(runs)
    share_answers(Run(here))
    assert names_there(runs) == before and len(before) == 2, "nothing is sent twice"


def test_answers_that_could_not_be_sent_go_with_the_next_run(
    tmp_path: Path, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = machine(tmp_path, "here", runs), machine(tmp_path, "there", runs)
    answer_here(here, "a.png")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(PipelineError, match="cannot be reached"):
            share_answers(Run(here))
    share_answers(Run(here))
    share_answers(Run(other))
    assert answered_here(other) == ["a.png"]


def test_the_one_table_of_earlier_versions_in_the_bucket_is_read_as_it_is_now_and_those_here_stay(
    tmp_path: Path, runs: str
) -> None:
    here = machine(tmp_path, "here", runs)
    folder = answers_folder(Run(here))
    folder.parent.mkdir(parents=True)
    write(folder.with_name("device_answers.csv"), f"a.png,{sha_of('a')},1,,{EARLY}")
    for there in (["b.png"], ["b.png", "c.png"]):
        put_table(runs, *there)
        share_answers(Run(here))
        assert answered_here(here) == ["a.png", *there]


def test_answers_in_the_bucket_that_do_not_fit_are_refused_by_their_address_and_those_here_stay(
    tmp_path: Path, runs: str
) -> None:
    here = machine(tmp_path, "here", runs)
    answer_here(here, "a.png")
    key = f"{runs.rpartition('/')[2]}/device_answers/other.csv"
    boto3.client("s3").put_object(Bucket="chest", Key=key, Body=b"path,device\nb.png,2\n")
    with pytest.raises(TableError, match=rf"^screening\.answers: s3://chest/{key} line 2 has device = '2'"):
        share_answers(Run(here))
    assert answered_here(here) == ["a.png"]
