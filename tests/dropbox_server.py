"""A local HTTPS server that behaves like Dropbox: shared links, their content, and the private files of an account.

Two ports: ``localhost:{www}`` answers share links with redirects, ``127.0.0.1:{content}`` sends what is behind them and
is the API of the account. Faults are scripted: each content request takes the first of ``server.faults``.
"""

import datetime
import hashlib
import ipaddress
import json
import socket
import ssl
import struct
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

RLKEY = "rlkey-that-nobody-may-see"
TOKEN = "token-that-nobody-may-see"
PIECE = 1 << 14


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request; the fields can be combined.

    Attributes:
        status: Answered instead of the content.
        retry_after: ``Retry-After`` header, as it is.
        redirect: ``Location`` of a redirect instead of the content.
        cut: The connection ends after this share of the body.
        reset: The cut is a TCP reset instead of a plain end.
        stall_s: Silence after the cut's share of the body, before the connection ends.
        change: Called before the answer, to change files between two tries.
        no_etag: ``ETag`` is left out.
        length_is_off_by: Added to ``Content-Length``.
        range_is_off_by: The part that is sent begins so much later than the one asked for, and says so.
        ignore_if_range: A part is sent although the file has changed.
        html: A web page instead of the content, as 200.
        no_range: The whole file is sent although a part is asked for.
    """

    status: int | None = None
    retry_after: str | None = None
    redirect: str | None = None
    cut: float | None = None
    reset: bool = False
    stall_s: float = 0.0
    change: Callable[[], object] | None = None
    no_etag: bool = False
    length_is_off_by: int = 0
    range_is_off_by: int = 0
    ignore_if_range: bool = False
    html: bool = False
    no_range: bool = False


@dataclass
class Request:
    """One request as it was seen; ``n_sent`` counts the bytes of the body."""

    place: str
    path: str
    query: str
    headers: dict[str, str]
    time: float
    status: int = 0
    n_sent: int = 0


@dataclass
class File:
    """What is behind a share link."""

    content: bytes
    modified: float

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:24]}"'


@dataclass
class DropboxServer:
    """The state of a running server; its attributes may be changed at any time.

    Attributes:
        ca_file: PEM file of the authority to trust.
        www_port: Port of the share links, on ``localhost``.
        content_port: Port of the content and of the API, on ``127.0.0.1``.
        faults: Taken one by one by the content requests (and downloads of the API).
        www_faults: Taken one by one by the requests for share links.
        api_faults: Taken one by one by the other requests of the API.
        requests: All requests so far.
        private: The account's files by path, ``/folder/file``.
        sends_etag, weak_etag, sends_date, knows_304, chunked: How the content is served.
        bytes_per_s: Slows the content down.
        page_size: Entries in a page of the API's listing.
    """

    ca_file: Path
    www_port: int = 0
    content_port: int = 0
    files: dict[str, File] = field(default_factory=dict)
    private: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault | None] = field(default_factory=list)
    www_faults: list[Fault | None] = field(default_factory=list)
    api_faults: list[Fault | None] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    sends_etag: bool = True
    weak_etag: bool = False
    sends_date: bool = True
    knows_304: bool = True
    chunked: bool = False
    bytes_per_s: float | None = None
    page_size: int = 3
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        """Forgets all but where it listens."""
        vars(self).update(vars(DropboxServer(self.ca_file, self.www_port, self.content_port)))

    def put(self, name: str, content: bytes, age_s: float = 3600) -> str:
        """Puts a file behind a share link, or another one in its place; returns the link."""
        self.files[name] = File(content, time.time() - age_s)
        return f"https://localhost:{self.www_port}/scl/fi/abc123/{name}?rlkey={RLKEY}&st=x%2By&dl=0"

    @property
    def hosts(self) -> tuple[str, ...]:
        """What ``allowed_hosts`` has to hold."""
        return ("localhost", "127.0.0.1")

    @property
    def sdk_environment(self) -> dict[str, str]:
        """Environment variables that lead the ``dropbox`` package here; it reads them when it is imported."""
        host = f"127.0.0.1:{self.content_port}"
        return {"DROPBOX_API_HOST": host, "DROPBOX_API_CONTENT_HOST": host}

    def content_requests(self) -> list[Request]:
        """The requests for content so far."""
        return [request for request in self.requests if request.place == "content"]

    def n_sent(self) -> int:
        """Bytes of content sent so far."""
        return sum(request.n_sent for request in self.content_requests())

    def take(self, faults: list[Fault | None]) -> Fault:
        with self.lock:
            fault = (faults.pop(0) if faults else None) or Fault()
        if fault.change:
            fault.change()
        return fault


@contextmanager
def running_server(folder: Path) -> Iterator[DropboxServer]:
    """Runs the server; ``folder`` receives its certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca_file, chain = write_certificates(folder)
    context.load_cert_chain(chain)
    state = DropboxServer(ca_file)
    www, content = (_Server(("127.0.0.1", 0), handler, state, context) for handler in (_Www, _Content))
    state.www_port, state.content_port = www.server_address[1], content.server_address[1]
    for server in (www, content):
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield state
    finally:
        for server in (www, content):
            server.shutdown()
            server.server_close()


