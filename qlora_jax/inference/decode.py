"""Replies to prompts that are all known: an engine with a cache that is as large as they need."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.engine.engine import Engine
from qlora_jax.inference.engine.model_calls import page_bytes, pages_for
from qlora_jax.inference.engine.request import EndReason, Request, Step, prompt_problems
from qlora_jax.inference.mesh_inference import row_shards
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import ModelParts, combine
from qlora_jax.sharding import mesh_of


class Reply(NamedTuple):
    """The ids generated for one prompt, without the stop token, and why the reply ends (see Step)."""

    ids: list[int]
    end: EndReason


def stream(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: Collection[int],
    tokenizer: Tokenizer | None = None,
) -> Iterator[Step]:
    """Yields the tokens of the reply to each prompt as they are generated; `Step.request` is the prompt's index.

    Up to 16 replies are decoded together, or 16 on each device of the model's mesh. A reply does not depend on the
    others. A prompt given several times gets different draws; the first equal those of the prompt alone.

    Args:
      prompts: token ids of each prompt.
      stop_ids: ids that end a reply.
      tokenizer: for the text of steps; None: they have none.

    Raises:
      ValueError: prompts that are empty or leave no position for a reply; the message lists all of them.
    """
    model = combine(parts)
    _check(prompts, max_new_tokens, model)
    needed = cache_bytes(parts, [len(prompt) + max_new_tokens for prompt in prompts])
    how = {"sampling": sampling, "max_new_tokens": max_new_tokens, "stop_ids": frozenset(stop_ids)}
    each = zip(prompts, _repeats(prompts), strict=True)
    return Engine(parts, tokenizer, cache_bytes=needed).stream(
        Request(prompt=ids, repeat=repeat, **how) for ids, repeat in each
    )


class Conversation:
    """Replies to prompts that continue each other; the part of a prompt that the cache has is not computed again."""

    def __init__(self, parts: ModelParts, tokenizer: Tokenizer, settings: Mapping[str, Any]):
        """Allocates nothing yet.

        Args:
          settings: of each Request, besides its prompt.
        """
        self._parts, self._tokenizer, self._settings = parts, tokenizer, settings
        self._engine: Engine | None = None
        self._positions = 0

    def reply(self, prompt: Sequence[int]) -> Iterator[Step]:
        """Yields the steps of the reply; the cache grows if the prompt needs more of it."""
        request = Request(prompt=prompt, **self._settings)
        needed = len(prompt) + request.max_new_tokens
        if self._engine is None or needed > self._positions:
            self._positions = 2 * needed
            self._engine = Engine(self._parts, self._tokenizer, cache_bytes=cache_bytes(self._parts, [2 * needed]))
        return self._engine.stream([request])


def cache_bytes(parts: ModelParts, positions: Sequence[int]) -> int:
    """Returns the bytes on each device with which no row of so many positions waits for pages."""
    model = combine(parts)
    pages = pages_for(model.config, positions, row_shards(mesh_of(parts)))
    return pages * page_bytes(model.config, model.model.embed_tokens.weight[...].dtype)


def generate(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: Collection[int],
) -> list[Reply]:
    """Returns the complete reply to each prompt, in order; see `stream`."""
    steps = stream(parts, prompts, sampling=sampling, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    return [reply for _, reply in sorted(complete(steps), key=lambda pair: pair[0])]


def complete(steps: Iterable[Step]) -> Iterator[tuple[int, Reply]]:
    """Yields (index of the prompt, its reply), each as soon as it is complete."""
    ids: dict[int, list[int]] = {}
    for step in steps:
        own = ids.setdefault(step.request, [])
        own += [] if step.token is None else [step.token]
        if step.end is not None:
            yield step.request, Reply(ids.pop(step.request), step.end)


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, model: CausalLM) -> None:
    limits = model.config.max_positions, model.model.embed_tokens.num_ids
    problems = [] if max_new_tokens >= 1 else [f"max_new_tokens: found {max_new_tokens}, expected at least 1"]
    for row, prompt in enumerate(prompts):
        problems += prompt_problems(f"prompt {row}", prompt, *limits)
    if problems:
        raise ValueError("\n  ".join(["cannot generate:", *problems]))


def _repeats(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each prompt, the number of equal prompts before it."""
    seen: dict[tuple[int, ...], int] = {}
    repeats = []
    for prompt in map(tuple, prompts):
        repeats.append(seen.get(prompt, 0))
        seen[prompt] = repeats[-1] + 1
    return repeats
