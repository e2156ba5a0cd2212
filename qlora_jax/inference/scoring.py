"""How likely a model finds given tokens: sums of -log p from f32 logits, and whether greedy decoding would write them.

Rows go through the model right-padded to a few lengths, so that each length is compiled once; the head is applied where
a token is scored, and nowhere else.

Dimension key: B rows of a batch, T positions, M = B T, D embed, V vocab, C tokens of a chunk.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float64, Int, Int32, Int64

from qlora_jax.models.partition import Lora, combine

BATCH_TOKENS = 4096  # positions that go through the model at once, padding included; a longer row goes alone
CHUNK = 256  # tokens whose logits exist at once

ScoredIds = tuple[Int32[np.ndarray, "_"], Bool[np.ndarray, "_"]]  # ids of a row, and which of them are scored


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowScores:
    """What a model thinks of each row's scored tokens.

    Fields:
      nll: sum of -log p over them, in nats.
      tokens: how many they are.
      exact: each is the likeliest token, given those before: greedy decoding writes exactly this.
      begins: so is each but the last, which is the end-of-turn token of an answer: greedy decoding begins with this.
    """

    nll: Float64[np.ndarray, " rows"]
    tokens: Int64[np.ndarray, " rows"]
    exact: Bool[np.ndarray, " rows"]
    begins: Bool[np.ndarray, " rows"]

    @property
    def mean_nll(self) -> float:
        """Sum over all rows / number of tokens."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp(mean_nll)."""
        return math.exp(self.mean_nll)


@functools.partial(jax.jit, static_argnames="graphdef")
def score_tokens(
    graphdef: nnx.GraphDef,
    lora: Lora,
    base: nnx.State,
    tokens_BT: Int[Array, "B T"],
    at_M: Int[Array, " M"],
    count: Int[Array, ""],
) -> tuple[Float[Array, " M"], Bool[Array, " M"]]:
    """(-log p(token | those before it in its row), whether it is the likeliest one) of the first `count` of `at_M`.

    Args:
      at_M: indices into the flattened tokens, a multiple of CHUNK; never the first of a row.
    """
    model = combine(graphdef, lora, base)
    hidden_MD, tokens_M = model.hidden(tokens_BT), tokens_BT.reshape(-1)

    def chunk(index, sums):
        at_C = jax.lax.dynamic_slice_in_dim(at_M, index * CHUNK, CHUNK)
        targets_C = tokens_M[at_C]
        logits_CV = model.head.logits(hidden_MD[at_C - 1])
        target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        found = jax.nn.logsumexp(logits_CV, axis=-1) - target_C, jnp.argmax(logits_CV, axis=-1) == targets_C
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(s, f, index * CHUNK, 0) for s, f in zip(sums, found, strict=True)
        )

    empty = jnp.zeros(at_M.shape, jnp.float32), jnp.zeros(at_M.shape, bool)
    return jax.lax.fori_loop(0, -(-count // CHUNK), chunk, empty)


def answer_scores(
    graphdef: nnx.GraphDef,
    lora: Lora,
    base: nnx.State,
    rows: Sequence[ScoredIds],
    progress: Callable[[int], None] = lambda rows_done: None,
) -> RowScores:
    """The scores of each row, in order; a row's first token is never scored, since nothing stands before it.

    A row may be one longer than the model's positions: its last token is only predicted.

    Raises:
      ValueError: rows with nothing to score, or longer than the model's positions: all of them, by index.
    """
    _check(rows, combine(graphdef, lora, base).config.max_positions)
    nll, misses = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
    last_missed = np.zeros(len(rows), bool)
    tokens = np.array([int(scored[1:].sum()) for _, scored in rows], np.int64)
    done = 0
    for indices, tokens_BT in batches_by_length([ids for ids, _ in rows]):
        row_K, at_K = _scored_places(rows, indices, tokens_BT.shape[1])
        nll_K, hit_K = _score(graphdef, lora, base, tokens_BT, at_K)
        np.add.at(nll, row_K, nll_K.astype(np.float64))
        np.add.at(misses, row_K, ~hit_K)
        last_missed[row_K] = ~hit_K  # the last assignment to an index stays, and places are in order
        done += len(indices)
        progress(done)
    return RowScores(nll=nll, tokens=tokens, exact=misses == 0, begins=misses == last_missed)


def windows(ids: Sequence[int], size: int, stride: int | None = None, count: int | None = None) -> list[ScoredIds]:
    """Rows of `size` ids that begin `stride` ids apart; the last may be shorter.

    Each id is scored once, in the first row that holds it, with at least size - stride ids before it; but never the
    first of a row, since nothing stands before it.

    Args:
      stride: from 1 to size; None: size, no overlap.
      count: how many rows at most.

    Raises:
      ValueError: fewer than two ids.
    """
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} tokens: at least 2 are needed, since the first is not scored")
    if stride is None or stride == size:
        starts = range(0, len(ids) - 1, size)[:count]  # a last window of one id would score nothing
        return [(row := np.array(ids[start : start + size], np.int32), np.ones(len(row), bool)) for start in starts]
    starts = range(0, max(len(ids) - size, 0) + stride, stride)[:count]
    rows = [np.array(ids[start : start + size], np.int32) for start in starts]
    seen = [size - stride if start else 0 for start in starts]
    return [(row, np.arange(len(row)) >= before) for row, before in zip(rows, seen, strict=True)]


def padded_length(length: int) -> int:
    """The smallest of 32, 48, 64, 96, 128, 192, ... that is at least `length`."""
    size = 32
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _check(rows: Sequence[ScoredIds], max_positions: int) -> None:
    problems = [
        f"row {index}: {len(ids)} tokens, and the model has {max_positions} positions"
        for index, (ids, _) in enumerate(rows)
        if len(ids) > max_positions + 1
    ]
    problems += [f"row {index}: no token to score" for index, (_, scored) in enumerate(rows) if not scored[1:].any()]
    if problems:
        raise ValueError("\n  ".join(["can't score:", *problems]))


def batches_by_length(rows: Sequence[Int32[np.ndarray, "_"]]) -> Iterator[tuple[list[int], np.ndarray]]:
    """(indices of rows, their ids padded [B, T]), longest first; B follows from T: there is one shape for each T."""
    longest_first = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    at_once = 1 << (len(rows) - 1).bit_length()
    while longest_first:
        length = padded_length(len(rows[longest_first[0]]))
        batch = min(max(1, BATCH_TOKENS // length), at_once)
        indices, longest_first = longest_first[:batch], longest_first[batch:]
        tokens_BT = np.zeros((batch, length), np.int32)
        for place, index in enumerate(indices):
            tokens_BT[place, : len(rows[index])] = rows[index]
        yield indices, tokens_BT


def _scored_places(rows: Sequence[ScoredIds], indices: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(index of the row, place in the flattened batch) of each scored token."""
    places = [np.flatnonzero(rows[index][1][1:]) + 1 for index in indices]
    row_K = np.repeat(np.array(indices), [len(p) for p in places])
    return row_K, np.concatenate([p + i * length for i, p in enumerate(places)])


def _score(
    graphdef: nnx.GraphDef, lora: Lora, base: nnx.State, tokens_BT: np.ndarray, at_K: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    at_M = np.ones(-(-tokens_BT.size // CHUNK) * CHUNK, np.int32)
    at_M[: len(at_K)] = at_K
    nll_M, hit_M = score_tokens(graphdef, lora, base, tokens_BT, at_M, np.int32(len(at_K)))
    return np.asarray(nll_M)[: len(at_K)], np.asarray(hit_M)[: len(at_K)]
