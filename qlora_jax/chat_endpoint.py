"""One request to an OpenAI-compatible endpoint."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from qlora_jax.bounded_request import ReplyTooLarge, send
from qlora_jax.metadata import MetadataError, decode_json, shorten

MAX_BYTES = 8 << 20  # largest reply
MAX_ERROR_BYTES = 2000
BLOCK = 64 << 10
RETRIED_STATUS = (408, 409, 425, 429)  # also 5xx; retrying any other status is useless
REFUSED_STATUS = (401, 403, 404)  # every request to this endpoint would fail


class _Message(TypedDict):
    content: str | None


class _Choice(TypedDict):
    message: _Message


class _Completion(TypedDict):
    choices: Sequence[_Choice]


class Endpoint(NamedTuple):
    """An endpoint, and the settings of its replies.

    Fields:
      url: address of the service up to /v1.
      key: sent as a bearer token; None for none.
      timeout: seconds for the whole request, from the resolution of the host's name to the last byte.
    """

    url: str
    model: str
    key: str | None
    temperature: float
    max_tokens: int
    timeout: float


class RequestFailed(Exception):
    """A request without a reply.

    Attributes:
      retry: False if the same request will fail again.
      refused: True if every request will fail.
      wait: seconds after which the service wants to be asked again; None if it does not say.
    """

    def __init__(self, problem: str, *, retry: bool = True, refused: bool = False, wait: float | None = None):
        super().__init__(problem)
        self.retry, self.refused, self.wait = retry, refused, wait


class RequestTimedOut(RequestFailed):
    """A request whose reply did not come in time."""


def complete(endpoint: Endpoint, system: str, user: str) -> str:
    """Returns the reply to a system message and a user's message.

    Raises:
      RequestFailed: the endpoint sent an error, or nothing; RequestTimedOut if it did not reply in time.
    """
    content = _send(endpoint, _request(endpoint, system, user))
    try:
        found = decode_json(content, _Completion, "reply")
    except MetadataError as error:
        raise RequestFailed(f"not a chat completion: {' '.join(str(error).split())}") from None
    if not found["choices"]:
        raise RequestFailed("not a chat completion: found no choices")
    return found["choices"][0]["message"]["content"] or ""


def _request(endpoint: Endpoint, system: str, user: str) -> urllib.request.Request:
    body = {
        "model": endpoint.model,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        "temperature": endpoint.temperature,
        "max_tokens": endpoint.max_tokens,
    }
    headers = {"Content-Type": "application/json"}
    if endpoint.key is not None:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    return urllib.request.Request(f"{endpoint.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)


def _send(endpoint: Endpoint, request: urllib.request.Request) -> bytes:
    try:
        return send(request, endpoint.timeout, MAX_BYTES, _read)
    except TimeoutError:
        raise RequestTimedOut(f"no reply within {endpoint.timeout:g} s") from None
    except urllib.error.URLError as error:
        raise RequestFailed(f"no connection: {error.reason}") from None
    except http.client.InvalidURL:  # its text would show a password in the address
        raise RequestFailed(
            "not the address of a host (found a user name, or a port that is not a number)", refused=True
        ) from None
    except ReplyTooLarge:
        raise RequestFailed(f"the reply is too large (found more than {MAX_BYTES} bytes)", retry=False) from None
    except (OSError, http.client.HTTPException) as error:
        raise RequestFailed(f"the connection broke: {error!r}") from None


def _read(response: http.client.HTTPResponse) -> bytes:
    """Reads to the end, by blocks, because a length in the headers may be any number."""
    if not 200 <= response.status < 300:
        raise _status_problem(response)
    blocks = []
    while block := response.read1(BLOCK):
        blocks.append(block)
    return b"".join(blocks)


def _status_problem(response: http.client.HTTPResponse) -> RequestFailed:
    status, wait = response.status, response.headers.get("Retry-After", "")
    try:
        text = shorten(response.read(MAX_ERROR_BYTES).decode("utf-8", "replace"))
    except (OSError, http.client.HTTPException):
        text = "no text"
    return RequestFailed(
        f"HTTP status {status}: {text}",
        retry=status in RETRIED_STATUS or status >= 500,
        refused=status in REFUSED_STATUS or 300 <= status < 400,
        wait=float(wait) if wait.isascii() and wait.isdigit() else None,
    )
