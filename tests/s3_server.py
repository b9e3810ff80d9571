"""A real S3 server in the test process (moto's, over HTTP), and a proxy that fails a share of the requests to it."""

import os
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

PIECE = 1 << 16
FAULTS = ("500", "503", "reset", "stall")
CODES = {
    "500": "InternalError",
    "503": "SlowDown",
    "403": "AccessDenied",
    "400": "ExpiredToken",
    "301": "PermanentRedirect",
}
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "proxy-connection", "te", "upgrade"}
ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>{}</Message></Error>'
AWS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@lru_cache(maxsize=1)
def start_s3() -> str:
    """Starts the server of this process, once; its address."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


@contextmanager
def running_s3(objects: Mapping[str, Mapping[str, bytes]] | None = None) -> Iterator[str]:
    """Yields the server's address; what is made there meanwhile goes with the block.

    Args:
        objects: Buckets that are there from the start, and the objects in them by key; put without HTTP, which is
            several times as fast.
    """
    from moto.core.models import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    url, backend = start_s3(), s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    before = set(backend.buckets)
    for bucket, inside in (objects or {}).items():
        backend.create_bucket(bucket, "us-east-1")
        for key, body in inside.items():
            backend.put_object(bucket, key, body)
    try:
        yield url
    finally:
        for bucket in set(backend.buckets) - before:
            backend.buckets.pop(bucket, None)
            s3_backends.bucket_accounts.pop(bucket, None)


class FaultyProxy:
    """What a proxy does and what passed it.

    Attributes:
        url: Where it listens.
        share: Share of the requests that fail, 0 to 1; may be changed while it runs.
        faults: Which of the statuses in ``CODES``, ``reset`` (in the middle of the body), ``stall`` (the connection is
            silent for ``stall_s``), ``damage`` (one byte of the body differs), ``lost`` (done, but there is no answer)
            and ``down`` (reset at once) are drawn.
        only: Fails only requests whose method and path (``GET /bucket/key``) it is true for.
        before: Called with method and path before a request is passed on.
        expired: Access keys whose requests are refused with ``ExpiredToken``.
        seen: Access keys of all requests, with how many came with each.
        requests: Method and path (without query) of all requests, failed or not.
        ranges: ``Range`` header of those that had one.
        n_failed: Faults so far, by kind.
        n_bytes: Bytes of bodies sent to the client.
    """

    def __init__(self, target: str, share: float, seed: int, faults: Sequence[str], stall_s: float) -> None:
        self.url = ""
        self.target, self.share, self.faults, self.stall_s = urlsplit(target), share, tuple(faults), stall_s
        self.only: Callable[[str], bool] = lambda request: True
        self.before: Callable[[str], None] = lambda request: None
        self.expired: set[str] = set()
        self.seen: Counter[str] = Counter()
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.n_failed: Counter[str] = Counter()
        self.n_bytes = 0
        self.closing = threading.Event()
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def draw(self, request: str, part: str | None) -> str:
        """Notes a request and says how it shall fail; empty: not at all."""
        with self._lock:
            self.requests.append(request)
            self.ranges += [part] if part else []
            fails, kind = self._random.random() < self.share, self._random.choice(self.faults)
            if not (fails and self.only(request)):
                return ""
            self.n_failed[kind] += 1
            return kind

    def count(self, n_bytes: int) -> None:
        """Adds bytes that were sent."""
        with self._lock:
            self.n_bytes += n_bytes

    def fetched(self) -> list[str]:
        """Paths of the objects that were asked for, without listings and repetitions, sorted."""
        return sorted({r[4:] for r in self.requests if r.startswith("GET /") and r.count("/") > 1})

    def forget(self) -> None:
        """Starts the counts anew."""
        with self._lock:
            self.requests, self.ranges, self.n_failed, self.n_bytes = [], [], Counter(), 0


@contextmanager
def faulty_proxy(
    target: str, share: float = 0.1, seed: int = 7, faults: Sequence[str] = FAULTS, stall_s: float = 2.0
) -> Iterator[FaultyProxy]:
    """Passes HTTP requests of all methods on to ``target``, except for a seeded share that fails.

    Half of the requests that end in ``reset`` or ``stall`` did reach the server, as in life.
    """
    proxy = FaultyProxy(target, share, seed, faults, stall_s)

    class Handler(_Handler):
        state = proxy

    server = _Server(("127.0.0.1", 0), Handler)
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left in the middle is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FaultyProxy
    wbufsize = 1 << 16
    disable_nagle_algorithm = True
    upstream: HTTPConnection | None = None

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def handle_any(self) -> None:
        body = self.read_body()
        request = f"{self.command} {self.path.partition('?')[0]}"
        fault = self.state.draw(request, self.headers.get("Range"))
        self.state.before(request)
        access_key = self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]
        self.state.seen[access_key] += 1
        if access_key in self.state.expired:
            self.send_error_xml(400, "ExpiredToken")
        elif fault in CODES:
            self.send_error_xml(int(fault), CODES[fault])
        elif fault == "lost":
            self.ask(body).read()
            self.reset()
        elif fault == "down" or (fault == "reset" and self.command == "HEAD"):
            self.reset()
        elif fault == "stall":
            self.state.closing.wait(self.state.stall_s)
            self.reset()
        else:
            self.pass_on(body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_OPTIONS = handle_any

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()  # else boto3 waits a second for each upload
        return True

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def ask(self, body: bytes) -> HTTPResponse:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        headers |= {"Content-Length": str(len(body))} if body or self.command in ("PUT", "POST") else {}
        for again in (True, False):  # the server may have closed a connection that was kept
            if self.upstream is None:
                self.upstream = HTTPConnection(self.state.target.hostname or "", self.state.target.port, timeout=60)
                self.upstream.connect()
                self.upstream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                self.upstream.request(self.command, self.path, body or None, headers)
                return self.upstream.getresponse()
            except (OSError, HTTPException):
                self.upstream.close()
                self.upstream = None
                if not again:
                    raise
        raise AssertionError

    def pass_on(self, body: bytes, fault: str) -> None:
        answer = self.ask(body)
        length = answer.headers.get("Content-Length")
        whole = answer.read() if length is None else None
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in HOP_BY_HOP | {"content-length"}:
                self.send_header(name, value)
        total = len(whole) if whole is not None else int(length or 0)
        self.send_header("Content-Length", str(total))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = 0
        while piece := whole if whole is not None and not sent else answer.read(PIECE):
            if fault == "damage" and not sent:
                piece = bytes([piece[0] ^ 1]) + piece[1:]
            if fault == "reset" and 2 * (sent + len(piece)) >= total:
                self.wfile.write(piece[: max(0, total // 2 - sent)])
                self.wfile.flush()
                answer.close()
                self.upstream = None
                break
            self.wfile.write(piece)
            sent += len(piece)
        self.state.count(sent)
        if fault == "reset":
            self.reset()

    def send_error_xml(self, status: int, code: str) -> None:
        text = ERROR.format(code, "please try again").encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def reset(self) -> None:
        """Closes with RST instead of FIN: the client sees a reset connection, not a short answer."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.connection.close()
        self.close_connection = True


def set_aws(url: str) -> dict[str, str]:
    """The environment in which boto3 talks to a test server and to nobody else."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return {**kept, **AWS, "AWS_ENDPOINT_URL": url}
