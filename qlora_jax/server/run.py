"""Runs the application with uvicorn, until a signal or in a thread."""

import socket
import threading
import time

import uvicorn
from sse_starlette.sse import AppStatus
from starlette.types import ASGIApp

from qlora_jax.server.service import Service

BACKLOG = 2048
START_SECONDS = 30.0
KEEP_ALIVE_SECONDS = 75


class Server:
    """A server of an application.

    Attributes:
      url: address that clients use, without /v1.
      models: names of the models at the start.
    """

    def __init__(self, app: ASGIApp, service: Service, host: str, port: int, stop_seconds: int):
        """Opens the port.

        Raises:
          OSError: the address is taken, or not one of this machine.
        """
        # Streams end when their replies do; this library would end them at once.
        AppStatus.disable_automatic_graceful_drain()
        self._service = service
        self.models = [model.name for model in service.models]
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=BACKLOG)
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=stop_seconds,
        )
        self._server = uvicorn.Server(config)
        service.thread.on_failure = self._end
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Answers requests until SIGINT or SIGTERM; raises the error that ends the engine."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()
        if self._service.thread.failure is not None:
            raise self._service.thread.failure

    def start(self) -> "Server":
        """Answers requests in a thread, and returns once it does."""
        self._thread = threading.Thread(target=self.run, name="server", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the server did not start. Its error is above")
            time.sleep(0.01)
        return self

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _end(self) -> None:
        self._server.should_exit = True

    def stop(self) -> None:
        """Ends the server that `start` started: running requests finish first, within their limit."""
        self._end()
        if self._thread is not None:
            self._thread.join()
