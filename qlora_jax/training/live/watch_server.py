"""The server of `watch`: the page at /, and the run's status as JSON at /run, for programs on this machine only.

No path of a request reaches the disk, and nothing changes a file. A request must name this server as its host, so that
a page from elsewhere cannot read the run by a name that it lets point here (DNS rebinding).
"""

import errno
import http.server
import json
import socket
from http import HTTPStatus

import xxhash

from qlora_jax.training.live.pages import watch_page
from qlora_jax.training.live.run_status import RunReader, RunStatus

IDLE_SECONDS = 30.0  # until a connection without a request ends
HEADERS = {
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class WatchServer(http.server.ThreadingHTTPServer):
    """Serves one run; `address` is that of its page."""

    def __init__(self, reader: RunReader, host: str, port: int):
        """Listens on a loopback address; port 0 is a free one.

        Raises:
          ValueError: the address cannot be used.
        """
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        status = reader.read()
        self.reader, self.page = reader, watch_page(status.name).encode()
        self._last = status, _json(status)
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            reason = error.strerror if error.errno != errno.EADDRINUSE else "another program listens on it"
            raise ValueError(f"port: {port} cannot be used on {host} ({reason}). Give another port") from None
        name = f"[{host}]" if ":" in host else host
        self.hosts = {f"{each}:{self.server_port}" for each in (name, "localhost")}
        self.address = f"http://{name}:{self.server_port}/"

    def status(self) -> bytes:
        """Returns the run's status as JSON."""
        status = self.reader.read()
        if status is not self._last[0]:
            self._last = status, _json(status)
        return self._last[1]


def _json(status: RunStatus) -> bytes:
    return json.dumps(status.to_json(), allow_nan=False).encode()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: WatchServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"The request is for another host.\n")
        elif self.path == "/":
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)
        elif self.path == "/run":
            self._answer(HTTPStatus.OK, "application/json", self.server.status())
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"Only / and /run exist here.\n")

    def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        tag = f'"{xxhash.xxh3_64_hexdigest(content)}"'
        if status == HTTPStatus.OK and self.headers.get("If-None-Match") == tag:
            status, content = HTTPStatus.NOT_MODIFIED, b""
        self.send_response(status)
        for name, value in {**HEADERS, "ETag": tag, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing: the terminal shows the run."""
