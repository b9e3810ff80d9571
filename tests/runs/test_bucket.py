"""Runs in a bucket: what one machine places there another one finds, and what is finished is not done again."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pandas as pd
import pytest
from recipe import FLAGS
from s3_server import faulty_proxy, running_s3, set_aws

from tasks.devices.answers import Answer, answers_folder, keep_answers, match_answers, read_kept, share_answers
from tasks.errors import OutsideError, RunError
from tasks.files import REPOSITORY, write_json
from tasks.records import Facts
from tasks.runs import stages
from tasks.runs.bucket import fetch_run, read_seal, send
from tasks.runs.places import SEAL
from tasks.runs.run import Run
from tasks.runs.s3_client import BucketFolder
from tasks.settings import Settings

BUCKET = "chest"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_s3({BUCKET: {}}) as url:
        yield url


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the server, which is all that the code under test can reach."""
    for name, value in set_aws(server).items():
        monkeypatch.setenv(name, value)
    return boto3.client("s3")


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"s3://{BUCKET}/{tmp_path.name}/run"


def machine(folder: Path, address: str) -> Settings:
    """The settings of a run as a machine with its own disk sees it."""
    storage = {"cache": str(folder / "cache"), "raw": str(folder / "raw")}
    return Settings.model_validate(
        {"run_dir": address, "storage": storage, "ingestion": {"tries": 2, "backoff_s": 0, "timeout_s": 5}}
    )


def put_files(settings: Settings, **files: str) -> None:
    for name, content in files.items():
        path = Run(settings).folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    send(Run(settings), files)


def names_below(bucket: Any, prefix: str) -> dict[str, Any]:
    pages = bucket.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return {entry["Key"]: entry for page in pages for entry in page.get("Contents", ())}


def names_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name[0] != ".")


def test_what_a_machine_sends_another_one_fetches_and_what_it_takes_away_goes_there_too(
    bucket: Any, address: str, tmp_path: Path
) -> None:
    here, there = machine(tmp_path / "here", address), machine(tmp_path / "there", address)
    put_files(here, **{"a.txt": "1", "deep/b.txt": "2"})
    fetch_run(Run(there))
    assert names_in(Run(there).folder) == ["a.txt", "deep/b.txt"]
    put_files(there, **{"a.txt": "3"})
    (Run(there).folder / "deep" / "b.txt").unlink()
    send(Run(there), [], gone=["deep/b.txt"])
    fetch_run(Run(here))
    assert names_in(Run(here).folder) == ["a.txt"]
    assert (Run(here).folder / "a.txt").read_text() == "3"


def test_a_file_that_is_the_same_there_is_neither_sent_nor_fetched_again(
    bucket: Any, address: str, tmp_path: Path
) -> None:
    here, there = machine(tmp_path / "here", address), machine(tmp_path / "there", address)
    put_files(here, **{"a.txt": "1"})
    sent = names_below(bucket, "test_a_file_that_is_the_same")
    fetch_run(Run(there))
    fetched = (Run(there).folder / "a.txt").stat().st_ino
    send(Run(here), ["a.txt"])
    fetch_run(Run(there))
    assert names_below(bucket, "test_a_file_that_is_the_same") == sent
    assert (Run(there).folder / "a.txt").stat().st_ino == fetched


def test_a_file_lost_or_changed_on_this_machine_comes_back_and_one_never_sent_goes(
    bucket: Any, address: str, tmp_path: Path
) -> None:
    here = machine(tmp_path, address)
    put_files(here, **{"a.txt": "1", "b.txt": "2"})
    (Run(here).folder / "a.txt").unlink()
    (Run(here).folder / "b.txt").write_text("placed, and never sent")
    (Run(here).folder / "c.txt").write_text("placed, and never sent")
    fetch_run(Run(here))
    assert names_in(Run(here).folder) == ["a.txt", "b.txt"]
    assert (Run(here).folder / "b.txt").read_text() == "2"


def do_stage(settings: Settings, done: list[int], number: int = 1) -> Facts:
    def make(out: Path) -> Facts:
        done.append(number)
        (out / "masks").mkdir()
        (out / "masks" / "made.txt").write_text(str(number))
        return {"n": number}

    return Run(settings).stage("work", given={"n": number}, make=make)


