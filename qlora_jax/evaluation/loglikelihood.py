"""How likely a model finds given tokens: sums of -log p from f32 logits, and whether greedy decoding would write them.

Rows go through the model right-padded to a few lengths, so that each length is compiled once; the head is applied where
a token is scored, and nowhere else.

Dimension key: B rows of a batch, T positions, D embed, M places, K scored tokens.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float64, Int, Int64

from qlora_jax.evaluation.batches import Batch, batches_by_length, stacked
from qlora_jax.evaluation.shared_prefixes import Packed, ScoredIds, packed_rows
from qlora_jax.inference.lowering import Ahead, config_of, lowered
from qlora_jax.inference.result_cache import NOTHING_KEPT, Kept
from qlora_jax.models.partition import ModelParts, combine
from qlora_jax.nn.token_scores import TokenScores, token_scores

ROOM = 256  # places are a multiple of these
PADDING = -1  # no branch


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


@jax.jit
def score_tokens(
    parts: ModelParts,
    tokens_BT: Int[Array, "B T"],
    branches_BT: Int[Array, "B T"] | None,
    before_M: Int[Array, " M"],
    targets_M: Int[Array, " M"],
    count: Int[Array, ""],
) -> TokenScores:
    """Of the first `count` targets, each by the tokens up to its place `before`.

    Args:
      branches_BT: ids of a prompt (0) and its continuations; None where rows are whole texts.
      before_M: indices into the flattened tokens.
    """
    model = combine(parts)
    hidden_MD = model.hidden(tokens_BT, segments_BT=branches_BT, shared_prefix=branches_BT is not None)
    return token_scores(hidden_MD[before_M], model.head, targets_M, jnp.arange(before_M.shape[0]) < count)


def answer_scores(
    parts: ModelParts,
    rows: Sequence[ScoredIds],
    progress: Callable[[int], None] = lambda rows_done: None,
    kept: Kept = NOTHING_KEPT,
) -> RowScores:
    """The scores of each row, in order; a row's first token is never scored, since nothing stands before it.

    A row may be one longer than the model's positions: its last token is only predicted. A prompt that several rows
    begin with is computed once.

    Raises:
      ValueError: rows with nothing to score, or longer than the model's positions: all of them, by index.
    """
    config = combine(parts).config
    _check(rows, config.max_positions)
    nll, misses = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
    last_missed = np.zeros(len(rows), bool)
    tokens = np.array([int(scored[1:].sum()) for _, scored in rows], np.int64)
    done = 0
    for batch, packed in _batches(packed_rows(rows, share=config.supports_shared_prefix)):
        row_K, nll_K, hit_K = _score(parts, batch, packed, kept)
        np.add.at(nll, row_K, nll_K.astype(np.float64))
        np.add.at(misses, row_K, ~hit_K)
        last_missed[row_K] = ~hit_K  # the last assignment to an index stays, and places are in order
        done += len(np.unique(row_K))
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


def _check(rows: Sequence[ScoredIds], max_positions: int) -> None:
    problems = [
        f"row {index}: {len(ids)} tokens, and the model has {max_positions} positions"
        for index, (ids, _) in enumerate(rows)
        if len(ids) > max_positions + 1
    ]
    problems += [f"row {index}: no token to score" for index, (_, scored) in enumerate(rows) if not scored[1:].any()]
    if problems:
        raise ValueError("\n  ".join(["can't score:", *problems]))


def _batches(packed: Sequence[Packed]) -> Iterator[tuple[Batch, Sequence[Packed]]]:
    """Batches, each with what its indices are of: whole texts, then prompts with continuations."""
    for shared_prefix in (False, True):
        kind = [one for one in packed if (one.branches is not None) == shared_prefix]
        yield from ((batch, kind) for batch in batches_by_length([len(one.ids) for one in kind]))


def _score(
    parts: ModelParts, batch: Batch, packed: Sequence[Packed], kept: Kept
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, -log p, whether it is the likeliest) of each scored token of a batch."""
    inputs, row_K = _inputs(batch, packed)
    nll_K, hit_K = (x[: len(row_K)] for x in kept.result(inputs, lambda: score_tokens(parts, *inputs)))
    return row_K, nll_K, hit_K


def _inputs(batch: Batch, packed: Sequence[Packed]) -> tuple[tuple[Any, ...], np.ndarray]:
    """(what `score_tokens` is given of a batch, the row of each scored token)."""
    members = [packed[index] for index in batch.rows]
    row_K, targets_K = (np.concatenate([getattr(one, name) for one in members]) for name in ("row", "targets"))
    before_K = np.concatenate([one.before + place * batch.length for place, one in enumerate(members)])
    branches = [one.branches for one in members if one.branches is not None]
    branches_BT = stacked(batch, branches, fill=PADDING) if branches else None
    tokens_BT = stacked(batch, [one.ids for one in members])
    room = _room(tokens_BT.size, len(row_K))
    before_M, targets_M = (np.pad(x, (0, room - len(x))).astype(np.int32) for x in (before_K, targets_K))
    return (tokens_BT, branches_BT, before_M, targets_M, np.int32(len(row_K))), row_K


def scoring_ahead(parts: ModelParts, rows: Sequence[ScoredIds]) -> Iterator[Ahead]:
    """The programs for the largest batches that `answer_scores` makes of the rows: of whole texts, and of prompts with
    continuations."""
    share = config_of(parts).supports_shared_prefix
    largest: dict[bool, tuple[Batch, Sequence[Packed]]] = {}
    for batch, packed in _batches(packed_rows(rows, share=share)):
        kind = packed[0].branches is not None
        if kind not in largest or batch.positions > largest[kind][0].positions:
            largest[kind] = batch, packed
    for batch, packed in largest.values():
        yield lowered(batch.shape, score_tokens, parts, _inputs(batch, packed)[0])


def _room(positions: int, scored: int) -> int:
    """A multiple of ROOM that follows from a batch's shape, but where many tokens are scored after the same place."""
    room = -(-positions // ROOM) * ROOM
    while room < scored:
        room *= 2
    return room
