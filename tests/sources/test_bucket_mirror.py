"""Fetching from S3, over real sockets: complete, no byte twice, and right when a part of the requests fails."""

import hashlib
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
from s3_server import AWS, FaultyProxy, faulty_proxy, running_s3, set_aws

import tasks.sources.bucket_mirror
from tasks.errors import OutsideError, SourceError
from tasks.files import REPOSITORY
from tasks.runs.s3_client import make_client
from tasks.settings import IngestionSettings
from tasks.sources.bucket_mirror import BucketCopy, fetch_bucket, plan_fetch
from tasks.sources.layout import plan_layout

MIB = 1 << 20
HOSTILE = {
    "absolute": "data//etc/passwd",
    "upwards": "data/a/../../b",
    "here": "data/./b",
    "backslash": "data/a\\b",
    "long": f"data/{'x' * 256}",
    "folder-with-content": "data/a/",
}
N_MANY = 300
MANY = {f"data/train/NORMAL/{i:04}.jpeg": b"image %d " % i * 20 for i in range(N_MANY)}


def settings(**others: Any) -> IngestionSettings:
    return IngestionSettings.model_validate({"backoff_s": 0.01, "timeout_s": 5.0, **others})


def everything(names: list[str]) -> list[str]:
    return names


def mirror(
    address: str, folder: Path, select: Callable[[list[str]], list[str]] = everything, **others: Any
) -> BucketCopy:
    return fetch_bucket(address, folder, settings(**others), select, lambda done, total: None)


def fetch(bucket: str, folder: Path, **others: Any) -> BucketCopy:
    return mirror(f"s3://{bucket}/data", folder, **others)


def files_below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def noise(size: int, seed: int = 7) -> bytes:
    return hashlib.shake_128(seed.to_bytes(4, "big")).digest(size)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    hostile = {f"hostile-{kind}": {"data/fine.png": b"1", key: b"2"} for kind, key in HOSTILE.items()}
    with running_s3({"many": MANY, **hostile}) as url:
        yield url


@pytest.fixture(scope="module")
def client(server: str) -> Any:
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=server, **keys)


