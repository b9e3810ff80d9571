"""Links: what arrives is whole and of one version, whatever the server does; only what is allowed is asked."""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from dropbox_server import RLKEY, DropboxServer, Fault, zip_bytes

from tasks.errors import OutsideError, PipelineError
from tasks.files import REPOSITORY
from tasks.settings import IngestionSettings
from tasks.sources.share_link import direct_link, fetch_link, is_allowed, retry_after_s

CONTENT = zip_bytes(4_000_000)
OTHER = zip_bytes(4_000_000, seed=1)  # of the same size: only the content differs
FETCH = """
import json, re, sys
from pathlib import Path
from tasks.settings import IngestionSettings
from tasks.sources.share_link import fetch_link
url, folder, settings = sys.argv[1:]
fetch_link(url, Path(folder), IngestionSettings(**json.loads(settings)))
# Not ru_maxrss: that of a started process begins with the size of the one that started it.
print("peak", re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
FLOW = """
import json, sys
from pathlib import Path
from prefect import flow
from tasks.settings import IngestionSettings
from tasks.sources.share_link import fetch_link
@flow(log_prints=True)
def fetch():
    url, folder, settings = sys.argv[1:]
    fetch_link(url, Path(folder), IngestionSettings(**json.loads(settings)))
fetch()
"""


@pytest.fixture
def server(dropbox: DropboxServer) -> DropboxServer:
    return dropbox


def options(server: DropboxServer, **changes: Any) -> dict[str, Any]:
    base = {
        "timeout_s": 5,
        "tries": 4,
        "backoff_s": 0.01,
        "allowed_hosts": server.hosts,
        "ca_file": str(server.ca_file),
    }
    return {**base, **changes}


def settings(server: DropboxServer, **changes: Any) -> IngestionSettings:
    return IngestionSettings(**options(server, **changes))


def fetch_in_process(server: DropboxServer, link: str, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", FETCH, link, str(folder), json.dumps(options(server))]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def fetch(link: str, folder: Path, given: IngestionSettings) -> Path:
    """Fetches as Prefect's task does: again after a failure from outside, ``tries`` times."""
    for _ in range(given.tries - 1):
        try:
            return fetch_link(link, folder, given)
        except OutsideError as error:
            time.sleep(error.retry_after_s)
    return fetch_link(link, folder, given)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def refused(server: DropboxServer, link: str, folder: Path, **changes: Any) -> str:
    """The message; it never holds the secret, and no file is left that passes for whole."""
    with pytest.raises(PipelineError) as caught:
        fetch(link, folder, settings(server, **changes))
    message = str(caught.value)
    assert RLKEY not in message
    assert "?" not in message
    assert not [name for name in files_in(folder) if name.endswith(".zip")]
    return message


# -- what arrives ------------------------------------------------------------------------------------------------------


def test_a_share_link_arrives_whole_through_its_redirects(server: DropboxServer, tmp_path: Path) -> None:
    path = fetch(server.put("chest.zip", CONTENT), tmp_path, settings(server))
    assert path.read_bytes() == CONTENT
    assert path.name == "chest.zip"
    assert [(r.place, r.status) for r in server.requests] == [("www", 302), ("content", 200)]


def test_an_old_style_share_link_arrives_through_a_relative_redirect(server: DropboxServer, tmp_path: Path) -> None:
    link = server.put("chest.zip", CONTENT).replace("/scl/fi/", "/s/")
    assert fetch(link, tmp_path, settings(server)).read_bytes() == CONTENT
    assert [r.status for r in server.requests] == [301, 302, 200]


def test_of_a_share_link_only_dl_is_changed(server: DropboxServer, tmp_path: Path) -> None:
    fetch(server.put("chest.zip", CONTENT), tmp_path, settings(server))
    assert server.requests[0].query == f"rlkey={RLKEY}&st=x%2By&dl=1"


@pytest.mark.parametrize(
    ("link", "direct"),
    [
        ("https://www.dropbox.com/s/ab/x.zip", "https://www.dropbox.com/s/ab/x.zip?dl=1"),
        ("https://www.dropbox.com/s/ab/x.zip?dl=0#top", "https://www.dropbox.com/s/ab/x.zip?dl=1"),
        (
            "https://www.dropbox.com/scl/fi/a/x.zip?dl=0&rlkey=k%2F",
            "https://www.dropbox.com/scl/fi/a/x.zip?dl=1&rlkey=k%2F",
        ),
        ("https://example.org/x.zip?dl=0&sig=1", "https://example.org/x.zip?dl=0&sig=1"),
        ("https://example.org/x.zip", "https://example.org/x.zip"),
    ],
)
def test_links_to_other_places_are_left_as_they_are(link: str, direct: str) -> None:
    assert direct_link(link) == direct


