"""Scores given tokens: sums of -log p from f32 logits, and whether greedy decoding generates them.

Rows are padded on the right to a few lengths, so that each length compiles once. The output head is applied only where
a token is scored. A model that lies on a mesh is scored there: each device has its own rows and their scored tokens.

Dimension key: B rows of a batch, T positions, D embed, M padded scored tokens, K scored tokens, S devices with rows.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Int32

from pallas_kernels.attention.branching import Branching
from qlora_jax.evaluation.batches import Batch, batches_by_length, pad_rows
from qlora_jax.evaluation.shared_prefixes import PackedRow, ScoredIds, pack_rows
from qlora_jax.inference.engine.request import id_problems
from qlora_jax.inference.lowering import LoweredProgram, config_of, lower_program
from qlora_jax.inference.mesh_inference import row_shards, run_on_mesh
from qlora_jax.inference.result_cache import NO_CACHE, ResultCache
from qlora_jax.measures.metrics import RowScores
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import ModelFunction, ModelParts, combine
from qlora_jax.nn.lm_head.token_scores import TokenScores, token_scores
from qlora_jax.sharding import AnyMesh, gather_rows, mesh_of

PADDED_MULTIPLE = 256  # the padded number of scored tokens is a multiple of this
PADDING = np.iinfo(np.int32).max  # branch of a padding position; after all others, because ids of segments ascend


@functools.partial(ModelFunction, static_argnames="mesh")
def score_tokens(
    parts: ModelParts,
    tokens_BT: Int[Array, "B T"],
    branches_BT: Int[Array, "B T"] | None,
    before_M: Int[Array, " M"],
    targets_M: Int[Array, " M"],
    count: Int[Array, "*S"],
    *,
    mesh: AnyMesh | None = None,
) -> TokenScores:
    """Scores the first `count` targets, each given the tokens up to its position `before`.

    Args:
      branches_BT: 0 for a prompt, 1, 2, ... for its continuations; None if rows are whole texts.
      before_M: indices into the flattened tokens; on a mesh, into those of the device.
      targets_M: token ids; on a mesh, each device has equally many.
      count: a number; on a mesh of several devices, the number of each.
      mesh: the devices that share the model and the rows; None: one device.
    """

    def program(parts, tokens_BT, branches_BT, before_M, targets_M, count):
        model = combine(parts)
        branching = None if branches_BT is None else branching_of(branches_BT)
        hidden_MD = model.hidden(tokens_BT, segments_BT=branches_BT, branching=branching)
        scores = token_scores(hidden_MD[before_M], model.head, targets_M, jnp.arange(before_M.shape[0]) < count)
        return TokenScores(*(gather_rows(of_token_M, mesh, axis=0) for of_token_M in scores))

    inputs = tokens_BT, branches_BT, before_M, targets_M, count
    return run_on_mesh(program, parts, inputs, mesh, P())


def branching_of(branches_BT: jax.Array) -> Branching:
    """Returns the branching of rows that consist of a prompt, its continuations and padding."""
    depth_B1 = jnp.sum(branches_BT == 0, axis=1, keepdims=True, dtype=jnp.int32)
    continues_BT = (branches_BT > 0) & (branches_BT < PADDING)
    return Branching(jnp.where(continues_BT, 0, branches_BT), jnp.where(continues_BT, depth_B1, 0))


def score_rows(
    parts: ModelParts,
    rows: Sequence[ScoredIds],
    progress: Callable[[int], None] = lambda rows_done: None,
    cache: ResultCache = NO_CACHE,
) -> RowScores:
    """Scores each row, in order.

    The first token of a row is never scored, because no token precedes it. A row may be one token longer than the
    model's positions, because its last token is only predicted. A prompt that several rows share is computed once, and
    so are equal rows: their scores are equal to the last bit, wherever they stand.

    Args:
      rows: the ids of each row, and a mask of the scored ones.
      progress: called with the number of rows scored so far.
      cache: scores of this model.

    Raises:
      ValueError: rows without a scored token, or longer than the model's positions; the message lists them by index.
    """
    check_scorable(rows, combine(parts))
    distinct, index_R = _distinct(rows)
    nll, misses = np.zeros(len(distinct)), np.zeros(len(distinct), np.int64)
    last_missed = np.zeros(len(distinct), bool)
    tokens = np.array([int(scored[1:].sum()) for _, scored in rows], np.int64)
    done, copies = 0, np.bincount(index_R)
    for batch, packed in batches_of(parts, distinct):
        row_K, nll_K, hit_K = _score(parts, batch, packed, cache)
        np.add.at(nll, row_K, nll_K.astype(np.float64))
        np.add.at(misses, row_K, ~hit_K)
        last_missed[row_K] = ~hit_K  # tokens are in order, and NumPy stores the last value assigned to an index
        done += int(copies[np.unique(row_K)].sum())
        progress(done)
    exact, begins = misses == 0, misses == last_missed
    return RowScores(nll=nll[index_R], tokens=tokens, exact=exact[index_R], begins=begins[index_R])


def windows(ids: Sequence[int], size: int, stride: int | None = None, count: int | None = None) -> list[ScoredIds]:
    """Splits ids into rows of `size` ids that start `stride` ids apart; the last may be shorter.

    Each id is scored once, in the first row that contains it, after at least size - stride ids of context. The first id
    of a row is never scored, because no id precedes it.

    Args:
      stride: from 1 to `size`; None: `size`, so that rows do not overlap.
      count: maximum number of rows.

    Raises:
      ValueError: fewer than two ids.
    """
    if len(ids) < 2:
        raise ValueError(f"tokens: found {len(ids)}, expected at least 2, because the first is not scored")
    if stride is None or stride == size:
        starts = range(0, len(ids) - 1, size)[:count]  # a last window of one id would score nothing
        return [(row := np.array(ids[start : start + size], np.int32), np.ones(len(row), bool)) for start in starts]
    starts = range(0, max(len(ids) - size, 0) + stride, stride)[:count]
    rows = [np.array(ids[start : start + size], np.int32) for start in starts]
    overlaps = [size - stride if start else 0 for start in starts]
    return [(row, np.arange(len(row)) >= overlap) for row, overlap in zip(rows, overlaps, strict=True)]


def check_scorable(rows: Sequence[ScoredIds], model: CausalLM) -> None:
    max_positions = model.config.max_positions
    problems = [
        f"row {index}: too long (found {len(ids)} tokens; the model has {max_positions} positions)"
        for index, (ids, _) in enumerate(rows)
        if len(ids) > max_positions + 1
    ]
    num_ids = model.model.embed_tokens.num_ids
    problems += [each for index, (ids, _) in enumerate(rows) for each in id_problems(f"row {index}", ids, num_ids)]
    problems += [f"row {index}: no token to score" for index, (_, scored) in enumerate(rows) if not scored[1:].any()]
    if problems:
        raise ValueError("\n  ".join(["cannot score:", *problems]))


def batches_of(parts: ModelParts, rows: Sequence[ScoredIds]) -> Iterator[tuple[Batch, Sequence[PackedRow]]]:
    """Yields batches, each with the list that its indices refer to: whole texts, then prompts with continuations."""
    packed = pack_rows(rows, share=not config_of(parts).rotations_depend_on_length)
    for branching in (False, True):
        kind = [one for one in packed if (one.branches is not None) == branching]
        yield from (
            (batch, kind) for batch in batches_by_length([len(one.ids) for one in kind], row_shards(mesh_of(parts)))
        )


def _distinct(rows: Sequence[ScoredIds]) -> tuple[list[ScoredIds], Int[np.ndarray, " R"]]:
    """(the rows without repetitions, the index of each row among them)."""
    keys = [(ids.tobytes(), scored.tobytes()) for ids, scored in rows]
    distinct = dict(zip(keys, rows, strict=True))
    index = {key: place for place, key in enumerate(distinct)}
    return list(distinct.values()), np.array([index[key] for key in keys], np.int64)


def _score(
    parts: ModelParts, batch: Batch, packed: Sequence[PackedRow], cache: ResultCache
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, -log p, True if it is the likeliest token) of each scored token of a batch."""
    mesh = mesh_of(parts)
    inputs, row_K, place_K = scoring_inputs(batch, packed, row_shards(mesh))
    scores = cache.get_or_compute(inputs, lambda: score_tokens(parts, *inputs, mesh=mesh))
    nll_K, hit_K = (of_token_M[place_K] for of_token_M in scores)
    return row_K, nll_K, hit_K


