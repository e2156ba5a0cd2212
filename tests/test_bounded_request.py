"""Slow and endless servers, proxies and name servers: every request to them ends in time, at every place of a reply."""

import concurrent.futures
import contextlib
import functools
import itertools
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from qlora_jax import bounded_request
from qlora_jax.bounded_request import ReplyTooLarge, send
from qlora_jax.evaluation.lm_eval import preflight
from qlora_jax.openai_client import Endpoint, RequestFailed, RequestTimedOut, complete

SECONDS = 0.4
WATCHDOG = 30.0  # a test fails if a request takes as long
MAX_BYTES = 200_000
Outcome = type[BaseException] | None
PAUSE = 0.02
OK, CHUNKED = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LENGTH = b"Content-Length: 999999999\r\n\r\n"
# The bytes that a server sends first, and those that it repeats for ever, with a pause after each time.
SLOW = {
    "nothing": (b"", b""),
    "status line": (b"HTTP/1.1 2", b"0"),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "header": (OK + b"X: ", b"x"),
    "chunk size": (CHUNKED, b"0"),
    "chunk": (CHUNKED + b"fffffff\r\n", b"x"),
    "trailer": (CHUNKED + b"0\r\n", b"X: x\r\n"),
    "body": (OK + LENGTH, b"x"),
    "body without a length": (OK + b"\r\n", b"x"),
}
# The same without pauses.
FAST = {
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "trailer": (CHUNKED + b"0\r\n", b"X: x\r\n" * 1000),
    "chunks": (CHUNKED, b"1\r\nx\r\n" * 1000),
    "body without a length": (OK + b"\r\n", b"x" * 1000),
}


class Attacker:
    """Sends `start` to every client, then `again` for ever; `closed` counts the clients that have gone."""

    def __init__(self, start: bytes, again: bytes, pause: float):
        self._start, self._again, self._pause = start, again, pause
        self.closed = threading.Semaphore(0)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._attack, args=(client,), daemon=True).start()

    def _attack(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.recv(1 << 16)
            client.sendall(self._start)
            if not self._again:
                client.recv(1)  # until it goes
            for _ in itertools.count() if self._again else ():
                client.sendall(self._again)
                time.sleep(self._pause)
        self.closed.release()

    def close(self) -> None:
        self._server.close()


@contextlib.contextmanager
def attacker(start: bytes, again: bytes, pause: float = PAUSE) -> Iterator[Attacker]:
    server = Attacker(start, again, pause)
    try:
        yield server
    finally:
        server.close()


def read(response) -> bytes:
    return b"".join(iter(lambda: response.read1(1 << 16), b""))


def request(url: str, seconds: float = SECONDS) -> bytes:
    return send(urllib.request.Request(url), seconds, MAX_BYTES, read)


def outcome(call: Callable[[], object]) -> Outcome:
    """The type of the error that `call` raises; None without one. Fails if it takes too long."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        error = pool.submit(call).exception(WATCHDOG)
    finally:
        pool.shutdown(wait=False)
    return None if error is None else type(error)


def outcomes(attacks: dict[str, tuple[bytes, bytes]], pause: float, seconds: float) -> dict[str, Outcome]:
    """The error of a request to each of these servers, at the same time; every connection is closed after it."""
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(attacker(*attack, pause)) for name, attack in attacks.items()}
        calls = [functools.partial(request, f"http://{server.address}/", seconds) for server in servers.values()]
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(len(servers)))
        errors = dict(zip(servers, pool.map(outcome, calls), strict=True))
        assert all(server.closed.acquire(timeout=WATCHDOG) for server in servers.values())
    return errors


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_a_reply_that_is_slow_anywhere_ends_at_the_deadline():
    assert outcomes(SLOW, PAUSE, SECONDS) == dict.fromkeys(SLOW, TimeoutError)


def test_an_endless_reply_ends_at_its_limit_of_bytes():
    assert outcomes(FAST, 0.0, WATCHDOG) == dict.fromkeys(FAST, ReplyTooLarge)


def test_connecting_has_the_same_deadline(monkeypatch: pytest.MonkeyPatch):
    """To a name server that does not answer, TLS that never begins, and a proxy that is slow."""
    monkeypatch.setattr(bounded_request, "LAST_SECONDS", 0.1)
    with attacker(b"", b"") as silent, attacker(b"HTTP/1.1 200 OK\r\nX: ", b"x") as proxy:
        assert outcome(lambda: request(f"https://{silent.address}/")) is TimeoutError
        with monkeypatch.context() as patch:
            patch.setenv("https_proxy", f"http://{proxy.address}")
            assert outcome(lambda: request("https://127.0.0.1:9/")) is TimeoutError
        released = threading.Event()
        with monkeypatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", lambda *args, **settings: released.wait(2 * WATCHDOG) and [])
            assert outcome(lambda: request("http://far.invalid/")) is TimeoutError
            released.set()


def test_a_judge_s_endpoint_is_bounded_and_keeps_the_status_of_a_slow_error():
    def ask(address: str) -> str:
        endpoint = Endpoint(f"http://{address}/v1", "m", None, SECONDS)
        return complete(endpoint, "system", "user", temperature=0, max_tokens=1)

    with attacker(b"", SLOW["100 Continue"][1]) as slow, attacker(b"HTTP/1.1 401 No\r\n" + LENGTH, b"x") as refusing:
        assert outcome(lambda: ask(slow.address)) is RequestTimedOut
        with pytest.raises(RequestFailed, match=r"HTTP status 401: no text") as error:
            ask(refusing.address)
        assert error.value.refused


def test_the_check_of_the_hub_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "TIMEOUT", SECONDS)
    with attacker(*SLOW["100 Continue"]) as slow, attacker(b"nonsense\r\n", b"") as wrong:
        assert preflight.connection_problem(f"http://{slow.address}") == f"no reply within {SECONDS:g} s"
        assert "nonsense" in str(preflight.connection_problem(f"http://{wrong.address}"))