def test_a_connection_cut_at_60_percent_is_gone_on_with_and_below_5_percent_is_fetched_twice(
    server: DropboxServer, tmp_path: Path
) -> None:
    server.faults = [Fault(cut=0.6), Fault(status=429, retry_after="1"), Fault(cut=0.6, reset=True), Fault(status=503)]
    path = fetch(server.put("chest.zip", CONTENT), tmp_path, settings(server))
    assert path.read_bytes() == CONTENT
    assert [r.status for r in server.content_requests()] == [200, 429, 206, 503, 206]
    twice = server.n_sent() / len(CONTENT) - 1
    print(f"bytes fetched twice: {100 * twice:.3f} %")
    assert twice < 0.05


def test_many_cuts_do_not_use_up_the_tries_while_the_file_grows(server: DropboxServer, tmp_path: Path) -> None:
    content = zip_bytes(16_000_000)
    server.faults = [Fault(cut=0.2) for _ in range(6)]
    path = fetch(server.put("chest.zip", content), tmp_path, settings(server, tries=1))
    assert path.read_bytes() == content
    assert server.n_sent() / len(content) < 1.05


def test_what_the_server_asks_to_wait_is_told_to_whoever_tries_again(server: DropboxServer, tmp_path: Path) -> None:
    server.faults = [Fault(cut=0.6), Fault(status=429, retry_after="3600")]
    with pytest.raises(OutsideError, match="answered 429") as caught:
        fetch_link(server.put("chest.zip", CONTENT), tmp_path, settings(server))
    assert caught.value.retry_after_s == 3600


def test_retry_after_may_be_a_date_and_nonsense_is_ignored() -> None:
    assert retry_after_s("120") == 120
    assert 50 < retry_after_s(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert retry_after_s("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert [retry_after_s(value) for value in ("soon", "-1", "", None)] == [0, 0, 0, 0]


def test_a_silent_server_is_left_and_tried_again(server: DropboxServer, tmp_path: Path) -> None:
    server.faults = [Fault(cut=0.5, stall_s=2)]
    path = fetch(server.put("chest.zip", CONTENT), tmp_path, settings(server, timeout_s=0.4))
    assert path.read_bytes() == CONTENT
    assert [r.status for r in server.content_requests()] == [200, 206]


def test_a_share_page_that_fails_for_a_while_is_tried_again(server: DropboxServer, tmp_path: Path) -> None:
    server.www_faults = [Fault(status=500), Fault(status=429)]
    assert fetch(server.put("chest.zip", CONTENT), tmp_path, settings(server)).read_bytes() == CONTENT


# -- never spliced -----------------------------------------------------------------------------------------------------


def change(server: DropboxServer) -> Any:
    return lambda: server.put("chest.zip", OTHER)


def test_a_file_changed_between_two_tries_is_started_over(server: DropboxServer, tmp_path: Path) -> None:
    server.faults = [Fault(cut=0.6), Fault(change=change(server))]
    path = fetch(server.put("chest.zip", CONTENT), tmp_path, settings(server))
    assert path.read_bytes() == OTHER
    assert [r.status for r in server.content_requests()] == [200, 200]


SPLICES = {
    "another ETag": Fault(ignore_if_range=True),
    "no ETag": Fault(ignore_if_range=True, no_etag=True),
    "the whole file": Fault(no_range=True),
}


@pytest.mark.parametrize("answer", SPLICES)
def test_a_part_of_another_version_is_never_appended(server: DropboxServer, tmp_path: Path, answer: str) -> None:
    fault = SPLICES[answer]
    server.faults = [Fault(cut=0.6), Fault(**{**vars(fault), "change": change(server)})]
    path = fetch(server.put("chest.zip", CONTENT), tmp_path, settings(server, tries=2))
    assert path.read_bytes() == OTHER


@pytest.mark.parametrize("off", [-1000, 1000])
def test_a_part_from_another_place_is_never_appended(server: DropboxServer, tmp_path: Path, off: int) -> None:
    server.faults = [Fault(cut=0.6), Fault(range_is_off_by=off)]
    path = fetch(server.put("chest.zip", CONTENT), tmp_path, settings(server, tries=2))
    assert path.read_bytes() == CONTENT
    assert [r.status for r in server.content_requests()] == [200, 206, 200]


def test_a_refused_range_starts_over(server: DropboxServer, tmp_path: Path) -> None:
    server.faults = [Fault(cut=0.6), Fault(status=416)]
    path = fetch(server.put("chest.zip", CONTENT), tmp_path, settings(server, tries=2))
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["none", "weak"])
def test_without_a_strong_etag_a_part_is_started_over(server: DropboxServer, tmp_path: Path, kind: str) -> None:
    server.sends_etag = server.weak_etag = kind == "weak"
    server.faults = [Fault(cut=0.6), Fault(cut=0.9)]
    path = fetch(server.put("chest.zip", CONTENT), tmp_path, settings(server))
    assert path.read_bytes() == CONTENT
    assert [r.status for r in server.content_requests()] == [200, 200, 200]


def test_a_server_that_never_tells_the_length_is_believed_only_up_to_its_end_mark(
    server: DropboxServer, tmp_path: Path
) -> None:
    server.chunked = True
    server.faults = [Fault(cut=0.6)]
    path = fetch(server.put("chest.zip", CONTENT), tmp_path, settings(server))
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("off", [-1000, 1000])
def test_a_wrong_length_ends_in_a_refusal_never_in_a_file(server: DropboxServer, tmp_path: Path, off: int) -> None:
    server.faults = [Fault(length_is_off_by=off) for _ in range(20)]
    refused(server, server.put("chest.zip", CONTENT), tmp_path)


def test_two_fetches_of_one_link_at_a_time_bring_one_whole_file(server: DropboxServer, tmp_path: Path) -> None:
    server.bytes_per_s = 20e6
    link = server.put("chest.zip", CONTENT)
    came: list[bytes] = []
    run = lambda: came.append(fetch(link, tmp_path, settings(server)).read_bytes())  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert came == [CONTENT, CONTENT]
    assert server.n_sent() == len(CONTENT)


# -- again, and after a kill -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knows_304", [True, False])
def test_an_unchanged_file_is_not_fetched_again(
    server: DropboxServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], knows_304: bool
) -> None:
    server.knows_304 = knows_304
    link = server.put("chest.zip", CONTENT)
    first = fetch(link, tmp_path, settings(server))
    stamp = first.stat().st_mtime_ns
    assert fetch(link.replace("dl=0", "dl=1"), tmp_path, settings(server)) == first
    assert "not fetched again" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == stamp
    assert server.content_requests()[-1].status == (304 if knows_304 else 200)