def test_a_stage_done_on_one_machine_is_taken_from_the_shared_cache_on_another_and_for_another_run(
    bucket: Any, address: str, tmp_path: Path
) -> None:
    done: list[int] = []
    assert do_stage(machine(tmp_path / "here", address), done)["reused"] is False
    for place, run in (("there", address), ("elsewhere", address.replace("/run", "/next"))):
        other = machine(tmp_path / place, run)
        assert do_stage(other, done) == {"n": 1, "reused": True, "seconds": pytest.approx(0, abs=5)}
        assert names_in(Run(other).folder) == ["masks/made.txt", "stages/work.json"]
    assert done == [1]
    assert set(names_below(bucket, "test_a_stage_done")) >= {
        f"{address.partition(BUCKET + '/')[2]}/{name}" for name in ("masks/made.txt", "stages/work.json")
    }


def make_half(settings: Settings, made_on: str) -> None:
    """A stage of two files whose content differs from machine to machine, as that of a network does."""

    def make(out: Path) -> Facts:
        (out / "model.txt").write_text(f"of {made_on}")
        (out / "model.sha256").write_text(f"checksum of {made_on}")
        return {"n": 1}

    Run(settings).stage("work", given={"n": 1}, make=make)


def require_made_on(settings: Settings, name: str) -> None:
    assert (Run(settings).folder / "model.txt").read_text() == f"of {name}"
    assert (Run(settings).folder / "model.sha256").read_text() == f"checksum of {name}"


def test_of_two_machines_that_make_the_same_at_once_the_shared_cache_keeps_what_one_of_them_made(
    bucket: Any, address: str, tmp_path: Path
) -> None:
    first, second, third = (machine(tmp_path / name, address) for name in ("first", "second", "third"))
    cache = address.partition(f"{BUCKET}/")[2].replace("/run", "/cache/")
    make_half(first, "first")
    for name in names_below(bucket, cache):  # the second one does not see it
        bucket.delete_object(Bucket=BUCKET, Key=name)
    make_half(second, "second")
    kept = names_below(bucket, cache)
    make_half(first, "nobody")  # has it, and would send it
    assert names_below(bucket, cache) == kept and len(kept) == 1
    make_half(third, "nobody")
    require_made_on(third, "second")


def test_a_stage_that_is_damaged_in_the_shared_cache_is_done_again(
    bucket: Any, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = machine(tmp_path / "first", address), machine(tmp_path / "second", address)
    make_half(first, "first")
    (entry,) = names_below(bucket, address.partition(f"{BUCKET}/")[2].replace("/run", "/cache/"))
    bucket.put_object(Bucket=BUCKET, Key=entry, Body=b"something else")
    make_half(second, "second")
    require_made_on(second, "second")
    assert ".tar is damaged; it is made again here" in capsys.readouterr().out


def test_a_stage_in_the_shared_cache_that_would_write_outside_its_folder_is_done_again(
    bucket: Any, address: str, tmp_path: Path
) -> None:
    first, second = machine(tmp_path / "first", address), machine(tmp_path / "second", address)
    make_half(first, "first")
    (entry,) = names_below(bucket, address.partition(f"{BUCKET}/")[2].replace("/run", "/cache/"))
    with tarfile.open(tmp_path / "hostile.tar", "w") as archive:
        member = tarfile.TarInfo("../../../out.txt")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"bad"))
    bucket.upload_file(str(tmp_path / "hostile.tar"), BUCKET, entry)
    make_half(second, "second")
    require_made_on(second, "second")
    assert not list(tmp_path.rglob("out.txt"))


def test_a_finished_stage_whose_upload_broke_off_is_sent_when_it_is_asked_for_again(
    bucket: Any, address: str, tmp_path: Path
) -> None:
    done: list[int] = []
    here = machine(tmp_path / "here", address)
    do_stage(here, done)
    prefix = address.removeprefix(f"s3://{BUCKET}/").removesuffix("run")
    sent = set(names_below(bucket, prefix))
    for name in (name for name in sent if "/cache/work/" in name):
        bucket.delete_object(Bucket=BUCKET, Key=name)
    assert do_stage(here, done)["reused"] is True and done == [1]
    assert set(names_below(bucket, prefix)) == sent


def test_a_stage_that_changes_a_sealed_run_breaks_its_seal_in_the_bucket_too(
    bucket: Any, address: str, tmp_path: Path
) -> None:
    here = machine(tmp_path / "here", address)
    assert read_seal(Run(here)) is None
    put_files(here, **{SEAL: '{"news": "x"}'})
    there = machine(tmp_path / "there", address)
    assert read_seal(Run(there)) == {"news": "x"}
    fetch_run(Run(there))
    do_stage(there, [])
    assert read_seal(Run(here)) is None and not (Run(there).folder / SEAL).exists()


