"""Counts requests and tokens, in the format of Prometheus."""

import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qlora_jax.inference.engine.request import Step

FIRST_TOKEN_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
TOKEN_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)


class Metrics:
    """The counters of one server."""

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "qlora_jax_requests", "Requests by route and status.", ["path", "status"], registry=registry
        )
        self._prompt = Counter("qlora_jax_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry)
        self._reply = Counter("qlora_jax_reply_tokens", "Tokens of replies.", ["model"], registry=registry)
        self._first = Histogram(
            "qlora_jax_first_token_seconds", "Time to the first token.", registry=registry, buckets=FIRST_TOKEN_SECONDS
        )
        self._next = Histogram(
            "qlora_jax_token_seconds", "Time between tokens of a reply.", registry=registry, buckets=TOKEN_SECONDS
        )
        self._engine = Gauge("qlora_jax_engine", "State of the engine (docs/serve.md).", ["name"], registry=registry)

    def count(self, path: str, status: int) -> None:
        """Counts a request that was answered; `path` is the route, not what a client wrote."""
        self._requests.labels(path, str(status)).inc()

    def watcher(self, model: str, prompt_tokens: int) -> Callable[[int, Step], None]:
        """Counts tokens of prompts, and returns a function that counts the steps of their replies."""
        self._prompt.labels(model).inc(prompt_tokens)
        reply, start, before = self._reply.labels(model), time.monotonic(), {}

        def watch(index: int, step: Step) -> None:
            now = time.monotonic()
            (self._next if index in before else self._first).observe(now - before.get(index, start))
            before[index] = now
            reply.inc(step.token is not None)

        return watch

    def text(self, usage: Mapping[str, int]) -> bytes:
        """Returns all counters, with the engine's state."""
        for name, value in usage.items():
            self._engine.labels(name).set(value)
        return generate_latest(self._registry)
