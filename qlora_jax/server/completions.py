"""Answers /v1/completions, also for harnesses that only score a text (`echo` with `logprobs`)."""

import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from qlora_jax.inference.engine.request import Request, Scored, Step
from qlora_jax.inference.prompts import Prompter
from qlora_jax.server.errors import bad_request, too_long
from qlora_jax.server.openai_chat import Json, token_text, usage
from qlora_jax.server.openai_schemas import MOST_CHOICES, MOST_SCORES, CompletionBody
from qlora_jax.server.served_models import ServedModel
from qlora_jax.server.service import (
    Service,
    grammar_of,
    new_id,
    now,
    sampling_of,
    sampling_problems,
    stop_texts,
)


@dataclasses.dataclass
class _Choice:
    """One choice of a response: its prompt, and what has arrived of its reply."""

    request: Request
    prompt_text: str
    text: str = ""
    ids: list[int] = dataclasses.field(default_factory=list)
    scored: list[Scored] = dataclasses.field(default_factory=list)
    prompt_scored: Sequence[Scored] = ()
    finish: str | None = None

    def add(self, step: Step) -> None:
        """Adds a step of the reply."""
        self.text += step.text
        self.ids += [] if step.token is None else [step.token]
        self.scored += [] if step.scored is None else [step.scored]
        self.prompt_scored = step.prompt or self.prompt_scored
        self.finish = None if step.end is None else "stop" if step.end == "stop" else "length"


def prepare_completion(service: Service, body: CompletionBody) -> tuple[ServedModel, list[_Choice]]:
    """Encodes the prompts of a body; raises ApiError for what is wrong with it."""
    model = service.models.writing(body.model, chat=False)
    prompts = _prompts(body, model)
    if problems := _problems(body, model, len(prompts), sum(len(ids) for ids, _ in prompts)):
        raise bad_request(problems)
    request = Request(
        prompt=(),
        max_new_tokens=0,
        sampling=sampling_of(body),
        stop_ids=model.stop_ids | {*body.stop_token_ids},
        stop_texts=stop_texts(body),
        adapter=model.adapter,
        likeliest=body.logprobs,
        score_prompt=body.echo and body.logprobs is not None,
        grammar=grammar_of(body),
    )
    most = body.max_tokens and service.tokens(body.max_tokens, "max_tokens")
    return model, [
        _Choice(
            dataclasses.replace(
                request, prompt=ids, max_new_tokens=min(most, model.positions - len(ids)), repeat=number
            ),
            text,
        )
        for ids, text in prompts
        for number in range(body.n)
    ]


def _prompts(body: CompletionBody, model: ServedModel) -> list[tuple[list[int], str]]:
    """Returns the ids and the text of each prompt."""
    prompter = Prompter(tokenizer=model.tokenizer, chat=False, system=None)
    found = []
    for row in _rows(body.prompt):
        try:
            ids = prompter.text(row) if isinstance(row, str) else [*row]
        except ValueError as error:
            raise bad_request([f"prompt: {error}"]) from None
        if not ids:
            raise bad_request(["prompt: empty (expected at least one token). Give a text"])
        if len(ids) + (body.max_tokens > 0) > model.positions:
            raise too_long(len(ids), model.positions, "prompt")
        if any(token >= model.tokenizer.vocab_size for token in ids):
            raise bad_request([f"prompt: {max(ids)} is not a token of {model.name}"])
        found.append((ids, row if isinstance(row, str) else model.tokenizer.decode(ids)))
    return found


