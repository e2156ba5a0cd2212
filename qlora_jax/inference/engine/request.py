"""Requests to an engine, and the tokens with which it answers them."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from qlora_jax.inference.sampling_params import GREEDY, Sampling

if TYPE_CHECKING:
    from qlora_jax.inference.engine.grammar import Grammar

EndReason = Literal["stop", "length", "context", "error"]
LIKELIEST = (0, 20, 64, 256)  # numbers of likeliest tokens that programs report: 20 for chats, others for students


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and how to continue it.

    Attributes:
      prompt: token ids; at least one.
      max_new_tokens: maximum length of the reply; 0 only scores the prompt.
      stop_ids: ids that end the reply and are not part of it.
      keep_stop: makes a stop id the last token of its reply.
      stop_texts: texts that end the reply; it ends before the first of them.
      adapter: name of one of the engine's adapters; None: the engine's model without them.
      repeat: number of earlier requests that equal this one; they draw differently with the same seed.
      likeliest: number of likeliest tokens to report with each token's log-probability; None: report neither.
      score_draw: reports log-probabilities by the logits divided by the temperature.
      score_prompt: reports the log-probability of each token of the prompt, in the first step.
      grammar: restricts the reply's text; None: any text.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_ids: frozenset[int] = frozenset()
    keep_stop: bool = False
    stop_texts: tuple[str, ...] = ()
    adapter: str | None = None
    repeat: int = 0
    likeliest: int | None = None
    score_draw: bool = False
    score_prompt: bool = False
    grammar: "Grammar | None" = None


class Scored(NamedTuple):
    """A token's log-probability, by the model's own logits before any setting changes them (see `Request.score_draw`).

    Fields:
      token: its id.
      log_p: natural logarithm of its probability.
      likeliest: (id, log-probability) of the likeliest tokens in its place, in descending order.
    """

    token: int
    log_p: float
    likeliest: tuple[tuple[int, float], ...]


class Step(NamedTuple):
    """One token of one reply, or its end, or both.

    Fields:
      request: the number that `Engine.submit` returned.
      token: the next id; None if the reply ends without one, as at a stop id, which is not part of the reply.
      text: the text that this step adds to the reply. Characters wait for all of their bytes, and texts that may become
        a stop text wait until they cannot; so it may be empty, or have the text of several tokens.
      end: why the reply ends after this step: "stop" (a stop id or text, or the end of the grammar), "length"
        (max_new_tokens), "context" (the model has no position left), "error" (the grammar cannot be followed any
        further), or None if it continues.
      scored: of `token`, if the request asks for it.
      prompt: log-probabilities of the prompt's tokens after the first, in the first step of a request that asks for
        them.
      problem: the reason of an error.
    """

    request: int
    token: int | None
    text: str
    end: EndReason | None
    scored: Scored | None = None
    prompt: tuple[Scored, ...] | None = None
    problem: str | None = None


def prompt_problems(name: str, prompt: Sequence[int], max_positions: int, num_ids: int, least: int = 1) -> list[str]:
    """Returns why a prompt cannot be continued, one line each.

    Args:
      max_positions, num_ids: of the model.
      least: number of tokens for which the prompt has to leave positions.
    """
    if not prompt:
        return [f"{name}: empty (expected at least one token)"]
    problems = []
    if len(prompt) + least > max_positions:
        found = f"found {len(prompt)} tokens; the model has {max_positions} positions for prompt and reply"
        problems.append(f"{name}: too long ({found}). Shorten it")
    return problems + id_problems(name, prompt, num_ids)


def id_problems(name: str, ids: Sequence[int] | np.ndarray, num_ids: int) -> list[str]:
    """Returns a message if the model's embedding has no row for an id."""
    if not len(ids):
        return []
    low, high = int(np.min(ids)), int(np.max(ids))
    if low >= 0 and high < num_ids:
        return []
    found = f"found ids {low} to {high}, expected 0 to {num_ids - 1}"
    return [f"{name}: an id has no row in the embedding ({found}). Use the tokenizer that was loaded with the model"]
