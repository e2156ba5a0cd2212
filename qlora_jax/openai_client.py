"""Requests to an OpenAI-compatible endpoint: a reply to a chat, or the likeliest tokens along a text."""

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypedDict

from qlora_jax.bounded_request import ReplyTooLarge, send
from qlora_jax.untrusted_json import MetadataError, decode_json, shorten

MAX_BYTES = 8 << 20  # largest reply to a chat
SCORE_BYTES = 256  # most bytes of one log-probability in a reply, which vLLM writes twice
TOKEN_ID = "token_id:"  # begins the names of tokens in replies, with vLLM's field return_tokens_as_token_ids
MAX_ERROR_BYTES = 2000
BLOCK = 64 << 10
RETRIED_STATUS = (408, 409, 425, 429)  # also 5xx; retrying any other status is useless
REFUSED_STATUS = (401, 403, 404)  # every request to this endpoint would fail


class _Message(TypedDict):
    content: str | None


class _Choice(TypedDict):
    message: _Message


class _ChatCompletion(TypedDict):
    choices: Sequence[_Choice]


class _Logprobs(TypedDict):
    tokens: Sequence[str]
    top_logprobs: Sequence[Mapping[str, float] | None]


class _ScoredChoice(TypedDict):
    logprobs: _Logprobs


class _ScoredText(TypedDict):
    choices: Sequence[_ScoredChoice]


class _Error(TypedDict):
    message: str


class _ErrorReply(TypedDict):
    error: _Error


class ScoredTokens(NamedTuple):
    """The tokens of a text, and for each but the first the likeliest tokens in its place.

    Fields:
      ids: of the tokens, as the endpoint has them.
      likeliest: (id, log-probability), in descending order.
    """

    ids: list[int]
    likeliest: list[list[tuple[int, float]]]


class Endpoint(NamedTuple):
    """An endpoint.

    Fields:
      url: address of the service up to /v1.
      key: sent as a bearer token; None for none.
      timeout: seconds for the whole request, from the resolution of the host's name to the last byte.
    """

    url: str
    model: str
    key: str | None
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


def read_key(variable: str | None, setting: str) -> str | None:
    """Returns the key in an environment variable, which `setting` names; raises ValueError if it is not set."""
    if variable is None:
        return None
    if not (key := os.environ.get(variable, "").strip()):
        raise ValueError(f"{setting}: the environment variable {variable} is not set. Put the key in it")
    return key


def ask_repeatedly[T](ask: Callable[[], T], waits: Sequence[float], stopped: threading.Event) -> T:
    """Returns what `ask` returns; repeats it after each of `waits`, in seconds, where that may help.

    A request that timed out is not repeated.

    Raises:
      RequestFailed: the last attempt failed, or one failed and `stopped` is set.
    """
    for wait in waits:
        try:
            return ask()
        except RequestFailed as error:
            is_final = error.refused or not error.retry or isinstance(error, RequestTimedOut)
            if is_final or stopped.wait(wait if error.wait is None else error.wait):
                raise
    return ask()


def complete(endpoint: Endpoint, system: str, user: str, *, temperature: float, max_tokens: int) -> str:
    """Returns the reply to a system message and a user's message.

    Raises:
      RequestFailed: the endpoint sent an error, or nothing; RequestTimedOut if it did not reply in time.
    """
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    body = {"messages": messages, "temperature": temperature, "max_tokens": max_tokens}
    found = _post(endpoint, "chat/completions", body, _ChatCompletion, MAX_BYTES)
    if not found["choices"]:
        raise RequestFailed("not a chat completion: found no choices")
    return found["choices"][0]["message"]["content"] or ""