@pytest.mark.parametrize("files", [("a.txt", "d.txt"), ("a.txt", "b.txt")], ids=["anew", "as before"])
@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_what_a_machine_placed_before_it_was_cut_off_is_nowhere_once_another_one_went_on(
    n_steps: int, files: tuple[str, str], bucket: Any, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = address.replace("/run", f"{n_steps}{files[1]}/run")
    here, there = machine(tmp_path / "here", address), machine(tmp_path / "there", address)

    def do(settings: Settings, number: int, *files: str) -> None:
        def make(out: Path) -> Facts:
            for name in files:
                (out / name).write_text(str(number))
            return {"n": number}

        Run(settings).stage("work", given={"n": number}, make=make)

    do(here, 1, "a.txt", "b.txt")
    turns = count(1)

    def send_or_die(run: Run, names: Iterable[str], gone: Iterable[str] = ()) -> None:
        if next(turns) == n_steps:
            raise KeyboardInterrupt
        send(run, names, gone)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "send", send_or_die)
        do(here, 2, "a.txt", "c.txt")
    fetch_run(Run(there))
    n = 1 if files[1] == "b.txt" else 3
    do(there, n, *files)
    fetch_run(Run(here))
    expected = [*files, "stages/work.json"]
    assert names_in(Run(here).folder) == names_in(Run(there).folder) == expected
    prefix = address.partition(f"{BUCKET}/")[2] + "/"
    assert sorted(name.removeprefix(prefix) for name in names_below(bucket, prefix)) == expected
    assert (Run(here).folder / "a.txt").read_text() == str(n)


def test_shards_that_an_index_names_go_before_it_and_come_with_it_once(
    bucket: Any, address: str, tmp_path: Path
) -> None:
    here, there = machine(tmp_path / "here", address), machine(tmp_path / "there", address)
    shelf = Path(here.storage.cache) / "arrays" / "shelf"
    shelf.mkdir(parents=True)
    (shelf / "one.npy").write_bytes(b"pixels")
    (shelf / "one.json").write_text("{}")
    write_json(Run(here).folder / "arrays" / "index.json", {"shards": [{"name": "arrays/shelf/one.npy"}], "images": {}})
    send(Run(here), ["arrays/index.json"])
    found = names_below(bucket, "test_shards_that/cache/")
    assert sorted(name.rpartition("/")[2] for name in names_below(bucket, "test_shards_that")) == [
        "index.json",
        "one.json",
        "one.npy",
    ]
    fetch_run(Run(there))
    fetched = Path(there.storage.cache) / "arrays" / "shelf" / "one.npy"
    assert fetched.read_bytes() == b"pixels"
    before = fetched.stat().st_ino
    other = machine(tmp_path / "there", address.replace("/run", "/next"))
    write_json(
        Run(other).folder / "arrays" / "index.json", {"shards": [{"name": "arrays/shelf/one.npy"}], "images": {}}
    )
    send(Run(other), ["arrays/index.json"])
    fetch_run(Run(other))
    assert fetched.stat().st_ino == before
    assert names_below(bucket, "test_shards_that/cache/") == found


def answer_here(settings: Settings, path: str) -> None:
    images = pd.DataFrame({"path": [path], "sha256": [hashlib.sha256(path.encode()).hexdigest()]})
    folder, now = answers_folder(Run(settings)), datetime.now(UTC)
    keep_answers(
        match_answers([Answer(path, 1)], images, "a test"), folder, reviewer="someone", place="a test", now=now
    )


def answered_here(settings: Settings) -> list[str]:
    return sorted(answer.path for answer in read_kept(answers_folder(Run(settings))))


def test_a_run_in_a_bucket_is_named_by_its_address_there_and_another_by_its_path(tmp_path: Path) -> None:
    there, here = (Run(machine(tmp_path, run)) for run in ("s3://chest/runs/one", str(tmp_path / "run")))
    assert there.address("report/index.html") == "s3://chest/runs/one/report/index.html"
    assert here.address() == str(tmp_path / "run")


# -- the bucket --------------------------------------------------------------------------------------------------------


