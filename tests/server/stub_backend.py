"""A stand-in for the server behind the chat page: it streams set replies, and remembers what it was asked."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from qlora_jax.server.page import chat_page
from qlora_jax.training.live.run_status import run_status

KEY = "secret"
RUN_MODEL, BASE = "mine", "base-1b"
HOSTILE = "<img src=x onerror=\"document.title='ran'\"> </script> **bold**\n\tcode"


class Backend(http.server.ThreadingHTTPServer):
    """Serves the page and the endpoints that it asks.

    Attributes:
      run: the folder that /runs/mine shows.
      needs_key: True if requests need the key.
      requests: bodies of the chat requests.
      left: the number of streams that the client ended.
    """

    daemon_threads = True

    def __init__(self, run: Path, needs_key: bool = False):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.run, self.needs_key, self.left = run, needs_key, 0
        self.requests: list[dict] = []
        self.paths: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Backend  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.path == "/":
            self._send(200, chat_page().encode(), "text/html")
        elif self._is_allowed() and self.path == "/v1/models":
            models = [{"id": BASE, "parent": None}, {"id": RUN_MODEL, "parent": BASE}]
            self._json(200, {"object": "list", "data": models})
        elif self._is_allowed() and self.path == f"/runs/{RUN_MODEL}":
            self._json(200, run_status(self.server.run).to_json())
        else:
            self._refuse()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            self._refuse()
            return
        self.server.requests.append(request)
        prompt = request["messages"][-1]["content"]
        if prompt == "fail":
            self._json(400, {"error": {"message": "temperature: found 9, expected at most 2. Lower it.", "code": None}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream(request["model"], prompt)
        except OSError:
            self.server.left += 1

    def _stream(self, model: str, prompt: str) -> None:
        endless = prompt == "endless"
        deltas = [{"role": "assistant"}, {"reasoning_content": "I think "}, {"reasoning_content": "hard."}]
        deltas += [{"content": piece} for piece in (f"{model}: ", HOSTILE, *["word "] * (10_000 if endless else 3))]
        for number, delta in enumerate(deltas):
            self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            time.sleep(0.02 if number < 8 else 0.1)
            if prompt == "break" and number == 4:
                self._event({"error": {"message": "the engine stopped"}})
                return
            if prompt == "cut" and number == 4:
                return
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        self._event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 42, "total_tokens": 45}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict) -> None:
        self.wfile.write(f": ping\r\n\r\ndata: {json.dumps(event)}\r\n\r\n".encode())
        self.wfile.flush()

    def _is_allowed(self) -> bool:
        return not self.server.needs_key or self.headers.get("Authorization") == f"Bearer {KEY}"

    def _refuse(self) -> None:
        if self._is_allowed():
            self._json(404, {"error": {"message": "not found"}})
        else:
            self._json(401, {"error": {"message": "API key: missing. Send it."}})

    def _json(self, status: int, content: dict) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def backend(run: Path, *, needs_key: bool = False) -> Iterator[Backend]:
    """Yields a running backend."""
    with Backend(run, needs_key) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
