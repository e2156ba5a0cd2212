"""Greedy replies to many prompts: prompts of similar length share a batch, and each batch's replies are cached."""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from qlora_jax.inference.decode import BATCHES, EndReason, Reply, generate
from qlora_jax.inference.lowering import LoweredProgram, lower_decoding
from qlora_jax.inference.mesh_inference import row_shards
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.inference.sampling import Sampling
from qlora_jax.models.add_adapters import prepare_for_decoding
from qlora_jax.models.partition import ModelParts
from qlora_jax.sharding import mesh_of

ENDS: tuple[EndReason, ...] = ("stop", "length", "context")


def greedy_replies(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    progress: Callable[[int], None],
    cache: ResultCache,
) -> list[Reply]:
    """The greedy reply to each prompt, in the order of the prompts.

    Args:
      prompts: token ids of each prompt; the longest prompts are answered first.
      stop_ids: ids that end a reply.
      progress: called with the number of prompts answered so far.
      cache: replies of this model.

    Raises:
      ValueError: see `decode.generate`.
    """
    parts = prepare_for_decoding(parts)
    limits = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids}
    replies: dict[int, Reply] = {}
    for rows in _batches(prompts, row_shards(mesh_of(parts))):
        batch = [list(prompts[row]) for row in rows]
        inputs = ["greedy", batch, max_new_tokens, sorted(stop_ids)]
        arrays = cache.get_or_compute(
            inputs, lambda batch=batch: _to_arrays(generate(parts, batch, sampling=Sampling(), **limits))
        )
        replies.update(zip(rows, _from_arrays(*arrays), strict=True))
        progress(len(replies))
    return [replies[row] for row in range(len(prompts))]


def lower_replies(parts: ModelParts, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[LoweredProgram]:
    """Lowers the programs of the largest batch of `greedy_replies`, which is its first."""
    first = _batches(prompts, row_shards(mesh_of(parts)))[0]
    yield from lower_decoding(parts, [prompts[row] for row in first], max_new_tokens)


def _batches(prompts: Sequence[Sequence[int]], devices: int) -> list[tuple[int, ...]]:
    """Indices of the prompts of each batch, the longest prompts first."""
    longest_first = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    return [*itertools.batched(longest_first, BATCHES[-1] * devices)]


def _to_arrays(replies: Sequence[Reply]) -> tuple[np.ndarray, ...]:
    """(the ids of all replies, the number of ids of each, the index in ENDS of each)."""
    ids = [token for reply in replies for token in reply.ids]
    lengths, ends = [len(reply.ids) for reply in replies], [ENDS.index(reply.end) for reply in replies]
    return tuple(np.array(numbers, np.int32) for numbers in (ids, lengths, ends))


def _from_arrays(ids: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> list[Reply]:
    ids_of_each = np.split(ids, np.cumsum(lengths)[:-1])
    return [Reply(part.tolist(), ENDS[end]) for part, end in zip(ids_of_each, ends, strict=True)]
