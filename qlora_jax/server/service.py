"""The parts of a running server that its routes share."""

import asyncio
import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from qlora_jax.inference.engine.grammar import Grammar, GrammarKind
from qlora_jax.inference.engine.request import Request
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.server.engine_thread import EngineThread, Replies
from qlora_jax.server.errors import bad_request
from qlora_jax.server.metrics import Metrics
from qlora_jax.server.openai_schemas import ChatBody, CompletionBody, SampledBody
from qlora_jax.server.served_models import ServedModel, ServedModels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of requests.

    Attributes:
      max_body: bytes of a body.
      max_tokens: limit and default of a reply's tokens.
      seconds: for a request, its time in the queue included.
    """

    max_body: int
    max_tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """Everything that routes share.

    Attributes:
      key: a secret that clients have to send; None if they need not.
      hosts: names in the Host header that are answered without a key; empty: any.
      load: reads an adapter (its name, its folder) in any thread; returns the model, and a function that adds it to the
        engine in its thread. None if no folder of adapters was named.
      unload: removes an adapter from the engine, in its thread.
      adapters: the folder of adapters that may be loaded.
      loading: held while one is loaded or unloaded.
      page: HTML of the page at /; None: there is none.
    """

    models: ServedModels
    thread: EngineThread
    limits: Limits
    metrics: Metrics
    key: str | None = None
    hosts: frozenset[str] = frozenset()
    load: Callable[[str, Path], tuple[ServedModel, Callable[[], None]]] | None = None
    unload: Callable[[ServedModel], None] = lambda model: None
    adapters: Path | None = None
    loading: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    page: str | None = None

    @contextlib.asynccontextmanager
    async def replies(self, model: ServedModel, requests: Sequence[Request]) -> AsyncIterator[Replies]:
        """Yields the replies of a model, which are counted and limited in time."""
        async with self.thread.replies(requests, self.limits.seconds) as replies:
            prompts = sum(len(request.prompt) for request in requests if request.repeat == 0)
            replies.watch(self.metrics.watcher(model.name, prompts))
            yield replies

    def tokens(self, given: int | None, field: str) -> int:
        """Returns the limit of a reply's tokens; raises ApiError if the server's is lower."""
        if given is not None and given > self.limits.max_tokens:
            limit = self.limits.max_tokens
            raise bad_request([f"{field}: found {given}, expected at most {limit}. Lower it, or raise --max_tokens"])
        return given or self.limits.max_tokens


def new_id(kind: str) -> str:
    """Returns the id of a response, which begins with its kind."""
    return f"{kind}{secrets.token_hex(12)}"


def now() -> int:
    """Returns the seconds since 1970."""
    return int(time.time())


def sampling_of(body: SampledBody) -> Sampling:
    """Returns the sampling settings of a request of OpenAI's clients."""
    return Sampling(
        temperature=body.temperature,
        top_k=max(0, body.top_k),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=tuple((int(token), bias) for token, bias in body.logit_bias.items()),
        seed=secrets.randbits(32) if body.seed is None else body.seed,
    )


def sampling_problems(body: SampledBody, model: ServedModel) -> list[str]:
    """Returns the ids of a request that are not tokens of the model, one line each."""
    size = model.tokenizer.vocab_size
    named = [("logit_bias", int(token)) for token in body.logit_bias]
    named += [("stop_token_ids", token) for token in body.stop_token_ids]
    return [f"{field}: {token} is not a token (expected 0 to {size - 1})" for field, token in named if token >= size]


def stop_texts(body: SampledBody) -> tuple[str, ...]:
    """Returns the texts that end a reply."""
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def grammar_of(body: ChatBody | CompletionBody) -> Grammar | None:
    """Returns what a reply's text has to be by `response_format` or `structured_outputs`; None for any text."""
    given: list[Grammar] = []
    chosen, outputs = body.response_format, body.structured_outputs
    schema = None if chosen is None or chosen.json_schema is None else chosen.json_schema.schema_
    if chosen is not None and (chosen.type == "json_schema") != (schema is not None):
        raise bad_request(["response_format.json_schema.schema: expected for the type 'json_schema', and only there"])
    if schema is not None:
        given.append(Grammar(kind="json_schema", text=json.dumps(schema), field="response_format.json_schema.schema"))
    elif chosen is not None and chosen.type == "json_object":
        given.append(Grammar(kind="json_object"))
    if outputs is not None:
        texts: dict[GrammarKind, str | None] = {
            "json_schema": None if outputs.json_ is None else json.dumps(outputs.json_),
            "json_object": "" if outputs.json_object else None,
            "regex": outputs.regex,
            "lark": outputs.grammar,
            "choice": None if outputs.choice is None else json.dumps(outputs.choice),
        }
        found = [
            Grammar(kind=kind, text=text, field="structured_outputs")
            for kind, text in texts.items()
            if text is not None
        ]
        if len(found) != 1:
            raise bad_request([f"structured_outputs: found {len(found)} restrictions of the reply, expected one"])
        given += found
    if len(given) > 1:
        raise bad_request(["structured_outputs: found response_format too. Remove one of them"])
    return given[0] if given else None