def test_a_changed_file_replaces_the_old_one(server: DropboxServer, tmp_path: Path) -> None:
    link = server.put("chest.zip", CONTENT)
    fetch(link, tmp_path, settings(server))
    server.put("chest.zip", OTHER)
    server.faults = [Fault(cut=0.6)]
    assert fetch(link, tmp_path, settings(server)).read_bytes() == OTHER
    assert server.n_sent() / (2 * len(CONTENT)) < 1.05
    assert files_in(tmp_path) == ["chest.zip", "chest.zip.json"]


def test_the_old_file_stays_whole_while_the_new_one_cannot_be_fetched(server: DropboxServer, tmp_path: Path) -> None:
    link = server.put("chest.zip", CONTENT)
    path = fetch(link, tmp_path, settings(server))
    server.put("chest.zip", OTHER)
    server.faults = [Fault(cut=0.6), *[Fault(status=503)] * 4]
    with pytest.raises(OutsideError, match="kept"):
        fetch(link, tmp_path, settings(server))
    assert path.read_bytes() == CONTENT


def test_a_file_with_the_expected_checksum_is_not_even_asked_for(server: DropboxServer, tmp_path: Path) -> None:
    link = server.put("chest.zip", CONTENT)
    expected = settings(server, sha256=hashlib.sha256(CONTENT).hexdigest())
    fetch(link, tmp_path, expected)
    n = len(server.requests)
    assert fetch(link, tmp_path, expected).read_bytes() == CONTENT
    assert len(server.requests) == n


def test_a_file_shortened_by_somebody_is_fetched_again(server: DropboxServer, tmp_path: Path) -> None:
    link = server.put("chest.zip", CONTENT)
    path = fetch(link, tmp_path, settings(server))
    os.truncate(path, 1000)
    assert fetch(link, tmp_path, settings(server)).read_bytes() == CONTENT


