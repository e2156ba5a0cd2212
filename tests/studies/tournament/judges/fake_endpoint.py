"""An OpenAI-compatible endpoint on this machine, which answers, fails or stalls as a test says."""

import collections
import contextlib
import http.server
import json
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """A reply: a review, a status or any bytes; after `seconds`, and each byte `trickle` seconds after the last."""

    review: str = ""
    status: int = 200
    body: bytes | None = None
    headers: Mapping[str, str] = types.MappingProxyType({})
    seconds: float = 0
    trickle: float = 0


Plan = Callable[[str, int], Answer]  # the user's message or the prompt, the number of requests with it before


class FakeEndpoint(http.server.ThreadingHTTPServer):
    """The server; `requests` are the bodies that it received, `keys` their Authorization headers.

    Attributes:
      most: the largest number of requests that waited for a reply at the same time.
    """

    daemon_threads = True

    def __init__(self, plan: Plan):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan, self.lock = plan, threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.seen: collections.Counter[str] = collections.Counter()
        self.running = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client that does not wait for the reply closes the connection."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FakeEndpoint
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == ("/v1/chat/completions" if "messages" in body else "/v1/completions")
        with self.server.lock:
            message = body["messages"][-1]["content"] if "messages" in body else json.dumps(body["prompt"])
            before = self.server.seen[message]
            self.server.seen[message] += 1
            self.server.requests.append(body)
            self.server.keys.append(self.headers["Authorization"])
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
        try:
            answer = self.server.plan(message, before)
            time.sleep(answer.seconds)
        finally:  # before the reply: a client that has it may send the next request at once
            with self.server.lock:
                self.server.running -= 1
        self._answer(answer)

    def _answer(self, answer: Answer) -> None:
        completion = {"choices": [{"message": {"role": "assistant", "content": answer.review}}]}
        body = json.dumps(completion).encode() if answer.body is None else answer.body
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for byte in body[: 1000 if answer.trickle else 0]:
            self.wfile.write(bytes([byte]))
            time.sleep(answer.trickle)
        if not answer.trickle:
            self.wfile.write(body)

    def log_message(self, format, *args):
        """Prints nothing."""


@contextlib.contextmanager
def fake_endpoint(plan: Plan) -> Iterator[FakeEndpoint]:
    """Serves until the block ends."""
    with FakeEndpoint(plan) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