def score(endpoint: Endpoint, text: str | Sequence[int], count: int) -> ScoredTokens:
    """Returns the `count` likeliest tokens in each place of a text, which is not continued.

    Args:
      text: or the ids of its tokens.

    Raises:
      RequestFailed: as `complete`, or the reply lacks what was asked for.
    """
    body = {"prompt": text if isinstance(text, str) else [*text], "max_tokens": 0, "echo": True, "logprobs": count}
    body["return_tokens_as_token_ids"] = True
    most = (len(text) + 1) * (count + 4) * SCORE_BYTES
    found = _post(endpoint, "completions", body, _ScoredText, most)["choices"]
    try:
        if not found:
            raise ValueError("found no choices")
        logprobs = found[0]["logprobs"]
        ids = [_id_of(token) for token in logprobs["tokens"]]
        likeliest = [_likeliest(each or {}, count) for each in logprobs["top_logprobs"][1:]]
    except ValueError as error:
        raise RequestFailed(f"not a scored text: {error}", retry=False) from None
    if len(likeliest) != len(ids) - 1:
        problem = f"found {len(ids)} tokens and the likeliest in {len(likeliest) + 1} places, expected the same number"
        raise RequestFailed(f"not a scored text: {problem}", retry=False)
    return ScoredTokens(ids, likeliest)


def _likeliest(found: Mapping[str, float], count: int) -> list[tuple[int, float]]:
    """Returns the likeliest tokens of a place; one more is there if the text's own token is not one of them."""
    if len(found) < count:
        raise ValueError(f"found {len(found)} likeliest tokens in a place, expected {count}")
    descending = sorted((-log_p, _id_of(name)) for name, log_p in found.items())
    return [(number, -negative) for negative, number in descending[:count]]


def _id_of(name: str) -> int:
    number = name.removeprefix(TOKEN_ID)
    if number == name or not (number.isascii() and number.isdigit()):
        raise ValueError(f"found the token {shorten(name)}, expected {TOKEN_ID} with its number")
    return int(number)


def _post[T](endpoint: Endpoint, route: str, body: dict[str, object], kind: type[T], max_bytes: int) -> T:
    """Returns the endpoint's reply to a body, to which the model's name is added."""
    headers = {"Content-Type": "application/json"}
    if endpoint.key is not None:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    content = json.dumps({"model": endpoint.model, **body}).encode()
    request = urllib.request.Request(f"{endpoint.url.rstrip('/')}/{route}", content, headers)
    try:
        return decode_json(_send(endpoint, request, max_bytes), kind, "reply")
    except MetadataError as error:
        raise RequestFailed(f"not a reply of {route}: {' '.join(str(error).split())}") from None


def _send(endpoint: Endpoint, request: urllib.request.Request, max_bytes: int) -> bytes:
    try:
        return send(request, endpoint.timeout, max_bytes, _read)
    except TimeoutError:
        raise RequestTimedOut(f"no reply within {endpoint.timeout:g} s") from None
    except urllib.error.URLError as error:
        raise RequestFailed(f"no connection: {error.reason}") from None
    except http.client.InvalidURL:  # its text would show a password in the address
        raise RequestFailed(
            "not the address of a host (found a user name, or a port that is not a number)", refused=True
        ) from None
    except ReplyTooLarge:
        raise RequestFailed(f"the reply is too large (found more than {max_bytes} bytes)", retry=False) from None
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


def _error_text(content: bytes) -> str:
    """Returns the message of an error in OpenAI's form, or the beginning of another reply."""
    try:
        return decode_json(content, _ErrorReply, "reply")["error"]["message"]
    except MetadataError:
        return shorten(content.decode("utf-8", "replace"))


def _status_problem(response: http.client.HTTPResponse) -> RequestFailed:
    status, wait = response.status, response.headers.get("Retry-After", "")
    try:
        text = _error_text(response.read(MAX_ERROR_BYTES))
    except (OSError, http.client.HTTPException):
        text = "no text"
    return RequestFailed(
        f"HTTP status {status}: {text}",
        retry=status in RETRIED_STATUS or status >= 500,
        refused=status in REFUSED_STATUS or 300 <= status < 400,
        wait=float(wait) if wait.isascii() and wait.isdigit() else None,
    )
