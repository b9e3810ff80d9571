"""Proxies: sources are fetched through them, whatever kind they are of; this machine's own servers are not."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import getproxies

import httpx
import pytest
from dropbox_server import DropboxServer, zip_bytes
from test_share_link import fetch, settings
from tunnel_proxy import running_proxy

from tasks import LOOPBACK, pass_by_proxies

CONTENT = zip_bytes(300_000)
Fetch = Callable[[], bytes]
NAMES = [case(f"{scheme}_proxy") for scheme in ("http", "https", "all", "no") for case in (str.lower, str.upper)]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy variable, now and after the test."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[str]]]:
    with running_proxy() as found:
        yield found


@pytest.fixture
def fetched(dropbox: DropboxServer, tmp_path: Path) -> Fetch:
    return lambda: fetch(dropbox.put("chest.zip", CONTENT), tmp_path, settings(dropbox)).read_bytes()


@pytest.mark.parametrize(
    ("name", "scheme"), [("HTTPS_PROXY", "http"), ("all_proxy", "socks5"), ("ALL_PROXY", "socks5h")]
)
def test_a_link_is_fetched_through_the_proxy(
    name: str, scheme: str, fetched: Fetch, proxy: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, f"{scheme}://{proxy[0]}")
    assert fetched() == CONTENT
    assert proxy[1] and {place.partition(":")[0] for place in proxy[1]} <= {"localhost", "127.0.0.1"}


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_servers_on_this_machine_are_asked_past_every_proxy(
    name: str, scheme: str, fetched: Fetch, proxy: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, f"{scheme}://{proxy[0]}")
    pass_by_proxies()
    assert fetched() == CONTENT
    assert proxy[1] == []
    with httpx.Client() as client:
        patterns = [pattern.pattern for pattern, transport in client._mounts.items() if transport is None]
    assert {"all://127.0.0.1", "all://localhost", "all://[::1]"} <= set(patterns)


@pytest.mark.parametrize(
    ("given", "excepted"),
    [
        ({}, LOOPBACK),
        ({"NO_PROXY": "a.example, b"}, ("a.example", "b", *LOOPBACK)),
        ({"no_proxy": "localhost", "NO_PROXY": "other"}, LOOPBACK),
        ({"no_proxy": "*"}, ("*",)),
    ],
)
def test_exceptions_of_the_user_stay(
    given: dict[str, str], excepted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HTTP_PROXY": "http://proxy.example:3128", **given}.items():
        monkeypatch.setenv(name, value)
    pass_by_proxies()
    assert getproxies()["no"].split(",") == list(excepted)
    assert "*" in excepted or os.environ["NO_PROXY"] == os.environ["no_proxy"]


def test_where_no_proxy_is_set_nothing_is_changed() -> None:
    pass_by_proxies()
    assert not [name for name in NAMES if name in os.environ]