class ScoringInputs(NamedTuple):
    """The arguments of `score_tokens` after the model."""

    tokens_BT: Int32[np.ndarray, "B T"]
    branches_BT: Int32[np.ndarray, "B T"] | None
    before_M: Int32[np.ndarray, " M"]
    targets_M: Int32[np.ndarray, " M"]
    count: Int32[np.ndarray, "*S"]


def scoring_inputs(
    batch: Batch, packed: Sequence[PackedRow], devices: int
) -> tuple[ScoringInputs, np.ndarray, np.ndarray]:
    """(the arguments of `score_tokens`, the row of each scored token, its index in the result)."""
    members = [packed[index] for index in batch.rows]
    row_K, targets_K = (np.concatenate([getattr(one, name) for one in members]) for name in ("row", "targets"))
    before_K = np.concatenate([one.before + index * batch.length for index, one in enumerate(members)])
    branches = [one.branches for one in members if one.branches is not None]
    branches_BT = pad_rows(batch, branches, fill=PADDING) if branches else None
    tokens_BT = pad_rows(batch, [one.ids for one in members])
    positions = tokens_BT.size // devices
    device_K = before_K // positions  # ascending, because tokens are in the order of rows
    count_S = np.bincount(device_K, minlength=devices)
    padded = _padded_count(positions, int(count_S.max()))
    place_K = np.arange(len(row_K)) + (padded * np.arange(devices) - np.cumsum(count_S) + count_S)[device_K]
    before_M, targets_M = np.zeros((2, devices * padded), np.int32)
    before_M[place_K], targets_M[place_K] = before_K % positions, targets_K
    count = np.squeeze(count_S.astype(np.int32))  # one device has a number
    return ScoringInputs(tokens_BT, branches_BT, before_M, targets_M, count), row_K, place_K


def lower_scoring(parts: ModelParts, rows: Sequence[ScoredIds]) -> Iterator[LoweredProgram]:
    """Lowers `score_rows` for the largest batch of whole texts and the largest batch of prompts with continuations."""
    devices = row_shards(mesh_of(parts))
    largest: dict[bool, tuple[Batch, Sequence[PackedRow]]] = {}
    for batch, packed in batches_of(parts, _distinct(rows)[0]):
        kind = packed[0].branches is not None
        if kind not in largest or batch.positions > largest[kind][0].positions:
            largest[kind] = batch, packed
    for batch, packed in largest.values():
        inputs, _, _ = scoring_inputs(batch, packed, devices)
        yield lower_program(batch.shape, score_tokens, parts, inputs)


def _padded_count(positions: int, scored: int) -> int:
    """The padded number of scored tokens.

    It depends only on the batch's shape, so that it adds no compilations, unless several tokens are scored after one
    position.
    """
    padded = -(-positions // PADDED_MULTIPLE) * PADDED_MULTIPLE
    while padded < scored:
        padded *= 2
    return padded