def zip_bytes(n_bytes: int, seed: int = 0) -> bytes:
    """A zip of about so many bytes that do not compress; another seed, another content of the same size."""
    import io

    import numpy as np

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        info = zipfile.ZipInfo("noise.bin", (2024, 1, 1, 0, 0, 0))
        archive.writestr(info, np.random.default_rng(seed).bytes(n_bytes))
    return stream.getvalue()


def dropbox_hash(content: bytes) -> str:
    """Dropbox's content hash."""
    blocks = (content[i : i + (4 << 20)] for i in range(0, len(content), 4 << 20))
    return hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).hexdigest()


def write_certificates(folder: Path) -> tuple[Path, Path]:
    """Writes an authority, and a key with its certificate for localhost and 127.0.0.1; returns both files.

    With the usage and the identifiers of keys that RFC 5280 asks for, and Python from 3.13 on.
    """
    now = datetime.datetime.now(datetime.UTC)

    def build(name: str, key: ec.EllipticCurvePrivateKey, issuer: str, is_authority: bool) -> x509.CertificateBuilder:
        signs = dict.fromkeys(("key_cert_sign", "crl_sign"), is_authority)
        others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
        usage = signs | dict.fromkeys((*others, "encipher_only", "decipher_only"), False)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        )

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = build("Test authority", ca_key, "Test authority", True).sign(ca_key, hashes.SHA256())
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))])
    certificate = build("localhost", key, "Test authority", False).add_extension(names, critical=False)
    pem = serialization.Encoding.PEM
    ca_file, chain = folder / "authority.pem", folder / "server.pem"
    ca_file.write_bytes(authority.public_bytes(pem))
    chain.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.sign(ca_key, hashes.SHA256()).public_bytes(pem)
    )
    return ca_file, chain


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: Any, state: DropboxServer, context: ssl.SSLContext) -> None:
        super().__init__(address, handler)
        self.state = state
        self.context = context

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Cut connections are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    place = ""
    server: _Server

    def setup(self) -> None:
        # In the connection's own thread, so that a client that fails the handshake holds up nobody.
        self.request = self.server.context.wrap_socket(self.request, server_side=True)
        super().setup()

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()
        self.request.close()

    def log_message(self, *args: object) -> None:
        """Silence."""

    @property
    def state(self) -> DropboxServer:
        return self.server.state

    def see(self) -> Request:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.seen = Request(self.place, parts.path, parts.query, headers, time.monotonic())
        with self.state.lock:
            self.state.requests.append(self.seen)
        return self.seen

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"", fault: Fault | None = None) -> None:
        fault = fault or Fault()
        self.seen.status = status
        self.close_connection = True
        self.send_response(status)
        chunked = headers.get("Transfer-Encoding") == "chunked"
        if not chunked:
            headers = {**headers, "Content-Length": str(len(body) + fault.length_is_off_by)}
        for name, value in {**headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        stop = len(body) if fault.cut is None else int(fault.cut * len(body))
        for start in range(0, stop, PIECE):
            piece = body[start : min(start + PIECE, stop)]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            self.seen.n_sent += len(piece)
            if self.state.bytes_per_s:
                time.sleep(len(piece) / self.state.bytes_per_s)
        time.sleep(fault.stall_s)
        if fault.cut is not None:
            if fault.reset:
                time.sleep(0.1)  # what was sent shall arrive first
                self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                self.request.shutdown(socket.SHUT_RDWR)
        elif chunked:
            self.wfile.write(b"0\r\n\r\n")

    def answer_fault(self, fault: Fault) -> bool:
        """Answers what needs no content; returns whether it did."""
        after = {"Retry-After": fault.retry_after} if fault.retry_after else {}
        if fault.redirect is not None:
            self.answer(302, {"Location": fault.redirect, **after})
        elif fault.status is not None:
            self.answer(fault.status, {"Content-Type": "text/plain", **after}, b"no")
        elif fault.html:
            self.answer(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>Sign in</html>")
        else:
            return False
        return True


class _Www(_Handler):
    """Share links: ``/s/…`` goes to ``/scl/…`` by a relative redirect, and that to the content."""

    place = "www"

    def do_GET(self) -> None:
        seen = self.see()
        if self.answer_fault(self.state.take(self.state.www_faults)):
            return
        query = parse_qs(seen.query)
        name = seen.path.split("/")[-1]
        if seen.path.startswith("/s/"):
            self.answer(301, {"Location": f"/scl/fi/abc123/{name}?{seen.query}"})
        elif name not in self.state.files:
            self.answer(404, {}, b"no")
        elif query.get("rlkey") != [RLKEY]:
            self.answer(403, {}, b"no")
        elif query.get("dl") != ["1"]:
            self.answer(200, {"Content-Type": "text/html"}, b"<html>a preview</html>")
        else:
            base = f"https://127.0.0.1:{self.state.content_port}"
            self.answer(302, {"Location": f"{base}/cd/0/get/{len(self.state.requests)}/file/{name}?dl=1"})


class _Content(_Handler):
    """What is behind a share link, with conditions and ranges as in RFC 9110; and the API of the account."""

    place = "content"

    def do_GET(self) -> None:
        seen = self.see()
        fault = self.state.take(self.state.faults)
        if self.answer_fault(fault):
            return
        file = self.state.files[seen.path.split("/")[-1]]
        etag = f"W/{file.etag}" if self.state.weak_etag else file.etag
        modified = formatdate(file.modified, usegmt=True)
        headers = {"Content-Type": "application/zip", "Accept-Ranges": "bytes"}
        if self.state.sends_etag and not fault.no_etag:
            headers["ETag"] = etag
        if self.state.sends_date:
            headers["Last-Modified"] = modified
        asked = seen.headers
        unchanged = asked.get("if-none-match", "") == etag or (
            "if-none-match" not in asked and asked.get("if-modified-since") == modified
        )
        if unchanged and self.state.knows_304:
            self.answer(304, headers)
            return
        body, status = file.content, 200
        start = range_start(asked.get("range"))
        if start is not None and not fault.no_range and not self.state.chunked:
            if start >= len(body) and asked.get("if-range") in (etag, modified):
                self.answer(416, {"Content-Range": f"bytes */{len(body)}"})
                return
            if asked.get("if-range") in (None, etag, modified) or fault.ignore_if_range:
                first = start + fault.range_is_off_by
                headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
                body, status = body[first:], 206
        if self.state.chunked:
            headers["Transfer-Encoding"] = "chunked"
        self.answer(status, headers, body, fault)

    def do_POST(self) -> None:
        seen = self.see()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        is_download = seen.path == "/2/files/download"
        seen.place = "content" if is_download else "api"
        fault = self.state.take(self.state.faults if is_download else self.state.api_faults)
        if self.answer_fault(fault):
            return
        if seen.headers.get("authorization") != f"Bearer {TOKEN}":
            self.answer_json(401, {"error": {".tag": "invalid_access_token"}, "error_summary": "invalid_access_token/"})
        elif is_download:
            self.send_private(json.loads(seen.headers["dropbox-api-arg"])["path"], fault)
        elif seen.path == "/2/files/get_metadata":
            self.send_metadata(json.loads(body)["path"])
        elif seen.path.startswith("/2/files/list_folder"):
            self.send_page(json.loads(body))

    def answer_json(self, status: int, value: object) -> None:
        self.answer(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def entries(self, root: str) -> list[dict[str, Any]]:
        """Folders and files below a path; the case of folder names in ``path_display`` is not to be relied on."""
        below = [path for path in self.state.private if path.lower().startswith(f"{root.lower()}/")]
        folders = {parent for path in below for parent in parents(path)}
        folders = {folder for folder in folders if f"{folder.lower()}/".startswith(f"{root.lower()}/")}
        made = [folder_entry(path) for path in folders if path] + [self.file_entry(path) for path in below]
        return sorted(made, key=lambda entry: entry["path_lower"])

    def file_entry(self, path: str) -> dict[str, Any]:
        content = self.state.private[path]
        return {
            ".tag": "file",
            "name": path.rsplit("/", 1)[-1],
            "id": "id:" + hashlib.sha256(path.encode()).hexdigest()[:22],
            "client_modified": "2024-01-01T00:00:00Z",
            "server_modified": "2024-01-01T00:00:00Z",
            "rev": revision(path, content),
            "size": len(content),
            "path_lower": path.lower(),
            "path_display": path.lower(),
            "content_hash": dropbox_hash(content),
            "is_downloadable": True,
        }

    def send_metadata(self, path: str) -> None:
        found = [p for p in self.state.private if p.lower() == path.lower()]
        if found:
            self.answer_json(200, self.file_entry(found[0]))
        elif self.entries(path):
            self.answer_json(200, folder_entry(path))
        else:
            self.answer_json(409, {"error": {".tag": "path", "path": {".tag": "not_found"}}, "error_summary": "path/"})

    def send_page(self, asked: dict[str, Any]) -> None:
        root, start = json.loads(asked["cursor"]) if "cursor" in asked else (asked["path"], 0)
        entries = self.entries(root)
        end = start + self.state.page_size
        page = {"entries": entries[start:end], "cursor": json.dumps([root, end]), "has_more": end < len(entries)}
        self.answer_json(200, page)

    def send_private(self, wanted: str, fault: Fault) -> None:
        path = next((p for p, content in self.state.private.items() if wanted == f"rev:{revision(p, content)}"), None)
        if path is None:
            self.answer_json(409, {"error": {".tag": "path", "path": {".tag": "not_found"}}, "error_summary": "path/"})
            return
        body, status = self.state.private[path], 200
        headers = {"Content-Type": "application/octet-stream", "Dropbox-API-Result": json.dumps(self.file_entry(path))}
        start = range_start(self.seen.headers.get("range"))
        if start is not None and not fault.no_range:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, status = body[start:], 206
        self.answer(status, headers, body, fault)


def range_start(value: str | None) -> int | None:
    """The first byte that a Range header asks for."""
    return int(value.removeprefix("bytes=").removesuffix("-")) if value else None


def revision(path: str, content: bytes) -> str:
    """A revision as Dropbox makes them: hex digits, another one for each content."""
    return hashlib.sha256(path.encode() + content).hexdigest()[:16]


def parents(path: str) -> list[str]:
    """All folders above a path."""
    parts = path.split("/")[:-1]
    return ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]


def folder_entry(path: str) -> dict[str, Any]:
    """A folder in the API's words."""
    name = path.rsplit("/", 1)[-1]
    return {".tag": "folder", "name": name, "id": "id:f", "path_lower": path.lower(), "path_display": path.lower()}