def test_a_page_can_be_opened_from_the_bucket(bucket: Any, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>here</p>")
    etag = BucketFolder(f"s3://{BUCKET}/pages", Settings().ingestion).put(tmp_path / "index.html", "index.html")
    head = bucket.head_object(Bucket=BUCKET, Key="pages/index.html")
    assert (head["ContentType"], head["ETag"]) == ("text/html; charset=utf-8", etag)


def test_an_object_takes_the_place_of_the_version_it_was_meant_for_only(bucket: Any, tmp_path: Path) -> None:
    folder = BucketFolder(f"s3://{BUCKET}/instead", Settings().ingestion)
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    two.write_text("2")
    etag = folder.put_instead(one, "a", "")
    assert etag and folder.put_instead(two, "a", "") is None, "there is one"
    assert folder.put_instead(one, "a", "") == etag, "as if the first answer had got lost"
    newer = folder.put_instead(two, "a", etag)
    assert newer and folder.put_instead(one, "a", etag) is None, "there is another one"
    assert folder.etag("a") == newer and folder.get("a", tmp_path / "a") and (tmp_path / "a").read_text() == "2"
    assert not folder.get("none", tmp_path / "none") and folder.etag("none") == ""


@pytest.mark.parametrize("there", [True, False])
def test_an_answer_that_breaks_off_is_asked_for_again_and_in_the_end_refused_in_one_sentence(
    server: str, bucket: Any, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """What says that there is no such object can break off, too."""
    address += str(there)
    if there:
        put_files(machine(tmp_path / "other", address), **{"a.txt": "whole"})
    with faulty_proxy(server, share=1.0, faults=["reset"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        folder = BucketFolder(address, machine(tmp_path, address).ingestion)
        with pytest.raises(OutsideError, match="cannot be reached") as caught:
            folder.get("a.txt", tmp_path / "a.txt")
        assert "\n" not in str(caught.value) and proxy.n_failed["reset"] >= 2

        def heal(request: str) -> None:
            proxy.share = 0.0

        proxy.before = heal  # after the next one has failed
        assert folder.get("a.txt", tmp_path / "a.txt") == there


@pytest.mark.parametrize(
    ("surroundings", "run_dir", "said"),
    [
        ({}, "s3://no-such-bucket/runs/one", "there is no such bucket"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "s3://chest/runs/one", "cannot be reached"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "s3://chest/runs/one", "no AWS credentials"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_one_sentence_with_the_way_out(
    surroundings: dict[str, str], run_dir: str, said: str, bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in surroundings.items():
        monkeypatch.delenv(name)
        if value:
            monkeypatch.setenv(name, value)
    with pytest.raises((RunError, OutsideError), match=f"run_dir: .*{said}"):
        fetch_run(Run(machine(tmp_path, run_dir)))


@pytest.mark.parametrize(
    "run_dir", ["gs://bucket/runs/one", "s3://bucket", "s3:///run", "s3://bucket/a//b", "http://x/y"]
)
def test_an_address_that_is_no_run_folder_is_refused_by_name(run_dir: str) -> None:
    with pytest.raises(ValueError, match=r"s3://bucket/prefix/run"):
        Settings(run_dir=run_dir)


# -- three machines ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_machines_that_share_nothing_but_the_address_make_one_run(
    server: str, bucket: Any, address: str, tmp_path: Path
) -> None:
    prefix = address.removeprefix(f"s3://{BUCKET}/") + "/"
    for place, path in (("another", "b.png"), ("prepare/data", "a.png")):
        answer_here(machine(tmp_path / place, address), path)
    share_answers(Run(machine(tmp_path / "another", address)))
    code = "import sys; from flows.engine.command_line import read_flags; from flows.{0} import {0}; "
    code += "{0}(read_flags(sys.argv[1:], 'test'))"
    environment = set_aws(server) | {"PYTHONPATH": str(REPOSITORY), "PREFECT_HOME": str(tmp_path / "prefect")}
    environment = {name: value for name, value in environment.items() if name != "PREFECT_API_URL"}
    for flow in ("prepare", "train", "explain"):
        (tmp_path / flow).mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", code.format(flow), *FLAGS, "--run-dir", address],
            cwd=tmp_path / flow,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "prepare" / "data" / "raw").exists() and not (tmp_path / "train" / "data" / "raw").exists()
    assert answered_here(machine(tmp_path / "explain" / "data", address)) == ["a.png", "b.png"]
    found = {name.removeprefix(prefix): entry for name, entry in names_below(bucket, prefix).items()}
    assert {"manifest.parquet", "model.keras", "metrics.json", "audit.json", "report/index.html", SEAL} <= set(found)
    assert max(found, key=lambda name: (found[name]["LastModified"], name == SEAL)) == SEAL
    sealed = json.loads(bucket.get_object(Bucket=BUCKET, Key=prefix + SEAL)["Body"].read())
    assert sealed["settings"]["run_dir"] == address
    assert not any(os.sep + "explain" + os.sep in str(value) for value in sealed.values())


def test_the_folder_of_runs_in_a_bucket_is_not_taken_for_a_run(bucket: Any, address: str, tmp_path: Path) -> None:
    folder = machine(tmp_path, address.removesuffix("run"))
    for act in (fetch_run, read_seal):
        with pytest.raises(RunError, match="names the folder of runs; name one of the runs in it"):
            act(Run(folder))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