@pytest.mark.slow
def test_a_killed_process_is_gone_on_with_from_its_part(server: DropboxServer, tmp_path: Path) -> None:
    server.bytes_per_s = 1e6
    link = server.put("chest.zip", CONTENT)
    process = fetch_in_process(server, link, tmp_path)
    try:
        deadline = time.monotonic() + 30
        while server.n_sent() < 0.6 * len(CONTENT):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    server.bytes_per_s = None
    assert [n for n in files_in(tmp_path) if not n.startswith(".")] == ["chest.zip.part", "chest.zip.part.json"]
    assert fetch(link, tmp_path, settings(server)).read_bytes() == CONTENT
    twice = server.n_sent() / len(CONTENT) - 1
    print(f"bytes fetched twice after a kill: {100 * twice:.3f} %")
    assert twice < 0.05


def test_a_process_killed_before_the_last_renaming_fetches_nothing_twice(server: DropboxServer, tmp_path: Path) -> None:
    link = server.put("chest.zip", CONTENT)
    path = fetch(link, tmp_path, settings(server))
    for name in ("chest.zip", "chest.zip.json"):
        (path.parent / name).rename(path.parent / name.replace(".zip", ".zip.part"))
    assert fetch(link, tmp_path, settings(server)).read_bytes() == CONTENT
    assert server.n_sent() == len(CONTENT)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_size(server: DropboxServer, tmp_path: Path) -> None:
    peaks = []
    for megabytes in (8, 64):
        link = server.put(f"{megabytes}.zip", zip_bytes(megabytes * 1_000_000))
        out, _ = fetch_in_process(server, link, tmp_path).communicate(timeout=60)
        peaks.append(int(out.split()[-1]) / 1024)
    print(f"peak memory: {peaks[0]:.0f} MB fetching 8 MB, {peaks[1]:.0f} MB fetching 64 MB")
    assert abs(peaks[1] - peaks[0]) < 20


def test_progress_is_printed_at_each_quarter(
    server: DropboxServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(server.put("chest.zip", CONTENT), tmp_path, settings(server))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("%)")]
    assert [line.split("(")[1] for line in lines] == ["25 %)", "50 %)", "75 %)", "100 %)"]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "way_out"),
    [
        (401, "ask its owner"),
        (403, "ask its owner"),
        (404, "check the link"),
        (410, "removed"),
        (418, "check the link"),
    ],
)
@pytest.mark.parametrize("place", ["faults", "www_faults"])
def test_a_clear_no_is_said_at_once_with_the_way_out(
    server: DropboxServer, tmp_path: Path, status: int, way_out: str, place: str
) -> None:
    setattr(server, place, [Fault(status=status)])
    message = refused(server, server.put("chest.zip", CONTENT), tmp_path)
    assert str(status) in message
    assert way_out in message
    assert len(server.requests) == (1 if place == "www_faults" else 2)


def test_a_server_that_keeps_failing_is_left_after_the_tries(server: DropboxServer, tmp_path: Path) -> None:
    server.faults = [Fault(status=503) for _ in range(9)]
    message = refused(server, server.put("chest.zip", CONTENT), tmp_path)
    assert "503" in message
    assert "try again later" in message
    assert len(server.content_requests()) == 4


def test_a_wrong_checksum_is_refused_at_once_and_nothing_is_kept(server: DropboxServer, tmp_path: Path) -> None:
    message = refused(server, server.put("chest.zip", CONTENT), tmp_path, sha256="0" * 64)
    assert "ingestion.sha256" in message
    assert len(server.content_requests()) == 1
    assert files_in(tmp_path) == []


def test_a_web_page_instead_of_the_file_is_refused(server: DropboxServer, tmp_path: Path) -> None:
    server.faults = [Fault(html=True)]
    assert "web page" in refused(server, server.put("chest.zip", CONTENT), tmp_path)
    assert len(server.content_requests()) == 1


def test_what_is_no_zip_is_refused(server: DropboxServer, tmp_path: Path) -> None:
    assert "no zip" in refused(server, server.put("chest.zip", b"x" * 5000), tmp_path)


