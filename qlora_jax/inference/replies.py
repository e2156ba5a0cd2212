"""Greedy replies to many prompts, those of like length together, each batch kept as soon as it is there."""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from qlora_jax.inference.decode import BATCHES, Reply, generate
from qlora_jax.inference.decode_lowering import decoding_ahead
from qlora_jax.inference.lowering import Ahead
from qlora_jax.inference.result_cache import Kept
from qlora_jax.inference.sampling import Sampling
from qlora_jax.models.add_adapters import prepare_for_decoding
from qlora_jax.models.partition import ModelParts

ENDS = ("stop", "length", "context")


def greedy_replies(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    progress: Callable[[int], None],
    kept: Kept,
) -> list[Reply]:
    """The reply to each prompt, in order; the longest prompts are answered first. See `decode.generate`."""
    parts = prepare_for_decoding(parts)
    how = {"sampling": Sampling(), "max_new_tokens": max_new_tokens, "stop_ids": stop_ids}
    replies: dict[int, Reply] = {}
    for rows in _groups(prompts):
        group = [list(prompts[row]) for row in rows]
        inputs = ["greedy", group, max_new_tokens, sorted(stop_ids)]
        found = kept.result(inputs, lambda group=group: _flat(generate(parts, group, **how)))
        replies.update(zip(rows, _replies(*found), strict=True))
        progress(len(replies))
    return [replies[row] for row in range(len(prompts))]


def _groups(prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Rows to decode together, the longest prompts first."""
    return [*itertools.batched(sorted(range(len(prompts)), key=lambda row: -len(prompts[row])), BATCHES[-1])]


def replies_ahead(parts: ModelParts, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[Ahead]:
    """The programs of the largest batch that `greedy_replies` decodes, its first."""
    yield from decoding_ahead(parts, [prompts[row] for row in _groups(prompts)[0]], max_new_tokens)


def _flat(replies: Sequence[Reply]) -> tuple[np.ndarray, ...]:
    """(all ids, how many of them each reply has, why it ends)."""
    ids = [number for reply in replies for number in reply.ids]
    lengths, ends = [len(reply.ids) for reply in replies], [ENDS.index(reply.end) for reply in replies]
    return tuple(np.array(numbers, np.int32) for numbers in (ids, lengths, ends))


def _replies(ids: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> list[Reply]:
    each = np.split(ids, np.cumsum(lengths)[:-1])
    return [Reply(part.tolist(), ENDS[end]) for part, end in zip(each, ends, strict=True)]
