"""Replies to many prompts, written to a file: prompts of similar length share a batch, whose replies are cached."""

import itertools
import json
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.progress import Progress

from qlora_jax.data.readers.files import Row
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.decode import Reply, generate
from qlora_jax.inference.engine.model_calls import ROW_COUNTS
from qlora_jax.inference.engine.request import EndReason, Step
from qlora_jax.inference.lowering import LoweredProgram, lower_decoding
from qlora_jax.inference.mesh_inference import row_shards
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.inference.sampling_params import GREEDY, Sampling
from qlora_jax.models.partition import ModelParts, prepare_for_decoding
from qlora_jax.sharding import mesh_of

CACHED_TOGETHER = 4 * ROW_COUNTS[-1]  # replies for each device; rows that end make room for others of them
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
    replies = sampled_replies(
        parts,
        prompts,
        samples=1,
        sampling=GREEDY,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        progress=progress,
        cache=cache,
    )
    return [reply for (reply,) in replies]


def sampled_replies(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: Collection[int],
    progress: Callable[[int], None],
    cache: ResultCache,
) -> list[list[Reply]]:
    """Several replies to each prompt, in the order of the prompts; see `greedy_replies`.

    Args:
      samples: number of replies to each prompt. They differ, because equal prompts of one batch draw differently.
    """
    parts = prepare_for_decoding(parts)
    limits = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids}
    replies: dict[int, list[Reply]] = {}
    for rows in _batches(prompts, samples, row_shards(mesh_of(parts))):
        batch = [list(prompts[row]) for row in rows for _ in range(samples)]
        inputs = [sampling, batch, max_new_tokens, sorted(stop_ids)]
        arrays = cache.get_or_compute(
            inputs, lambda batch=batch: _to_arrays(generate(parts, batch, sampling=sampling, **limits))
        )
        of_prompts = itertools.batched(_from_arrays(*arrays), samples)
        replies.update({row: [*of_prompt] for row, of_prompt in zip(rows, of_prompts, strict=True)})
        progress(len(replies))
    return [replies[row] for row in range(len(prompts))]


def lower_replies(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    samples: int = 1,
) -> Iterator[LoweredProgram]:
    """Lowers the programs of the largest batch of `sampled_replies`, which is its first."""
    devices = row_shards(mesh_of(parts))
    first = _batches(prompts, samples, devices)[0]
    batch = [prompts[row] for row in first for _ in range(samples)]
    yield from lower_decoding(parts, batch, max_new_tokens)


def _batches(prompts: Sequence[Sequence[int]], samples: int, devices: int) -> list[tuple[int, ...]]:
    """Indices of the prompts of each batch, the longest prompts first; a batch has all replies to its prompts."""
    longest_first = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    return [*itertools.batched(longest_first, max(1, CACHED_TOGETHER * devices // samples))]


def _to_arrays(replies: Sequence[Reply]) -> tuple[np.ndarray, ...]:
    """(the ids of all replies, the number of ids of each, the index in ENDS of each)."""
    ids = [token for reply in replies for token in reply.ids]
    lengths, ends = [len(reply.ids) for reply in replies], [ENDS.index(reply.end) for reply in replies]
    return tuple(np.array(numbers, np.int32) for numbers in (ids, lengths, ends))


def _from_arrays(ids: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> list[Reply]:
    ids_of_each = np.split(ids, np.cumsum(lengths)[:-1])
    return [Reply(part.tolist(), ENDS[end]) for part, end in zip(ids_of_each, ends, strict=True)]


def write_replies(
    rows: Sequence[Row],
    steps: Iterator[Step],
    tokenizer: Tokenizer,
    write: Callable[[str], object],
    console: Console,
) -> None:
    """Writes one line per row, in order, as soon as its reply and all replies before it are complete.

    A line has the row's columns, and `reply`, `end` (see Step) and `reply_tokens`.

    Args:
      write: called with each line, including its line break.
      console: shows a progress bar if it is a terminal.
    """
    ids: list[list[int]] = [[] for _ in rows]
    ends: dict[int, str] = {}
    written = 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("replies", total=len(rows))
        for step in steps:
            ids[step.request] += [] if step.token is None else [step.token]
            if step.end is None:
                continue
            ends[step.request] = step.end
            while written in ends:
                write(_line(rows[written], tokenizer.decode(ids[written]), ends[written], len(ids[written])))
                written += 1
            bar.update(task, completed=len(ends))


def _line(row: Row, reply: str, end: str, tokens: int) -> str:
    return json.dumps({**row.data, "reply": reply, "end": end, "reply_tokens": tokens}, ensure_ascii=False) + "\n"
