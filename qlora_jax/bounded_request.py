"""HTTP requests that are bounded as a whole, in time and in size.

The timeout of a socket starts anew with each byte, and that of Python's HTTP client with each address of a host. Name
resolution has none. So a request runs in a thread that is waited for, and its reads share one deadline.
"""

import concurrent.futures
import functools
import http.client
import io
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

LAST_SECONDS = 1.0  # after the deadline, for a read that it has ended to be reported


class ReplyTooLarge(http.client.HTTPException):
    """A reply, with its headers, that is larger than the limit."""


def send[T](
    request: urllib.request.Request, seconds: float, max_bytes: int, read: Callable[[http.client.HTTPResponse], T]
) -> T:
    """Sends a request, and returns what `read` makes of its response, whatever the status. Follows no redirect.

    The proxies of the environment apply.

    Args:
      seconds: for all of it, from the resolution of the host's name to the last byte.
      max_bytes: of the reply, headers included.
      read: called in another thread.

    Raises:
      TimeoutError: the time is over.
      urllib.error.URLError: the connection fails.
      OSError, http.client.HTTPException: the reply broke off, is not one of HTTP, or is too large (ReplyTooLarge).
    """
    opener, deadline = urllib.request.OpenerDirector(), time.monotonic() + seconds
    for handler in (urllib.request.ProxyHandler(), urllib.request.UnknownHandler(), _Handler(deadline, max_bytes)):
        opener.add_handler(handler)
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            with opener.open(request, timeout=seconds) as response:
                found = read(response)
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(found)

    # A daemon, because a name server may keep it for longer, which must not delay the end of the process.
    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(seconds + LAST_SECONDS)
    except urllib.error.URLError as error:
        raise (error.reason if isinstance(error.reason, TimeoutError) else error) from None


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections whose responses are bounded, also those of proxies."""

    def __init__(self, deadline: float, max_bytes: int):
        super().__init__()
        self._response = functools.partial(_Response, deadline=deadline, max_bytes=max_bytes)

    def do_open(self, http_class, req, **http_conn_args):
        def connection(*args, **settings) -> http.client.HTTPConnection:
            made = http_class(*args, **settings)
            made.response_class = self._response  # pyright: ignore[reportAttributeAccessIssue]: it is only called
            return made

        return super().do_open(connection, req, **http_conn_args)


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args, deadline: float, max_bytes: int, **settings):
        super().__init__(sock, *args, **settings)
        self.fp = io.BufferedReader(_BoundedReader(sock, self.fp, deadline, max_bytes))


class _BoundedReader(io.RawIOBase):
    """Reads a socket's file until the deadline, and no more than `max_bytes`."""

    def __init__(self, sock: socket.socket, file: io.BufferedReader, deadline: float, max_bytes: int):
        self._sock, self._file, self._deadline, self._left = sock, file.detach(), deadline, max_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        self._sock.settimeout(seconds)
        count = self._file.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise ReplyTooLarge
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
