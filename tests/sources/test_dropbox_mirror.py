"""Private Dropbox folders: a mirror that holds what Dropbox holds, fetches only what is new, and tells no token."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dropbox_server import TOKEN, DropboxServer, Fault, dropbox_hash, zip_bytes
from pipeline_runs import wait_until
from tunnel_proxy import running_proxy

from tasks.errors import OutsideError, SourceError
from tasks.files import REPOSITORY
from tasks.runs.manifest import image_id
from tasks.settings import IngestionSettings
from tasks.sources.dropbox_mirror import RemoteFile, content_hash, fetch_dropbox_folder, plan_mirror

FILES = {
    "/Scans/Train/NORMAL/a.jpeg": b"a" * 3000,
    "/Scans/Train/NORMAL/b.jpeg": b"b" * 200_000,
    "/Scans/Train/PNEUMONIA/c.jpeg": b"c" * 10,
    "/Scans/Test/empty.csv": b"",
    "/Other/z.jpeg": b"z",
}
NAMES = ["Test/empty.csv", "Train/NORMAL/a.jpeg", "Train/NORMAL/b.jpeg", "Train/PNEUMONIA/c.jpeg"]
FETCH = """
import sys
from pathlib import Path
from tasks.sources.dropbox_mirror import fetch_dropbox_folder
from tasks.settings import IngestionSettings
print(fetch_dropbox_folder("dropbox:/Scans", Path(sys.argv[1]), IngestionSettings(ca_file=sys.argv[2])))
"""


@pytest.fixture
def server(dropbox: DropboxServer, monkeypatch: pytest.MonkeyPatch) -> DropboxServer:
    dropbox.private = dict(FILES)
    for name, host in dropbox.sdk_environment.items():
        # The package reads its variables only once, and another test may have imported it.
        monkeypatch.setattr(f"dropbox.dropbox_client.{name.removeprefix('DROPBOX_')}", host)
    monkeypatch.setenv("DROPBOX_TOKEN", TOKEN)
    return dropbox


def fetch(server: DropboxServer, folder: Path, address: str = "dropbox:/Scans", **changes: Any) -> Path:
    base = {"timeout_s": 5, "tries": 3, "backoff_s": 0.01, "ca_file": str(server.ca_file)}
    return fetch_dropbox_folder(address, folder, IngestionSettings(**{**base, **changes}))


def refused(server: DropboxServer, folder: Path, address: str = "dropbox:/Scans", **changes: Any) -> str:
    with pytest.raises(SourceError) as caught:
        fetch(server, folder, address, **changes)
    assert TOKEN not in f"{caught.value!r}"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


def failed(server: DropboxServer, folder: Path, address: str = "dropbox:/Scans", **changes: Any) -> OutsideError:
    with pytest.raises(OutsideError, match=r"try again later|run again") as caught:
        fetch(server, folder, address, **changes)
    return caught.value


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def fetched(server: DropboxServer) -> int:
    return len([request for request in server.content_requests() if request.status == 200])


def test_a_folder_arrives_whole_over_several_pages_and_folders_keep_one_spelling(
    server: DropboxServer, tmp_path: Path
) -> None:
    folder = fetch(server, tmp_path, "dropbox:/scans/")
    assert files_in(folder) == NAMES
    assert {name: (folder / name).read_bytes() for name in NAMES} == {n: FILES[f"/Scans/{n}"] for n in NAMES}
    assert len([r for r in server.requests if r.path.endswith("/continue")]) > 1


def test_the_whole_dropbox_may_be_named(server: DropboxServer, tmp_path: Path) -> None:
    folder = fetch(server, tmp_path, "dropbox:/")
    assert files_in(folder) == ["Other/z.jpeg", *(f"Scans/{name}" for name in NAMES)]


def test_only_new_and_changed_files_are_fetched_again_and_vanished_ones_are_removed_and_told_by_id(
    server: DropboxServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(server, tmp_path)
    server.requests.clear()
    server.private["/Scans/Train/NORMAL/a.jpeg"] = b"A" * 3000  # of the same size
    server.private["/Scans/Train/NORMAL/new.jpeg"] = b"new"
    del server.private["/Scans/Train/PNEUMONIA/c.jpeg"]
    folder = fetch(server, tmp_path)
    out = capsys.readouterr().out
    assert f"1 files are gone from dropbox:/Scans and removed here: {image_id('Train/PNEUMONIA/c.jpeg')}" in out
    assert "c.jpeg" not in out
    assert "2 files fetched, 2 unchanged" in out
    assert fetched(server) == 2
    assert (folder / "Train/NORMAL/a.jpeg").read_bytes() == b"A" * 3000
    assert not (folder / "Train/PNEUMONIA").exists()


def test_an_unchanged_folder_is_not_fetched_again(server: DropboxServer, tmp_path: Path) -> None:
    fetch(server, tmp_path)
    server.requests.clear()
    fetch(server, tmp_path)
    assert server.content_requests() == []


def test_a_file_spoiled_here_is_fetched_again(server: DropboxServer, tmp_path: Path) -> None:
    folder = fetch(server, tmp_path)
    (folder / NAMES[1]).write_bytes(b"x" * 3000)
    fetch(server, tmp_path)
    assert (folder / NAMES[1]).read_bytes() == b"a" * 3000


def test_a_single_zip_whose_body_is_cut_is_asked_for_once_more_and_never_again(
    server: DropboxServer, tmp_path: Path
) -> None:
    content = server.private["/chest.zip"] = zip_bytes(5_000_000)
    server.faults = [Fault(cut=0.6)]
    path = fetch(server, tmp_path, "dropbox:/chest.zip")
    assert path.name == "chest.zip"
    assert path.read_bytes() == content
    assert fetch(server, tmp_path, "dropbox:/chest.zip") == path
    assert [request.status for request in server.content_requests()] == [200, 200]


@pytest.mark.parametrize("fault", [Fault(cut=0.6), Fault(cut=0.6, reset=True), Fault(length_is_off_by=-1000)])
def test_a_body_that_is_cut_at_every_try_leaves_no_file_and_the_task_tries_again(
    server: DropboxServer, tmp_path: Path, fault: Fault
) -> None:
    content = server.private["/chest.zip"] = zip_bytes(1_000_000)
    server.faults = [fault] * 3  # as many as there are tries
    failed(server, tmp_path, "dropbox:/chest.zip")
    assert files_in(tmp_path) == []
    assert fetch(server, tmp_path, "dropbox:/chest.zip").read_bytes() == content


def test_files_that_came_before_a_failure_are_not_fetched_again(server: DropboxServer, tmp_path: Path) -> None:
    server.faults = [None, Fault(status=503), Fault(status=503)]
    assert "503" in str(failed(server, tmp_path, n_connections=1, tries=2))
    assert files_in(fetch(server, tmp_path, n_connections=1)) == NAMES
    assert fetched(server) == len(NAMES)


def test_a_tenth_of_the_requests_failing_costs_no_try_of_the_task(server: DropboxServer, tmp_path: Path) -> None:
    server.private = {f"/Scans/{i}.jpeg": bytes([i]) * 1000 for i in range(100)}
    server.page_size = 1000
    kinds = [Fault(status=500), Fault(cut=0.5), Fault(status=429, retry_after="0"), Fault(cut=0.5, reset=True)]
    server.faults = [kinds[i // 10 % 4] if i % 10 == 0 else None for i in range(100)]
    folder = fetch(server, tmp_path)
    assert {name: (folder / name).read_bytes() for name in files_in(folder)} == {
        path.removeprefix("/Scans/"): content for path, content in server.private.items()
    }


@pytest.mark.slow
def test_a_mirror_that_was_killed_goes_on_file_by_file(server: DropboxServer, tmp_path: Path) -> None:
    server.private = {f"/Scans/{i}.bin": os.urandom(50_000) for i in range(100)}
    server.page_size, server.bytes_per_s = 1000, 500_000
    command = [sys.executable, "-c", FETCH, str(tmp_path), str(server.ca_file)]
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **server.sdk_environment})
    try:
        wait_until(lambda: server.n_sent() > 3_000_000, "nothing was fetched")
    finally:
        process.kill()
        process.wait()
    server.bytes_per_s = None
    folder = fetch(server, tmp_path)
    assert {f"/Scans/{name}": (folder / name).read_bytes() for name in files_in(folder)} == server.private
    twice = server.n_sent() / 5_000_000 - 1
    print(f"bytes fetched twice after a kill: {100 * twice:.3f} %, of 8 files at a time")
    assert server.n_sent() <= 5_000_000 + 8 * 50_000
    assert not list(tmp_path.rglob("parts"))


def test_a_file_changed_between_two_tries_is_never_spliced(server: DropboxServer, tmp_path: Path) -> None:
    server.private["/chest.zip"] = zip_bytes(1_000_000)
    new = zip_bytes(1_000_000, seed=1)
    server.faults = [Fault(cut=0.6), Fault(change=lambda: server.private.update({"/chest.zip": new}))]
    assert "not_found" in refused(server, tmp_path, "dropbox:/chest.zip")
    assert fetch(server, tmp_path, "dropbox:/chest.zip").read_bytes() == new


def test_failures_from_outside_are_tried_again(server: DropboxServer, tmp_path: Path) -> None:
    server.api_faults = [Fault(status=429, retry_after="1"), None, Fault(status=500)]
    server.faults = [Fault(status=503), Fault(cut=0.5, reset=True), Fault(status=429, retry_after="0")]
    assert files_in(fetch(server, tmp_path)) == NAMES
    first, second = [request for request in server.requests if request.place == "api"][:2]
    assert second.time - first.time >= 1


def test_a_server_that_keeps_failing_is_left_after_the_tries(server: DropboxServer, tmp_path: Path) -> None:
    server.faults = [Fault(status=503)] * 100
    assert "503" in str(failed(server, tmp_path, n_connections=1))
    assert len(server.content_requests()) <= 2 * 3, "the next file may be asked for before the failure is noticed"
    server.faults = []
    assert files_in(fetch(server, tmp_path)) == NAMES


def test_a_server_that_asks_for_an_hour_is_left_within_a_minute_and_the_hour_told(
    server: DropboxServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.sources.dropbox_mirror.LONGEST_PAUSE_S", 0.1)
    server.api_faults = [Fault(status=429, retry_after="3600")] * 3
    assert failed(server, tmp_path).retry_after_s == 3600
    assert server.requests[-1].time - server.requests[0].time < 10


def test_a_web_page_in_the_place_of_the_api_is_for_the_task_to_try_again(server: DropboxServer, tmp_path: Path) -> None:
    server.api_faults = [Fault(html=True)]
    failed(server, tmp_path)
    assert files_in(fetch(server, tmp_path)) == NAMES


def test_a_wrong_token_is_refused_at_once(
    server: DropboxServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROPBOX_TOKEN", "another")
    message = refused(server, tmp_path)
    assert "token" in message
    assert "make a new one" in message
    assert "another" not in message
    assert len(server.requests) == 1


@pytest.mark.parametrize("token", ["", "  ", f"{TOKEN}\nmore", f"{TOKEN}é", f"{TOKEN} more"])
def test_no_token_or_what_cannot_be_one_is_said_with_both_ways_out(
    server: DropboxServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("DROPBOX_TOKEN", token)
    message = refused(server, tmp_path)
    assert "DROPBOX_TOKEN" in message
    assert "ingestion.dropbox_block" in message or TOKEN in token
    assert server.requests == []


def test_the_token_of_a_secret_block_goes_before_the_environment(
    server: DropboxServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_engine: None
) -> None:
    from prefect.blocks.system import Secret

    monkeypatch.setenv("DROPBOX_TOKEN", "another")
    Secret(value=TOKEN).save("dropbox-token", overwrite=True)
    assert files_in(fetch(server, tmp_path, dropbox_block="dropbox-token")) == NAMES
    message = refused(server, tmp_path, dropbox_block="no-such-block")
    assert "ingestion.dropbox_block: there is no Secret block 'no-such-block'" in message


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("dropbox:/Nowhere", "check the address"),
        ("dropbox:/Scans/Train/NORMAL/a.jpeg", "not a .zip"),
        ("dropbox:/Scans/../Other", "leads out"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(
    server: DropboxServer, tmp_path: Path, address: str, said: str
) -> None:
    assert said in refused(server, tmp_path, address)


def test_an_empty_answer_does_not_empty_the_mirror(server: DropboxServer, tmp_path: Path) -> None:
    folder = fetch(server, tmp_path, "dropbox:/")
    server.private.clear()
    assert "holds no files" in refused(server, tmp_path, "dropbox:/")
    assert len(files_in(folder)) == len(FILES)


def test_limits_are_kept(server: DropboxServer, tmp_path: Path) -> None:
    assert "ingestion.max_members" in refused(server, tmp_path, max_members=2)
    assert "ingestion.max_unpacked_gb" in refused(server, tmp_path, max_unpacked_gb=1e-5)


def test_an_unknown_authority_is_refused_with_the_way_out(server: DropboxServer, tmp_path: Path) -> None:
    assert "ingestion.ca_file" in refused(server, tmp_path, ca_file=None)


def test_neither_files_nor_lines_hold_the_token(
    server: DropboxServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = [Fault(status=503)] * 2
    fetch(server, tmp_path)
    assert TOKEN not in capsys.readouterr().out
    assert [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()] == []


def test_the_variables_of_the_package_lead_a_process_to_another_server(server: DropboxServer, tmp_path: Path) -> None:
    environment = {**os.environ, **server.sdk_environment}
    command = [sys.executable, "-c", FETCH, str(tmp_path), str(server.ca_file)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert files_in(Path(done.stdout.splitlines()[-1])) == NAMES


def test_what_is_fetched_and_removed_is_the_difference() -> None:
    remote = {"same": RemoteFile("1", 1, "h"), "changed": RemoteFile("2", 1, "new"), "new": RemoteFile("3", 1, "x")}
    held = {"same": "h", "changed": "old", "gone": "g"}
    assert plan_mirror(remote, held) == (["changed", "new"], ["gone"])


def test_the_content_hash_is_that_of_dropbox(tmp_path: Path) -> None:
    for size in (0, 1, 4 << 20, (8 << 20) + 5):
        (tmp_path / "file").write_bytes(b"x" * size)
        assert content_hash(tmp_path / "file") == dropbox_hash(b"x" * size)


@pytest.mark.parametrize(("name", "scheme"), [("HTTPS_PROXY", "http"), ("all_proxy", "socks5h")])
def test_it_is_fetched_through_the_proxy_that_is_set(
    name: str, scheme: str, server: DropboxServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_proxy() as (address, asked):
        monkeypatch.setenv("NO_PROXY", "none.example")
        monkeypatch.setenv(name, f"{scheme}://{address}")
        folder = fetch(server, tmp_path)
    assert asked and files_in(folder)
    assert {place.partition(":")[0] for place in asked} <= {"localhost", "127.0.0.1"}