@pytest.fixture
def s3(server: str, client: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the server, to which the standard chain leads too."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**AWS, "AWS_ENDPOINT_URL": server, "AWS_CONFIG_FILE": "/nowhere"}.items():
        monkeypatch.setenv(name, value)
    return client


@pytest.fixture
def proxy(s3: Any, server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy that fails nothing yet, in front of the server for the standard chain."""
    with faulty_proxy(server, share=0.0) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.fixture
def bucket(s3: Any, request: pytest.FixtureRequest) -> str:
    """A new bucket."""
    name = "b" + hashlib.sha256(request.node.name.encode()).hexdigest()[:20]
    s3.create_bucket(Bucket=name)
    return name


def put(s3: Any, bucket: str, objects: dict[str, bytes]) -> None:
    for key, body in objects.items():
        s3.put_object(Bucket=bucket, Key=key, Body=body)


def put_in_parts(s3: Any, bucket: str, key: str, parts: list[bytes]) -> None:
    upload = {"Bucket": bucket, "Key": key}
    upload["UploadId"] = s3.create_multipart_upload(**upload)["UploadId"]
    done = [
        {"PartNumber": n, "ETag": s3.upload_part(**upload, PartNumber=n, Body=body)["ETag"]}
        for n, body in enumerate(parts, 1)
    ]
    s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": done})


# -- what is fetched ---------------------------------------------------------------------------------------------------


def test_a_first_fetch_is_complete_a_second_fetches_nothing_and_a_third_what_is_new_or_changed(
    s3: Any, tmp_path: Path, proxy: FaultyProxy
) -> None:
    first = fetch("many", tmp_path / "m", n_connections=16)
    assert (len(first.fetched), first.vanished) == (N_MANY, ())
    assert len(first.names) == N_MANY
    assert files_below(first.folder) == {name.removeprefix("data/"): body for name, body in MANY.items()}

    proxy.forget()
    second = fetch("many", tmp_path / "m")
    assert (len(second.fetched), proxy.fetched()) == (0, [])

    added = {f"data/test/NORMAL/{i}.jpeg": b"new" for i in range(20)}
    changed = {f"data/train/NORMAL/{i:04}.jpeg": b"changed" for i in range(5)}
    try:
        put(s3, "many", added | changed)
        third = fetch("many", tmp_path / "m")
        assert third.fetched == {name.removeprefix("data/") for name in added | changed}
        assert proxy.fetched() == sorted(f"/many/{name}" for name in added | changed)
        expected = {name.removeprefix("data/"): body for name, body in (MANY | added | changed).items()}
        assert files_below(third.folder) == expected
    finally:
        s3.delete_objects(Bucket="many", Delete={"Objects": [{"Key": name} for name in added]})
        put(s3, "many", {name: MANY[name] for name in changed})


@pytest.mark.slow
def test_a_fetch_ends_right_while_a_tenth_of_the_requests_fails(tmp_path: Path, proxy: FaultyProxy) -> None:
    proxy.share = 0.1
    copy = fetch("many", tmp_path / "m", n_connections=16, timeout_s=0.5)
    assert len(copy.fetched) == N_MANY
    assert files_below(copy.folder) == {name.removeprefix("data/"): body for name, body in MANY.items()}
    assert set(proxy.n_failed) == {"500", "503", "reset", "stall"} and proxy.n_failed.total() > N_MANY / 20
    assert not fetch("many", tmp_path / "m", timeout_s=0.5).fetched


def test_a_prefix_is_a_folder_and_markers_of_folders_are_no_files(s3: Any, bucket: str, tmp_path: Path) -> None:
    odd = {"data/é ü+%41 &=?#.png": b"odd", "data/empty.png": b""}
    put(
        s3,
        bucket,
        {"data/": b"", "data/sub/": b"", "data/sub/a.png": b"a", "data2/b.png": b"b", "data.png": b"c", **odd},
    )
    expected = {"sub/a.png": b"a", "é ü+%41 &=?#.png": b"odd", "empty.png": b""}
    for slash in ("", "/"):
        copy = mirror(f"s3://{bucket}/data{slash}", tmp_path / f"m{slash}")
        assert files_below(copy.folder) == expected
    whole = mirror(f"s3://{bucket}", tmp_path / "whole")
    assert {"data2/b.png", "data.png", "data/sub/a.png"} < set(whole.names)


def test_only_what_is_selected_is_fetched_and_all_names_are_told(s3: Any, bucket: str, tmp_path: Path) -> None:
    four = ["train/NORMAL/a.jpeg", "train/PNEUMONIA/b.jpeg", "test/NORMAL/c.jpeg", "test/PNEUMONIA/d.jpeg"]
    put(s3, bucket, {f"data/set/{name}": name.encode() for name in [*four, "readme.txt", ".DS_Store"]})

    def select(names: list[str]) -> list[str]:
        layout = plan_layout(names, bucket)
        return [layout.root + image for image in layout.images]

    copy = mirror(f"s3://{bucket}/data", tmp_path / "m", select)
    assert sorted(files_below(copy.folder)) == sorted(f"set/{name}" for name in four)
    assert len(copy.names) == 6 and plan_layout(copy.names, bucket).n_clutter == 2


def test_what_vanished_is_reported_and_removed(
    s3: Any, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(s3, bucket, {f"data/sub/{i}.png": b"x" for i in range(6)})
    fetch(bucket, tmp_path / "m")
    s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": f"data/sub/{i}.png"} for i in range(5)]})
    copy = fetch(bucket, tmp_path / "m")
    assert copy.vanished == tuple(f"sub/{i}.png" for i in range(5))
    assert "5 files of the last fetch are gone" in capsys.readouterr().out
    assert list(files_below(copy.folder)) == ["sub/5.png"]
    assert fetch(bucket, tmp_path / "m").vanished == ()


def test_a_local_copy_that_is_missing_or_cut_short_is_fetched_again(s3: Any, bucket: str, tmp_path: Path) -> None:
    put(s3, bucket, {f"data/{i}.png": b"content" for i in range(4)})
    folder = fetch(bucket, tmp_path / "m").folder
    (folder / "0.png").unlink()
    (folder / "1.png").write_bytes(b"con")
    copy = fetch(bucket, tmp_path / "m")
    assert copy.fetched == {"0.png", "1.png"}
    assert set(files_below(folder).values()) == {b"content"}


def test_a_file_may_take_the_place_of_a_folder_and_a_folder_that_of_a_file(
    s3: Any, bucket: str, tmp_path: Path
) -> None:
    put(s3, bucket, {"data/a/b.png": b"1", "data/c": b"2"})
    fetch(bucket, tmp_path / "m")
    s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "data/a/b.png"}, {"Key": "data/c"}]})
    put(s3, bucket, {"data/a": b"3", "data/c/d.png": b"4"})
    assert files_below(fetch(bucket, tmp_path / "m").folder) == {"a": b"3", "c/d.png": b"4"}


def test_two_fetches_at_once_fetch_each_object_once(s3: Any, bucket: str, tmp_path: Path, proxy: FaultyProxy) -> None:
    put(s3, bucket, {f"data/{i}.png": b"x" for i in range(30)})
    with ThreadPoolExecutor(2) as threads:
        copies = [threads.submit(fetch, bucket, tmp_path / "m") for _ in range(2)]
    assert sorted(len(copy.result().fetched) for copy in copies) == [0, 30]
    assert sum(request.startswith(f"GET /{bucket}/data/") for request in proxy.requests) == 30


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_name_that_leads_out_of_the_folder_is_refused_before_anything_is_fetched(
    s3: Any, tmp_path: Path, kind: str
) -> None:
    with pytest.raises(SourceError, match="not a safe file name"):
        fetch(f"hostile-{kind}", tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_both_file_and_folder_is_refused_when_it_is_wanted(s3: Any, bucket: str, tmp_path: Path) -> None:
    put(s3, bucket, {"data/a": b"1", "data/a/b/c.png": b"2"})
    with pytest.raises(SourceError, match="both as a file and as a folder"):
        fetch(bucket, tmp_path / "m")
    copy = mirror(f"s3://{bucket}/data", tmp_path / "m", lambda names: ["a/b/c.png"])
    assert list(files_below(copy.folder)) == ["a/b/c.png"]


@pytest.mark.parametrize(
    ("limit", "text"), [({"max_members": 2}, "max_members = 2"), ({"max_unpacked_gb": 1e-9}, "max_unpacked_gb = 1e-09")]
)
def test_more_than_the_limits_allow_is_refused(
    s3: Any, bucket: str, tmp_path: Path, limit: dict[str, Any], text: str
) -> None:
    put(s3, bucket, {f"data/{i}.png": b"x" for i in range(3)})
    with pytest.raises(SourceError, match=text):
        fetch(bucket, tmp_path / "m", **limit)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("s3://no-such-bucket/data", "no such bucket"),
        ("s3://many/nothing", "nothing below"),
        ("s3://", "an S3 address is"),
        ("s3://key:secret@many/data", "an S3 address is"),
    ],
)
def test_an_address_that_leads_nowhere_ends_in_one_sentence(s3: Any, tmp_path: Path, address: str, text: str) -> None:
    with pytest.raises(SourceError, match=text) as caught:
        mirror(address, tmp_path / "m")
    assert "secret@" not in str(caught.value)


def test_an_archive_that_is_not_there_is_named(s3: Any, bucket: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"s3://{bucket}/a/no.zip is not there"):
        mirror(f"s3://{bucket}/a/no.zip", tmp_path / "m")
    with pytest.raises(SourceError, match="no such bucket"):
        mirror("s3://no-such-bucket/no.zip", tmp_path / "m")


@pytest.mark.parametrize(
    ("fault", "text"),
    [("403", "s3:ListBucket"), ("400", "credentials have expired"), ("301", "another region")],
)
def test_a_refusal_of_the_server_says_what_to_do(tmp_path: Path, proxy: FaultyProxy, fault: str, text: str) -> None:
    proxy.share, proxy.faults, proxy.only = 1.0, (fault,), lambda request: request.startswith("GET")
    with pytest.raises(SourceError, match=text):
        fetch("many", tmp_path / "m", tries=2)


def test_a_server_that_keeps_failing_may_be_asked_again_later(tmp_path: Path, proxy: FaultyProxy) -> None:
    proxy.share, proxy.faults = 1.0, ("503",)
    with pytest.raises(OutsideError, match="source: s3://many/data keeps failing \\(SlowDown\\); try again later"):
        fetch("many", tmp_path / "m", tries=2)
    assert len(proxy.requests) == 2


def test_without_credentials_both_ways_out_are_named(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(SourceError, match=r"AWS_ACCESS_KEY_ID.*ingestion\.aws_block"):
        fetch("many", tmp_path / "m")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hush-hush")
    with pytest.raises(SourceError, match="PartialCredentialsError") as caught:
        fetch("many", tmp_path / "m")
    assert "hush" not in str(caught.value)


def test_a_server_that_is_down_is_named_and_what_was_fetched_is_kept(
    s3: Any, bucket: str, tmp_path: Path, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3, bucket, {f"data/{i:02}.png": b"x" for i in range(20)})
    proxy.share, proxy.faults, proxy.only = 1.0, ("down",), lambda request: request.endswith("/19.png")
    with pytest.raises(OutsideError, match=r"cannot be reached .*run again; what is finished is kept"):
        fetch(bucket, tmp_path / "m", tries=2, n_connections=2)
    proxy.share = 0.0
    again = fetch(bucket, tmp_path / "m")
    assert len(again.fetched) <= 5 and len(files_below(again.folder)) == 20
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OutsideError, match="cannot be reached"):
        fetch(bucket, tmp_path / "m", tries=2)
    assert len(files_below(again.folder)) == 20


# -- whole, right, and of one version ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1_000, 20 * MIB])
def test_content_that_is_damaged_on_the_way_is_never_kept_and_fetched_again(
    s3: Any, bucket: str, tmp_path: Path, proxy: FaultyProxy, size: int
) -> None:
    body = noise(size)
    put(s3, bucket, {"data/a.png": body})
    proxy.faults, proxy.share, proxy.only = ("damage",), 1.0, lambda request: request.endswith("a.png")
    with pytest.raises(OutsideError, match="FlexibleChecksumError"):
        fetch(bucket, tmp_path / "m", tries=2)
    assert files_below(tmp_path / "m" / "files") == {}
    proxy.share = 0.0
    assert files_below(fetch(bucket, tmp_path / "m").folder) == {"a.png": body}


@pytest.mark.parametrize("size", [1_000, 20 * MIB])
def test_an_object_that_changes_during_the_fetch_is_of_one_version(
    s3: Any, bucket: str, tmp_path: Path, proxy: FaultyProxy, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.sources.bucket_mirror.WHOLE", MIB)
    old, new = noise(size, 1), noise(size, 2)
    put(s3, bucket, {"data/a.png": old, "data/b.png": b"b"})
    asked: list[str] = []

    def change(request: str) -> None:
        if request.endswith("/a.png"):
            asked.append(request)
            if len(asked) == (2 if size > MIB else 1):
                put(s3, bucket, {"data/a.png": new})

    proxy.before = change
    copy = fetch(bucket, tmp_path / "m", n_connections=1)
    assert files_below(copy.folder) == {"a.png": new, "b.png": b"b"}
    assert not fetch(bucket, tmp_path / "m").fetched


def test_an_object_that_goes_during_the_fetch_is_one_that_is_not_there(
    s3: Any, bucket: str, tmp_path: Path, proxy: FaultyProxy
) -> None:
    put(s3, bucket, {"data/a.png": b"a", "data/b.png": b"b"})
    proxy.before = lambda request: s3.delete_object(Bucket=bucket, Key="data/a.png") if "a.png" in request else None
    copy = fetch(bucket, tmp_path / "m")
    assert (copy.names, files_below(copy.folder)) == (("b.png",), {"b.png": b"b"})
    assert copy.fetched == {"b.png"}, "what did not come is not counted"


def test_an_object_that_never_rests_ends_in_one_sentence(
    s3: Any, bucket: str, tmp_path: Path, proxy: FaultyProxy
) -> None:
    put(s3, bucket, {"data/a.png": b"0"})
    proxy.before = lambda request: put(s3, bucket, {"data/a.png": os.urandom(8)}) if "a.png" in request else None
    with pytest.raises(SourceError, match="keeps changing while it is fetched"):
        fetch(bucket, tmp_path / "m")
    proxy.before = lambda request: None
    put(s3, bucket, {"data/a.png": b"at rest"})
    assert files_below(fetch(bucket, tmp_path / "m").folder) == {"a.png": b"at rest"}


def test_an_object_that_changed_and_changed_back_while_a_fetch_was_killed_is_fetched_again(
    s3: Any, bucket: str, tmp_path: Path
) -> None:
    put(s3, bucket, {"data/a.png": b"old"})
    fetch(bucket, tmp_path / "m")
    put(s3, bucket, {"data/a.png": b"new"})
    with pytest.MonkeyPatch.context() as killed:
        fetch_all = tasks.sources.bucket_mirror._fetch
        killed.setattr("tasks.sources.bucket_mirror._fetch", lambda *given: [*fetch_all(*given)][:0])
        killed.setattr("tasks.sources.bucket_mirror.LOOKS", 1)
        with pytest.raises(SourceError):
            fetch(bucket, tmp_path / "m")
    assert files_below(tmp_path / "m" / "files") == {"a.png": b"new"}
    put(s3, bucket, {"data/a.png": b"old"})
    assert files_below(fetch(bucket, tmp_path / "m").folder) == {"a.png": b"old"}


def test_what_to_do_is_decided_over_names_versions_and_sizes_alone() -> None:
    wanted = {"same": ["e", 1], "newer": ["e2", 1], "larger": ["e", 2], "cut": ["e", 9], "new": ["e", 1]}
    index = {"same": ["e", 1], "newer": ["e1", 1], "larger": ["e", 1], "cut": ["e", 9], "gone": ["e", 1]}
    sizes = {"same": 1, "newer": 1, "larger": 1, "cut": 5, "gone": 1, "unfinished.4f2A": 1}
    assert plan_fetch(wanted, index, sizes) == ({"newer", "larger", "cut", "new"}, {"gone"})


def test_an_object_that_was_uploaded_in_parts_comes_whole(s3: Any, bucket: str, tmp_path: Path) -> None:
    parts = [noise(5 * MIB, 1), noise(MIB, 2)]
    put_in_parts(s3, bucket, "data/a.png", parts)
    assert s3.head_object(Bucket=bucket, Key="data/a.png")["ETag"].endswith('-2"')
    assert files_below(fetch(bucket, tmp_path / "m").folder) == {"a.png": b"".join(parts)}


# -- killed, and gone on with ------------------------------------------------------------------------------------------

# The peak is read from /proc: ru_maxrss of a child also counts the parent that it was forked from.
FETCH = r"""
import re, sys
from pathlib import Path
from tasks.sources.bucket_mirror import fetch_bucket
from tasks.settings import IngestionSettings
address, folder, n = sys.argv[1:]
fetch_bucket(address, Path(folder), IngestionSettings(n_connections=int(n)), list, lambda done, total: None)
print("peak", re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
"""


def start_fetch(url: str, address: str, folder: Path, n_connections: int = 4) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, address, str(folder), str(n_connections)]
    return subprocess.Popen(command, env=set_aws(url), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def kill_after(proxy: FaultyProxy, n_requests: int, fetching: subprocess.Popen[str]) -> None:
    """kill -9 as soon as so many objects or ranges were asked for."""
    reached = threading.Event()
    asked: list[str] = []

    def slow(request: str) -> None:
        time.sleep(0.02)
        asked.append(request)
        if len(asked) >= n_requests:
            reached.set()

    proxy.before = slow
    assert reached.wait(60)
    fetching.kill()
    fetching.wait()
    assert fetching.stdout is not None
    fetching.stdout.close()
    proxy.before = lambda request: None
    proxy.forget()


@pytest.mark.slow
def test_a_killed_fetch_goes_on_with_what_is_not_finished(
    s3: Any, bucket: str, tmp_path: Path, proxy: FaultyProxy
) -> None:
    put(s3, bucket, {f"data/{i:03}.png": b"content %d" % i for i in range(120)})
    kill_after(proxy, 140, start_fetch(proxy.url, f"s3://{bucket}/data", tmp_path / "m"))
    n_finished = len(files_below(tmp_path / "m" / "files"))
    assert n_finished > 50
    with (tmp_path / "m" / "index.jsonl").open("a") as index:
        index.write('["000.png", "torn by the ki')
    copy = fetch(bucket, tmp_path / "m")
    assert 120 - n_finished <= len(copy.fetched) <= 120 - n_finished + 4, "of each connection one at most came twice"
    assert files_below(copy.folder) == {f"{i:03}.png": b"content %d" % i for i in range(120)}
    assert not fetch(bucket, tmp_path / "m").fetched


@pytest.mark.slow
def test_a_killed_fetch_of_an_archive_starts_over_and_leaves_nothing_beside_it(
    s3: Any, bucket: str, tmp_path: Path, proxy: FaultyProxy
) -> None:
    body = noise(80 * MIB)
    put(s3, bucket, {"sets/xrays.zip": body})
    address = f"s3://{bucket}/sets/xrays.zip"
    kill_after(proxy, 7, start_fetch(proxy.url, address, tmp_path / "m", n_connections=1))
    (unfinished,) = files_below(tmp_path / "m" / "files")
    assert unfinished.startswith("xrays.zip.")
    assert files_below(mirror(address, tmp_path / "m").folder) == {"xrays.zip": body}


def test_an_archive_is_fetched_again_only_when_it_changed(
    s3: Any, bucket: str, tmp_path: Path, proxy: FaultyProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"s3://{bucket}/xrays.zip"
    for content in ("old", "new"):
        archive = tmp_path / "local.zip"
        with zipfile.ZipFile(archive, "w") as made:
            made.writestr("a.txt", content)
        put(s3, bucket, {"xrays.zip": archive.read_bytes()})
        path = mirror(address, tmp_path / "m").folder / "xrays.zip"
        assert path.read_bytes() == archive.read_bytes()
        capsys.readouterr()
        inode = path.stat().st_ino
        assert not mirror(address, tmp_path / "m").fetched
        assert path.stat().st_ino == inode
        assert "nothing new" in capsys.readouterr().out


@pytest.mark.slow
def test_peak_memory_is_flat_in_the_size_of_the_object(s3: Any, server: str, bucket: str, tmp_path: Path) -> None:
    peaks = []
    for size in (64 * MIB, 160 * MIB):
        put(s3, bucket, {f"{size}.zip": noise(size)})
        fetching = start_fetch(server, f"s3://{bucket}/{size}.zip", tmp_path / str(size))
        out, _ = fetching.communicate(timeout=120)
        assert fetching.returncode == 0
        peaks.append(int(out.split()[-1]) / 1024)
    print("peaks in MB:", peaks)
    assert peaks[1] - peaks[0] < 20


# -- a block instead of the standard chain -----------------------------------------------------------------------------


def test_credentials_and_endpoint_may_come_from_a_block(
    prefect_engine: None, s3: Any, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect_aws import AwsClientParameters, AwsCredentials

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    block: Any = AwsCredentials(
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
        region_name="eu-west-1",
        aws_client_parameters=AwsClientParameters(endpoint_url=server),
    )
    block.save("xrays", overwrite=True)
    client = make_client(settings(aws_block="xrays", tries=3), "source")
    assert (client.meta.endpoint_url, client.meta.region_name) == (server, "eu-west-1")
    assert client.meta.config.retries["total_max_attempts"] == 3
    assert client.list_objects_v2(Bucket="many", MaxKeys=1)["KeyCount"] == 1
    with pytest.raises(SourceError, match=r"ingestion\.aws_block: .*'no-such-block'"):
        make_client(settings(aws_block="no-such-block"), "source")
