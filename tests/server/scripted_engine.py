"""A stand-in for the engine: real tokens of a real tokenizer, but the replies are given by the test."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.engine.request import Request, Scored, Step


class Usage(NamedTuple):
    waiting: int
    running: int


class Running:
    """A request, and the rest of its reply."""

    def __init__(self, request: Request, ids: Sequence[int]):
        self.request, self.ids, self.sent, self.text = request, list(ids), 0, ""


def scored(token: int, count: int) -> Scored:
    """A made-up log-probability, which depends on the token alone; it is the likeliest one."""
    log_p = -1 / (1 + token % 7)
    return Scored(token, log_p, tuple((token + place, log_p - place) for place in range(count)))


class ScriptedEngine:
    """Answers each request with the reply that `script` returns for it, a token per step."""

    def __init__(
        self, tokenizer: Tokenizer, script: Callable[[Request], str], positions: int = 512, seconds: float = 0
    ):
        self._tokenizer, self._script, self._positions, self._seconds = tokenizer, script, positions, seconds
        self._numbers = itertools.count()
        self.running: dict[int, Running] = {}
        self.seen: list[Request] = []
        self.cancelled: list[int] = []
        self.steps = 0
        self.fail = False
        self.problem: str | None = None  # replies end with it

    @property
    def busy(self) -> bool:
        return bool(self.running)

    def usage(self) -> Usage:
        return Usage(0, len(self.running))

    def prepare(self, request: Request) -> None:
        """Grammars are the real engine's."""

    def submit(self, request: Request) -> int:
        if len(request.prompt) >= self._positions:
            raise ValueError(f"prompt: too long (found {len(request.prompt)} tokens)")
        number = next(self._numbers)
        self.seen.append(request)
        reply = self._tokenizer.encode(self._script(request))
        self.running[number] = Running(request, [*reply, -1])
        return number

    def cancel(self, number: int) -> None:
        if self.running.pop(number, None) is not None:
            self.cancelled.append(number)

    def step(self) -> list[Step]:
        if self.fail:
            raise RuntimeError("the scripted engine fails")
        time.sleep(self._seconds)
        self.steps += 1
        return [self._step(number, self.running[number]) for number in list(self.running)]

    def _step(self, number: int, running: Running) -> Step:
        request, first = running.request, running.sent == 0
        if self.problem is not None:
            del self.running[number]
            return Step(number, None, "", "error", problem=self.problem)
        prompt = None
        if request.score_prompt and first:
            prompt = tuple(scored(token, request.likeliest or 0) for token in request.prompt[1:])
        if request.max_new_tokens == 0:
            del self.running[number]
            return Step(number, None, "", "length", None, prompt)
        token = running.ids[running.sent]
        running.sent += 1
        if token == -1 or token in request.stop_ids:
            del self.running[number]
            return Step(number, None, "", "stop", None, prompt)
        before, whole = running.text, self._tokenizer.decode(running.ids[: running.sent])
        own = None if request.likeliest is None else scored(token, request.likeliest)
        cut = min((whole.find(stop) for stop in request.stop_texts if stop in whole), default=None)
        if cut is not None:
            del self.running[number]
            return Step(number, token, whole[len(before) : cut], "stop", own, prompt)
        text = "" if whole.endswith("\ufffd") else whole[len(before) :]
        running.text += text
        if running.sent == request.max_new_tokens:
            del self.running[number]
            return Step(number, token, text, "length", own, prompt)
        return Step(number, token, text, None, own, prompt)


def wait_until(holds: Callable[[], object], seconds: float = 10) -> None:
    """The server's thread takes commands after it has answered."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