def test_more_than_the_limit_is_refused(server: DropboxServer, tmp_path: Path) -> None:
    server.chunked = True
    message = refused(server, server.put("chest.zip", CONTENT), tmp_path, max_unpacked_gb=0.001)
    assert "ingestion.max_unpacked_gb" in message
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("http://127.0.0.1/x.zip", "only https"),
        ("ftp://127.0.0.1/x.zip", "only https"),
        ("https://evil.example/x.zip", "evil.example"),
        ("https://localhost.evil.example/x.zip", "evil.example"),
        ("https://10.0.0.1/x.zip", "10.0.0.1"),
        ("https://somebody@127.0.0.1/x.zip", "user name"),
        ("https://[::1/x.zip", "did not arrive"),
        ("https://xn--/x.zip", "did not arrive"),
    ],
)
def test_a_redirect_out_of_bounds_is_refused(server: DropboxServer, tmp_path: Path, location: str, said: str) -> None:
    server.www_faults = [Fault(redirect=location)] * 4
    assert said in refused(server, server.put("chest.zip", CONTENT), tmp_path)
    assert {r.path for r in server.requests} == {"/scl/fi/abc123/chest.zip"}


def test_a_redirect_loop_is_refused(server: DropboxServer, tmp_path: Path) -> None:
    link = server.put("chest.zip", CONTENT)
    server.www_faults = [Fault(redirect=link) for _ in range(50)]
    assert "redirected too often" in refused(server, link, tmp_path)
    assert len(server.requests) == 11


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("http://localhost/x.zip", "only https"),
        ("https://example.org/x.zip?rlkey=secret", "example.org"),
        ("https://user:pass@localhost/x.zip", "user name"),
        ("https://[/x.zip", "not in ingestion.allowed_hosts"),
        ("https://xn--/x.zip", "cannot be read"),
        ("https://localhost:port/x.zip", "cannot be read"),
    ],
)
def test_a_link_out_of_bounds_is_refused_before_anything_is_asked(
    server: DropboxServer, tmp_path: Path, link: str, said: str
) -> None:
    message = refused(server, link, tmp_path)
    assert said in message
    assert "secret" not in message
    assert "pass" not in message
    assert server.requests == []


def test_a_certificate_of_an_unknown_authority_is_refused_with_the_way_out(
    server: DropboxServer, tmp_path: Path
) -> None:
    message = refused(server, server.put("chest.zip", CONTENT), tmp_path, ca_file=None)
    assert "ingestion.ca_file" in message
    assert server.requests == []


def test_a_certificate_file_that_cannot_be_read_is_named(server: DropboxServer, tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("no certificate")
    for name in ("missing.pem", "bad.pem"):
        message = refused(server, server.put("chest.zip", CONTENT), tmp_path, ca_file=str(tmp_path / name))
        assert f"ingestion.ca_file: {tmp_path / name}" in message


def test_a_folder_that_cannot_be_written_is_said(server: DropboxServer, tmp_path: Path) -> None:
    (tmp_path / "raw").write_text("a file")
    assert "storage.raw" in refused(server, server.put("chest.zip", CONTENT), tmp_path / "raw")


def test_neither_files_nor_lines_nor_logs_hold_the_secret_of_the_link(
    server: DropboxServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    server.faults = [Fault(cut=0.6), Fault(status=503), *[Fault(status=500)] * 4]
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore", "httpcore.connection", "httpcore.http11"):
        caplog.set_level(logging.DEBUG, name)
    with pytest.raises(OutsideError) as caught:
        fetch(server.put("chest.zip", CONTENT), tmp_path, settings(server))
    assert RLKEY not in "".join(capfd.readouterr()) + caplog.text
    assert RLKEY not in "".join(traceback.format_exception(caught.value))
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in kept if RLKEY in str(path) or RLKEY.encode() in path.read_bytes()] == []
    assert len(kept) == 2


@pytest.mark.slow
def test_a_flow_that_logs_all_of_httpx_prints_no_secret_of_a_link(
    server: DropboxServer, tmp_path: Path, api: str
) -> None:
    link = server.put("chest.zip", CONTENT)
    environment = {
        **os.environ,
        "PREFECT_LOGGING_LEVEL": "DEBUG",
        "PREFECT_LOGGING_ROOT_LEVEL": "DEBUG",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "httpx,httpcore,httpcore.connection,httpcore.http11",
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": api,
    }
    command = [sys.executable, "-c", FLOW, link, str(tmp_path / "raw"), json.dumps(options(server))]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    assert "fetched https://localhost/" in said and "Finished in state" in said
    assert RLKEY not in said


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("www.dropbox.com", True),
        ("uc1.dl.dropboxusercontent.com", True),
        ("dropboxusercontent.com", False),
        ("evildropboxusercontent.com", False),
        ("www.dropbox.com.evil.org", False),
        ("www.dropbox.com.", False),
        ("", False),
    ],
)
def test_only_named_hosts_are_allowed(host: str, allowed: bool) -> None:
    assert is_allowed(host, IngestionSettings().allowed_hosts) is allowed
