"""Each kind of source ends as a folder on this machine; one that cannot be used leaves nothing behind."""

import hashlib
import os
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import State, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from tasks.addresses import hide_keys, source_name
from tasks.errors import ArchiveError, OutsideError, SourceError
from tasks.files import sha256_of_file
from tasks.preparing.ingestion import list_images
from tasks.settings import IngestionSettings, Settings
from tasks.sources.checksums import sum_files
from tasks.sources.fetching import fetch, fetch_source
from tasks.sources.folders import list_folder

FOUR = ["train/NORMAL/a.jpeg", "train/PNEUMONIA/b.jpeg", "test/NORMAL/c.jpeg", "test/PNEUMONIA/d.jpeg"]


def settings(tmp_path: Path, source: Path | str, **others: Any) -> Settings:
    storage = {"raw": str(tmp_path / "raw"), "cache": str(tmp_path / "cache")}
    return Settings.model_validate({"source": str(source), "storage": storage, **others})


def make_zip(path: Path, names: list[str], prefix: str = "chest_xray/") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(prefix + name, name)
    return path


def make_folder(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_folder_is_used_where_it_lies(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mine", ["chest_xray/" + name for name in FOUR])
    fetched = fetch_source(settings(tmp_path, folder))
    assert (fetched.kind, fetched.name, fetched.archive_sha256) == ("folder", "mine", None)
    assert Path(fetched.folder) == folder / "chest_xray"
    assert fetched.layout.images == tuple(sorted(FOUR))
    assert not (tmp_path / "raw").exists()


def test_folders_behind_links_are_read_and_links_that_lead_back_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = make_folder(tmp_path / "elsewhere", ["val/NORMAL/e.png", "val/PNEUMONIA/f.png", "ill/d.jpeg"])
    folder = make_folder(tmp_path / "mine", FOUR[:3])
    (folder / "val").symlink_to(elsewhere / "val")
    (folder / "test/PNEUMONIA").symlink_to(elsewhere / "ill")
    (folder / "train/all").symlink_to(folder)
    (elsewhere / "val/up").symlink_to(elsewhere / "val")
    fetched = fetch_source(settings(tmp_path, folder))
    assert fetched.layout.images == tuple(sorted([*FOUR, "val/NORMAL/e.png", "val/PNEUMONIA/f.png"]))
    assert "2 links lead to a folder above them and are not followed, such as train/all" in capsys.readouterr().out


def test_links_that_lead_to_each_other_are_followed_once_and_one_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mine", ["a/1.png", "b/2.png"])
    (folder / "a/b").symlink_to(folder / "b")
    (folder / "b/a").symlink_to(folder / "a")
    names, circles = list_folder(folder, "source")
    assert sorted(names) == ["a/1.png", "a/b/2.png", "b/2.png", "b/a/1.png"]
    assert circles == ["a/b/a", "b/a/b"]
    (folder / "val").symlink_to(tmp_path / "gone")
    with pytest.raises(SourceError, match="val is a link that leads nowhere"):
        list_folder(folder, "source")


def test_what_a_pattern_ignores_is_not_unpacked(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "set.zip", [*FOUR, "hospital_b/1.png"])
    with pytest.raises(SourceError, match=r"ingestion\.ignore, such as 'chest_xray/hospital_b'"):
        fetch_source(settings(tmp_path, archive))
    fetched = fetch_source(settings(tmp_path, archive, ingestion={"ignore": ["chest_xray/hospital_b"]}))
    assert files_below(Path(fetched.folder)) == sorted(FOUR)
    assert fetched.layout.n_ignored == 1


def test_a_zip_is_unpacked_to_its_root_without_clutter(tmp_path: Path) -> None:
    names = [*FOUR, "device_review.csv", ".DS_Store", "readme.txt", "chest_xray/train/NORMAL/a.jpeg"]
    archive = make_zip(tmp_path / "set.zip", names)
    fetched = fetch_source(settings(tmp_path, archive))
    assert (fetched.kind, fetched.name, fetched.archive_sha256) == ("zip", "set", sha256_of_file(archive))
    assert files_below(Path(fetched.folder)) == sorted([*FOUR, "device_review.csv"])
    assert (Path(fetched.folder) / FOUR[0]).read_text() == FOUR[0]
    assert (fetched.layout.n_nested, fetched.layout.n_clutter) == (1, 2)


def test_a_zip_is_unpacked_once_and_tells_the_same_the_second_time(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "set.zip", FOUR)
    first = fetch_source(settings(tmp_path, archive))
    marked = Path(first.folder) / FOUR[0]
    marked.write_text("unpacked before")
    assert fetch_source(settings(tmp_path, archive)) == first
    assert marked.read_text() == "unpacked before"


def test_a_zip_of_which_unpacked_files_are_missing_is_unpacked_again(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "set.zip", FOUR)
    folder = Path(fetch_source(settings(tmp_path, archive)).folder)
    (folder / FOUR[2]).unlink()
    fetch_source(settings(tmp_path, archive))
    assert files_below(folder) == sorted(FOUR)


def test_a_zip_with_other_content_is_unpacked_beside_the_earlier_one(tmp_path: Path) -> None:
    first = fetch_source(settings(tmp_path, make_zip(tmp_path / "set.zip", FOUR)))
    second = fetch_source(settings(tmp_path, make_zip(tmp_path / "set.zip", [*FOUR, "train/NORMAL/e.jpeg"])))
    assert first.folder != second.folder
    assert len(files_below(Path(first.folder))) == 4
    assert len(files_below(Path(second.folder))) == 5


def test_the_expected_checksum_is_compared_before_anything_is_unpacked(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "set.zip", FOUR)
    right = sha256_of_file(archive)
    with pytest.raises(SourceError, match=r"ingestion\.sha256"):
        fetch_source(settings(tmp_path, archive, ingestion={"sha256": "0" * 64}))
    assert not (tmp_path / "raw").exists()
    assert fetch_source(settings(tmp_path, archive, ingestion={"sha256": right})).archive_sha256 == right


def test_a_zip_that_turns_out_damaged_half_way_leaves_nothing(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "set.zip", FOUR)
    archive.write_bytes(archive.read_bytes().replace(b"train/PNEUMONIA/b.jpegPK", b"train/PNEUMONIA/B.jpegPK"))
    with pytest.raises(ArchiveError, match="damaged"):
        fetch_source(settings(tmp_path, archive))
    assert list((tmp_path / "raw").iterdir()) == []


def test_what_an_interrupted_attempt_left_is_not_taken_for_whole(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "set.zip", FOUR)
    left = tmp_path / "raw" / f"set-{sha256_of_file(archive)[:16]}.partial" / "files"
    make_folder(left, ["train/NORMAL/half.jpeg"])
    assert files_below(Path(fetch_source(settings(tmp_path, archive)).folder)) == sorted(FOUR)
    assert not left.exists()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("no/such/place", "does not exist"),
        ("no/such.zip", "does not exist"),
        ("ftp://example.org/a.zip", "not a kind that is known"),
        ("x" * 300, "cannot be read (File name too long)"),
    ],
)
def test_a_source_that_is_not_there_is_named(source: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        fetch_source(settings(tmp_path, source))
    assert f"source: {hide_keys(source)}" in str(caught.value)
    assert sentence in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_zip_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_text("hello")
    with pytest.raises(ArchiveError, match=r"set\.zip is not a zip archive"):
        fetch_source(settings(tmp_path, tmp_path / "set.zip"))


@pytest.mark.parametrize("make", [lambda p: (p / "empty").mkdir(), lambda p: make_zip(p / "empty", [])])
def test_an_empty_folder_or_zip_is_refused_by_name(make: Any, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(SourceError, match="empty holds neither"):
        fetch_source(settings(tmp_path, tmp_path / "empty"))


def test_a_file_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mine", FOUR)
    try:
        (folder / "train/NORMAL/\udcff.jpeg").write_text("x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(SourceError, match="not UTF-8"):
        fetch_source(settings(tmp_path, folder))


def test_the_sample_is_drawn_once_for_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = {"n_images": 40, "side_px": 128}
    first = fetch_source(settings(tmp_path, "sample", sample=few))
    assert "drawing 40" in capsys.readouterr().out
    assert (first.kind, len(first.layout.images)) == ("sample", 40)
    assert fetch_source(settings(tmp_path, "sample", sample=few)).sha256 == first.sha256
    assert "already drawn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("sample", "sample"),
        ("/data/chest_xray_224.zip", "chest_xray_224"),
        ("data/my set/", "my-set"),
        ("s3://bucket/prefix/set.zip", "set"),
        ("https://example.org/a.zip?dl=1", "a-zip-dl-1"),
        ("..", "source"),
        ("/", "source"),
        ("Röntgen", "R-ntgen"),
        ("x" * 300, "x" * 60),
    ],
)
def test_a_source_has_a_short_plain_name(source: str, name: str) -> None:
    assert source_name(source) == name


# -- each file is read once --------------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content was hashed."""
    names: list[str] = []
    real = hashlib.file_digest

    def note(stream: Any, kind: str) -> Any:
        names.append(Path(stream.name).name)
        return real(stream, kind)

    monkeypatch.setattr("tasks.sources.checksums.hashlib.file_digest", note)
    return names


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = time.time_ns() + 10**10
    monkeypatch.setattr("tasks.sources.checksums.time", SimpleNamespace(time_ns=lambda: moment))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_file_is_read_once_and_again_only_when_it_changed(
    kind: str, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder(tmp_path / "mine", FOUR) if kind == "folder" else make_zip(tmp_path / "set.zip", FOUR)
    later(monkeypatch)
    first = fetch_source(settings(tmp_path, source))
    n_files = 4 if kind == "folder" else 1
    assert len(read) == n_files
    assert fetch_source(settings(tmp_path, source)) == first
    assert len(read) == n_files
    if kind == "folder":
        (source / FOUR[0]).write_text(FOUR[0][::-1])
    else:
        make_zip(source, [*FOUR, "train/NORMAL/e.jpeg"])
    assert fetch_source(settings(tmp_path, source)).sha256 != first.sha256
    assert set(read[n_files:]) == {"a.jpeg" if kind == "folder" else "set.zip"}


def test_the_listing_of_a_folder_does_not_read_its_files_once_more(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "mine", FOUR)
    later(monkeypatch)
    fetched = fetch_source(settings(tmp_path, folder))
    manifest, _ = list_images(fetched, IngestionSettings(max_side_px=1_000))
    assert sorted(read) == ["a.jpeg", "b.jpeg", "c.jpeg", "d.jpeg"]
    assert manifest["sha256"].tolist() == [sha256_of_file(folder / name) for name in sorted(FOUR)]


def test_a_file_that_was_written_just_now_is_read_again_the_next_time(tmp_path: Path, read: list[str]) -> None:
    folder = make_folder(tmp_path / "mine", FOUR)
    for _ in range(2):
        fetch_source(settings(tmp_path, folder))
    assert len(read) == 8
    assert not (tmp_path / "raw").exists()


def test_a_change_that_keeps_size_and_time_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "mine", FOUR)
    later(monkeypatch)
    first = fetch_source(settings(tmp_path, folder))
    path = folder / FOUR[0]
    before = path.stat()
    path.write_text(FOUR[0][::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fetch_source(settings(tmp_path, folder)).sha256 != first.sha256


@pytest.mark.parametrize("content", ["{", "[]", "7", '{"a": 1}'])
def test_a_record_of_checksums_that_is_broken_costs_time_only(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "mine", FOUR)
    later(monkeypatch)
    first = fetch_source(settings(tmp_path, folder))
    (record,) = (tmp_path / "raw" / "sums").iterdir()
    record.write_text(content)
    assert fetch_source(settings(tmp_path, folder)) == first


def test_the_checksums_of_files_depend_on_names_and_contents_and_not_on_their_order(tmp_path: Path) -> None:
    def sums(*names: str) -> dict[str, list[Any]]:
        return {name: found[:1] for name, found in sum_files(tmp_path, names, tmp_path / "record").items()}

    for name, text in (("a", "1"), ("b", "2")):
        (tmp_path / name).write_text(text)
    first = sums("a", "b")
    assert sums("b", "a") == first
    for name, text in (("a", "2"), ("b", "1")):
        (tmp_path / name).write_text(text)
    assert sums("a", "b") != first


# -- a task of its own, tried again ------------------------------------------------------------------------------------


def fetch_in_flow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, errors: list[Exception], **how: Any
) -> tuple[State[str], list[float]]:
    """The end of a flow whose source fails with these errors first, and how long it waited for a server."""
    waited: list[float] = []
    folder = make_folder(tmp_path / "mine", FOUR)
    monkeypatch.setattr("tasks.sources.fetching.time", SimpleNamespace(sleep=waited.append, monotonic=time.monotonic))

    def fail_first(named: Settings) -> Any:
        if errors:
            raise errors.pop(0)
        return fetch_source(named)

    monkeypatch.setattr("tasks.sources.fetching.fetch_source", fail_first)

    @flow(log_prints=True)
    def fetching() -> str:
        return fetch(settings(tmp_path, folder, ingestion={"backoff_s": 0.05, "tries": 3, **how})).sha256

    return fetching(return_state=True), waited


def states_of_task(state: State[Any]) -> list[str]:
    """What Prefect's page shows of the only task of a flow, once it is there."""
    flow_run = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    names: list[str] = []
    with get_client(sync_client=True) as client:
        while not names or names[-1] not in ("Completed", "Failed"):
            runs = client.read_task_runs(flow_run_filter=flow_run)
            assert all(run.name.startswith("fetch-") for run in runs)
            states = [found for run in runs for found in client.read_task_run_states(run.id)]
            names = [str(found.name) for found in sorted(states, key=lambda found: found.timestamp)]
    return names


@pytest.mark.usefixtures("prefect_engine")
def test_prefect_fetches_again_after_what_the_server_asks_for_at_most_max_wait_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[Exception] = [OutsideError("the server is busy", 70.0), OutsideError("the server is busy", 1e6)]
    state, waited = fetch_in_flow(monkeypatch, tmp_path, errors, max_wait_s=90)
    assert state.is_completed() and waited == [70.0, 90.0]
    assert "the server is busy; attempt 2 of 3 follows after the 70 s that the server asks for" in caplog.text
    assert states_of_task(state).count("AwaitingRetry") == 2


@pytest.mark.usefixtures("prefect_engine")
@pytest.mark.parametrize(("error", "n_tries"), [(OutsideError("away", 5.0), 3), (SourceError("wrong"), 1)])
def test_fetching_ends_in_its_own_error_when_the_tries_are_used_up_or_another_does_not_help(
    error: Exception, n_tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [error] * 9
    state, waited = fetch_in_flow(monkeypatch, tmp_path, errors)
    with pytest.raises(type(error), match=str(error)):
        state.result()
    assert len(errors) == 9 - n_tries
    assert waited == [5.0] * (n_tries - 1), "nobody waits after the last"