def _rows(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    ids = [one for one in prompt if isinstance(one, int)]
    return [ids] if ids else [one for one in prompt if not isinstance(one, int)]


def _problems(body: CompletionBody, model: ServedModel, prompts: int, tokens: int) -> list[str]:
    """Returns what is wrong with a body of so many prompts, with so many tokens in all."""
    problems = sampling_problems(body, model)
    if body.stream_options is not None and not body.stream:
        problems.append("stream_options: requires stream. Set stream to true")
    if body.max_tokens == 0 and not (body.echo and body.logprobs is not None):
        problems.append("max_tokens: 0 only scores the prompt. Set echo and logprobs, or raise it")
    if body.stream and body.echo:
        problems.append("echo: not implemented with stream. Remove one of them")
    if prompts * body.n > MOST_CHOICES * (1 if body.n > 1 else 32):
        problems.append(f"prompt: found {prompts} prompts with {body.n} choices each, which are too many. Send fewer")
    scores = body.n * tokens * (1 + (body.logprobs or 0)) if body.echo else 0
    if scores > MOST_SCORES:
        problems.append(
            f"logprobs: found {scores:,} log-probabilities of prompts, expected at most {MOST_SCORES:,} in a request. "
            "Send fewer prompts, or lower it"
        )
    return problems


async def complete(service: Service, model: ServedModel, body: CompletionBody, choices: list[_Choice]) -> Json:
    """Returns the response to a request that does not stream."""
    async with service.replies(model, [choice.request for choice in choices]) as running:
        async for index, step in running:
            choices[index].add(step)
    found = []
    for index, choice in enumerate(choices):
        text = choice.prompt_text + choice.text if body.echo else choice.text
        found.append({**_choice(index, text, choice.finish), "logprobs": _logprobs(body, choice, _namer(body, model))})
        if body.return_token_ids:
            found[-1] |= {"token_ids": choice.ids, "prompt_token_ids": [*choice.request.prompt]}
    return {**_head(body), "choices": found, "usage": _usage(body, choices)}


async def stream_completion(
    service: Service, model: ServedModel, body: CompletionBody, choices: list[_Choice]
) -> AsyncIterator[Json]:
    """Yields the chunks of a streamed response."""
    head = _head(body)
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    head |= {"usage": None} if wants_usage else {}
    async with service.replies(model, [choice.request for choice in choices]) as running:
        async for index, step in running:
            choice = choices[index]
            offset, is_first = len(choice.text), not choice.ids
            choice.add(step)
            chunk = _choice(index, step.text, choice.finish)
            if body.logprobs is not None:
                scored = [] if step.scored is None else [step.scored]
                chunk["logprobs"] = _scored_logprobs(scored, offset, _namer(body, model))
            if body.return_token_ids:
                chunk["token_ids"] = [] if step.token is None else [step.token]
                chunk |= {"prompt_token_ids": [*choice.request.prompt]} if is_first else {}
            if step.text or choice.finish or body.return_token_ids or body.logprobs is not None:
                yield {**head, "choices": [chunk]}
    if wants_usage:
        yield {**head, "choices": [], "usage": _usage(body, choices)}


def _choice(index: int, text: str, finish: str | None) -> Json:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


def _head(body: CompletionBody) -> Json:
    return {"id": new_id("cmpl-"), "object": "text_completion", "created": now(), "model": body.model}


def _usage(body: CompletionBody, choices: Sequence[_Choice]) -> Json:
    prompts = sum(len(choice.request.prompt) for choice in choices[:: body.n])
    return usage(prompts, sum(len(choice.ids) for choice in choices))


def _namer(body: CompletionBody, model: ServedModel) -> Callable[[int], str]:
    """Returns a function from a token to its name in the response: its text, or its id, with which texts have none."""
    if body.return_tokens_as_token_ids:
        return lambda token: f"token_id:{token}"
    return lambda token: token_text(token, model.tokenizer)


def _logprobs(body: CompletionBody, choice: _Choice, name: Callable[[int], str]) -> Mapping[str, object] | None:
    """Returns the log-probabilities of the reply, and with `echo` those of the prompt before it."""
    if body.logprobs is None:
        return None
    if not body.echo:
        return _scored_logprobs(choice.scored, 0, name)
    first = name(choice.request.prompt[0])
    rest = _scored_logprobs([*choice.prompt_scored, *choice.scored], len(first), name)
    return {
        "tokens": [first, *rest["tokens"]],
        "token_logprobs": [None, *rest["token_logprobs"]],
        "top_logprobs": [None, *rest["top_logprobs"]],
        "text_offset": [0, *rest["text_offset"]],
    }


def _scored_logprobs(scored: Sequence[Scored], offset: int, name: Callable[[int], str]) -> dict[str, list]:
    """Returns log-probabilities in OpenAI's shape, whose likeliest tokens include the one itself."""
    tokens = [name(one.token) for one in scored]
    offsets = []
    for text in tokens:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [one.log_p for one in scored],
        "top_logprobs": [
            {name(token): log_p for token, log_p in [*reversed(one.likeliest), (one.token, one.log_p)]}
            for one in scored
        ],
        "text_offset": offsets,
    }
