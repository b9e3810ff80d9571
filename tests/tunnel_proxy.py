"""A proxy as hospitals have them: HTTP's CONNECT and SOCKS5 at one address; it notes where it was asked to go."""

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Tunnel(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        first = self.request.recv(1)
        try:
            host, port, answer = self._greet_socks() if first == b"\x05" else self._greet_http(first)
        except (OSError, ValueError, IndexError):
            return
        self.server.asked.append(f"{host}:{port}")  # type: ignore[attr-defined]
        with socket.create_connection((host, port)) as far:
            self.request.sendall(answer)
            back = threading.Thread(target=_pass_on, args=(far, self.request), daemon=True)
            back.start()
            _pass_on(self.request, far)
            back.join()

    def _greet_http(self, first: bytes) -> tuple[str, int, bytes]:
        head = first
        while b"\r\n\r\n" not in head:
            head += self.request.recv(1) or b"\r\n\r\n"
        host, _, port = head.split()[1].decode().rpartition(":")
        return host, int(port), b"HTTP/1.1 200 OK\r\n\r\n"

    def _greet_socks(self) -> tuple[str, int, bytes]:
        self.request.recv(self.request.recv(1)[0])
        self.request.sendall(b"\x05\x00")
        kind = self.request.recv(4)[3]
        host = (
            socket.inet_ntoa(self.request.recv(4)) if kind == 1 else self.request.recv(self.request.recv(1)[0]).decode()
        )
        return host, int.from_bytes(self.request.recv(2), "big"), b"\x05\x00\x00\x01" + bytes(6)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return


@contextmanager
def running_proxy() -> Iterator[tuple[str, list[str]]]:
    """Its ``host:port``, and the places that it was asked for so far."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Tunnel) as server:
        server.daemon_threads = True
        server.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", server.asked  # type: ignore[attr-defined]
        server.shutdown()
