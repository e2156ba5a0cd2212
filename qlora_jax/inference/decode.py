"""Generates text: prefills a key-value cache with a prompt in chunks, then decodes one token at a time.

Shapes are static and come from short tables, so the number of compilations is small and known. Prompts are padded on
the right. Each row's length is its position, and attention never reads cache slots after it.

A model that lies on a mesh decodes there: each device has its own rows, and their cache. Every device takes part in
each step until the last row of the batch has ended, because the layers' weights are gathered from all of them.

Dimension key: B batch, P padded prompt, T positions of a call, S cache slots, D embed, V vocab, M = B T.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.mesh_inference import CACHE, row_shapes, row_shards, run_on_mesh
from qlora_jax.inference.sampling import Sampling, choose
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.kv_cache import KVCache
from qlora_jax.models.partition import ModelFunction, ModelParts, combine, prepare_for_decoding
from qlora_jax.sharding import ROWS, AnyMesh, gather_rows, mesh_of, named


def id_problems(name: str, rows: Iterable[Sequence[int] | np.ndarray], model: CausalLM) -> list[str]:
    """Returns a message for each row with an id that the model's embedding has no row for.

    Args:
      name: of one row, such as "prompt".
    """
    limit = model.model.embed_tokens.num_ids
    spans = [(int(ids.min()), int(ids.max())) if ids.size else (0, 0) for ids in map(np.asarray, rows)]
    return [
        f"{name} {index}: an id has no row in the embedding (found ids {low} to {high}, expected 0 to {limit - 1}). "
        "Use the tokenizer that was loaded with the model"
        for index, (low, high) in enumerate(spans)
        if low < 0 or high >= limit
    ]


_INCOMPLETE = "\ufffd"  # decoders write this for bytes that are not (yet) a character


class TextStream:
    """Decodes ids one by one; the pieces joined are the decoding of all ids.

    A token may contain only some bytes of a character. These wait until the character is complete. Each piece is
    decoded together with the tokens before it, because decoders may treat the first token of a text differently.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Adds a token and returns the text that it completes, which may be empty."""
        self._pending.append(token)
        piece = self._piece()
        return "" if piece.endswith(_INCOMPLETE) else self._emit(piece)

    def flush(self) -> str:
        """Returns the text still waiting; call it after the last token."""
        return self._emit(self._piece())

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]

    def _emit(self, piece: str) -> str:
        if piece:
            self._context, self._pending = self._pending, []
        return piece


PREFILL_CHUNKS = (64, 256, 512)  # prompt tokens per call of the model
BATCHES = (1, 2, 4, 8, 16)  # numbers of rows that a device decodes together
FIRST_SLOTS = 256  # a cache has 256, 512, 1024, ... slots


def round_up(number: int, sizes: Sequence[int]) -> int:
    """The first size that is at least `number`; `sizes` are ascending."""
    return next(size for size in sizes if size >= number)


def slots_for(needed: int, config: ModelConfig) -> int:
    """The number of slots of a cache for `needed` positions."""
    slots = FIRST_SLOTS
    while slots < needed:
        slots *= 2
    return min(slots, config.max_positions)


def chunks(length: int) -> list[tuple[int, int]]:
    """(start, size) of each chunk of a prompt of `length` tokens; the last may extend past its end."""
    largest = PREFILL_CHUNKS[-1]
    starts = range(0, length, largest)
    return [(start, round_up(min(length - start, largest), PREFILL_CHUNKS)) for start in starts]


ORDER_WINDOW = 64  # rows are sorted by length within windows of this many for each device
# For one batch size and number of slots: `prefill_chunk` for each chunk size, `next_token`, and `decode_step`.
COMPILATIONS = len(PREFILL_CHUNKS) + 2

EndReason = Literal["stop", "length", "context"]


class DecodeStep(NamedTuple):
    """One token of one reply, or its end, or both.

    Fields:
      row: index of the prompt.
      token: the next id; None if the reply ends with a stop token, which is not part of the reply.
      end: why the reply ends after this step: "stop" (a stop token), "length" (max_new_tokens), "context" (the model
        has no position left), or None if it continues.
    """

    row: int
    token: int | None
    end: EndReason | None


class Reply(NamedTuple):
    """The ids generated for one prompt, without the stop token, and why the reply ends (see DecodeStep)."""

    ids: list[int]
    end: EndReason


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Batch:
    """Prompts that are decoded together, padded to static shapes; rows after the last prompt are padding."""

    tokens_BP: np.ndarray
    lengths_B: np.ndarray
    keys_B: jax.Array
    slots: int
    mesh: AnyMesh | None


class _Limits(NamedTuple):
    """The conditions that end a reply."""

    stop_ids: frozenset[int]
    max_new_tokens: int
    max_positions: int

    def step(self, row: int, token: int, prompt: int, generated: int) -> DecodeStep:
        """The step of the `generated`-th token after a prompt of `prompt` tokens."""
        if token in self.stop_ids:
            return DecodeStep(row, None, "stop")
        if prompt + generated == self.max_positions:
            return DecodeStep(row, token, "context")
        return DecodeStep(row, token, "length" if generated == self.max_new_tokens else None)


@functools.partial(ModelFunction, static_argnames="mesh", donate_argnames="cache")
def prefill_chunk(
    parts: ModelParts,
    tokens_BT: Int[Array, "B T"],
    start_B: Int[Array, " B"],
    length_B: Int[Array, " B"],
    last_BD: Float[Array, "B D"],
    cache: KVCache,
    *,
    mesh: AnyMesh | None = None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """Runs the model on tokens at positions start, start + 1, ... and appends them to the cache.

    Args:
      length_B: number of tokens of each row's whole prompt.
      last_BD: the result of the chunk before.
      mesh: the devices that share the model and the rows; None: one device.

    Returns:
      (hidden state of each row's last prompt token, or its `last_BD` if that token is in another chunk; the cache).
    """
    inputs = tokens_BT, start_B, length_B, last_BD, cache
    return run_on_mesh(_prefill_chunk, parts, inputs, mesh, (P(ROWS), CACHE))


def _prefill_chunk(parts, tokens_BT, start_B, length_B, last_BD, cache):
    batch, length = tokens_BT.shape
    hidden_MD, cache = combine(parts).extend(tokens_BT, start_B, cache)
    at_B = length_B - 1 - start_B
    found_BD = hidden_MD.reshape(batch, length, -1)[jnp.arange(batch), jnp.clip(at_B, 0, length - 1)]
    inside_B = (at_B >= 0) & (at_B < length)
    return jnp.where(inside_B[:, None], found_BD, last_BD), cache


@functools.partial(jax.jit, static_argnames=("sampling", "mesh"))
def next_token(
    parts: ModelParts,
    last_BD: Float[Array, "B D"],
    keys_B: Key[Array, " B"],
    index: Int[Array, ""],
    sampling: Sampling,
    *,
    mesh: AnyMesh | None = None,
) -> Int[Array, " B"]:
    """Chooses the next token of each row from f32 logits; `index` is the number of tokens generated before it.

    On a mesh every device gets the tokens of all rows.
    """

    def program(parts, last_BD, keys_B, index):
        return gather_rows(_choose(combine(parts), last_BD, keys_B, index, sampling), mesh, axis=0)

    return run_on_mesh(program, parts, (last_BD, keys_B, index), mesh, P())


@functools.partial(ModelFunction, static_argnames=("sampling", "mesh"), donate_argnames="cache")
def decode_step(
    parts: ModelParts,
    tokens_B: Int[Array, " B"],
    start_B: Int[Array, " B"],
    cache: KVCache,
    keys_B: Key[Array, " B"],
    index: Int[Array, ""],
    sampling: Sampling,
    *,
    mesh: AnyMesh | None = None,
) -> tuple[Int[Array, " B"], KVCache]:
    """Appends one token per row at position start; returns (the next token of each row, the cache).

    On a mesh every device gets the tokens of all rows.
    """

    def program(parts, tokens_B, start_B, cache, keys_B, index):
        model = combine(parts)
        hidden_BD, cache = model.extend(tokens_B[:, None], start_B, cache)
        return gather_rows(_choose(model, hidden_BD, keys_B, index, sampling), mesh, axis=0), cache

    return run_on_mesh(program, parts, (tokens_B, start_B, cache, keys_B, index), mesh, (P(), CACHE))


def _choose(model: CausalLM, last_BD: jax.Array, keys_B: jax.Array, index: jax.Array, sampling: Sampling) -> jax.Array:
    logits_BV = model.head.logits(last_BD)
    return choose(logits_BV, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, index), sampling)


def stream(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: Collection[int],
) -> Iterator[DecodeStep]:
    """Yields the tokens of the reply to each prompt as they are generated.

    Up to 16 prompts of similar length are decoded together, or 16 on each device of the model's mesh. A row's draws
    depend on the seed, its prompt and its tokens, not on the other rows. A prompt given several times gets different
    draws; the first equal those of the prompt alone.

    Args:
      prompts: token ids of each prompt.
      stop_ids: ids that end a reply.

    Raises:
      ValueError: prompts that are empty or leave no position for a reply; the message lists all of them.
    """
    parts = prepare_for_decoding(parts)
    model = combine(parts)
    _check(prompts, max_new_tokens, model)
    limits = _Limits(frozenset(stop_ids), max_new_tokens, model.config.max_positions)
    repeats, mesh = _repeats(prompts), mesh_of(parts)
    for rows in _groups(prompts, row_shards(mesh)):
        texts, counts = [prompts[row] for row in rows], [repeats[row] for row in rows]
        batch = _batch(texts, counts, sampling, max_new_tokens, model, mesh)
        for step in _decode(parts, model, batch, len(rows), sampling, limits):
            yield step._replace(row=rows[step.row])


def generate(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: Collection[int],
) -> list[Reply]:
    """Returns the complete reply to each prompt, in order; see `stream`."""
    ids: list[list[int]] = [[] for _ in prompts]
    ends: dict[int, EndReason] = {}
    for row, token, end in stream(parts, prompts, sampling=sampling, max_new_tokens=max_new_tokens, stop_ids=stop_ids):
        if token is not None:
            ids[row].append(token)
        if end is not None:
            ends[row] = end
    return [Reply(reply, ends[row]) for row, reply in enumerate(ids)]


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, model: CausalLM) -> None:
    max_positions = model.config.max_positions
    problems = [] if max_new_tokens >= 1 else [f"max_new_tokens: found {max_new_tokens}, expected at least 1"]
    for row, prompt in enumerate(prompts):
        if not prompt:
            problems.append(f"prompt {row}: empty (expected at least one token)")
        elif len(prompt) >= max_positions:
            problems.append(
                f"prompt {row}: too long (found {len(prompt)} tokens; the model has {max_positions} positions "
                "for prompt and reply). Shorten it"
            )
    problems += id_problems("prompt", prompts, model)
    if problems:
        raise ValueError("\n  ".join(["cannot generate:", *problems]))


def _repeats(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each prompt, the number of equal prompts before it."""
    seen: collections.Counter[tuple[int, ...]] = collections.Counter()
    repeats = []
    for prompt in map(tuple, prompts):
        repeats.append(seen[prompt])
        seen[prompt] += 1
    return repeats


def _groups(prompts: Sequence[Sequence[int]], devices: int) -> Iterator[tuple[int, ...]]:
    """Rows to decode together, taken from windows of the prompts, so that replies arrive roughly in order."""
    for window in itertools.batched(range(len(prompts)), ORDER_WINDOW * devices):
        yield from itertools.batched(sorted(window, key=lambda row: len(prompts[row])), BATCHES[-1] * devices)


def batch_size(rows: int, devices: int) -> int:
    """The number of rows to which a batch is padded, equally many on each device."""
    return devices * round_up(-(-rows // devices), BATCHES)


def _batch(
    prompts: Sequence[Sequence[int]],
    repeats: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    model: CausalLM,
    mesh: AnyMesh | None,
) -> _Batch:
    batch, longest = batch_size(len(prompts), row_shards(mesh)), max(map(len, prompts))
    tokens_BP = np.zeros((batch, sum(chunks(longest)[-1])), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, : len(prompt)] = prompt
    lengths_B = np.array([*map(len, prompts), *[1] * (batch - len(prompts))], np.int32)
    keys_B = _row_keys(sampling.seed, [*repeats, *[0] * (batch - len(prompts))], mesh)
    slots = slots_for(longest + max_new_tokens, model.config)
    return _Batch(tokens_BP=tokens_BP, lengths_B=lengths_B, keys_B=keys_B, slots=slots, mesh=mesh)


def _row_keys(seed: int, repeats: Sequence[int], mesh: AnyMesh | None) -> jax.Array:
    """The random key of each row, on a mesh on the device that has the row."""
    key = jax.random.key(seed)
    keys_B = jnp.stack([jax.random.fold_in(key, repeat) for repeat in repeats])
    if mesh is None:
        return keys_B
    words = np.asarray(jax.random.key_data(keys_B))  # equal in all processes, each of which has some of the rows
    placed = jax.make_array_from_callback(words.shape, named(mesh, P(ROWS)), lambda rows: words[rows])
    return jax.random.wrap_key_data(placed)


def empty_cache(model: CausalLM, size: int, slots: int) -> tuple[jax.Array, KVCache]:
    """(hidden states, cache) of a batch before its first chunk: all zeros, on one device."""
    dtype = model.model.embed_tokens.weight[...].dtype
    return jnp.zeros((size, model.config.embed_dim), dtype), KVCache.empty(model.config, size, slots, dtype)


def _prefill(parts: ModelParts, model: CausalLM, batch: _Batch) -> tuple[jax.Array, KVCache]:
    size, _ = batch.tokens_BP.shape
    shapes = row_shapes(jax.eval_shape(lambda: empty_cache(model, size, batch.slots)), batch.mesh)
    last_BD, cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), shapes)
    for start, length in chunks(int(batch.lengths_B.max())):
        tokens_BT, start_B = batch.tokens_BP[:, start : start + length], np.full(size, start, np.int32)
        last_BD, cache = prefill_chunk(parts, tokens_BT, start_B, batch.lengths_B, last_BD, cache, mesh=batch.mesh)
    return last_BD, cache


def _decode(
    parts: ModelParts, model: CausalLM, batch: _Batch, rows: int, sampling: Sampling, limits: _Limits
) -> Iterator[DecodeStep]:
    sampling = dataclasses.replace(sampling, seed=0)  # the keys have it: another seed needs no other program
    last_BD, cache = _prefill(parts, model, batch)
    running = set(range(rows))
    next_B = next_token(parts, last_BD, batch.keys_B, np.int32(0), sampling, mesh=batch.mesh)
    append = decode_step.jitted(parts)
    for index in itertools.count():
        upcoming_B = next_B
        if index + 1 < limits.max_new_tokens:  # dispatched before the tokens are read, so that no device waits for us
            # Positions of rows that have ended are clipped to the cache; their tokens are not read.
            start_B = np.minimum(batch.lengths_B + index, batch.slots - 1)
            given = next_B, start_B, cache, batch.keys_B, np.int32(index + 1)
            upcoming_B, cache = append(parts, *given, sampling, mesh=batch.mesh)
        tokens_B = np.asarray(next_B)
        steps = [limits.step(row, int(tokens_B[row]), int(batch.lengths_B[row]), index + 1) for row in sorted(running)]
        running -= {step.row for step in steps if step.end is not None}
        yield from steps
        if not running:  # the step in flight ends before its cache and another batch's are both in memory
            jax.block_until_ready(upcoming_B)
            return
        next_B = upcoming_B
