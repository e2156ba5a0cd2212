"""Scores given tokens under a model and its reference, and the divergence of the model there, in one program.

Dimension key: B rows of a batch, T positions, D embed, M padded scored tokens, S devices with rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float64, Int

from qlora_jax.evaluation.loglikelihood import batches_of, branching_of, check_scorable, scoring_inputs
from qlora_jax.evaluation.shared_prefixes import ScoredIds
from qlora_jax.inference.mesh_inference import row_shards, run_on_mesh
from qlora_jax.inference.result_cache import NO_CACHE, ResultCache
from qlora_jax.models.partition import ModelFunction, ModelParts, combine
from qlora_jax.nn.lm_head.divergence import TokenComparison, compare_tokens
from qlora_jax.sharding import AnyMesh, gather_rows, mesh_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowComparison:
    """Sums over each row's scored tokens, in nats.

    Fields:
      nll, reference_nll: of -log p under the model and under its reference.
      divergence: of KL(model || reference) at the position before.
    """

    nll: Float64[np.ndarray, " rows"]
    reference_nll: Float64[np.ndarray, " rows"]
    divergence: Float64[np.ndarray, " rows"]


@functools.partial(ModelFunction, static_argnames="mesh")
def compare_given_tokens(
    both: tuple[ModelParts, ModelParts],
    tokens_BT: Int[Array, "B T"],
    branches_BT: Int[Array, "B T"] | None,
    before_M: Int[Array, " M"],
    targets_M: Int[Array, " M"],
    count: Int[Array, "*S"],
    *,
    mesh: AnyMesh | None = None,
) -> TokenComparison:
    """Compares the model with its reference at the first `count` targets, given the tokens up to `before`.

    Args:
      both: the model and its reference.
      tokens_BT, branches_BT, before_M, targets_M, count, mesh: see `loglikelihood.score_tokens`.
    """

    def program(both, tokens_BT, branches_BT, before_M, targets_M, count):
        branching = None if branches_BT is None else branching_of(branches_BT)
        models = [combine(parts) for parts in both]
        hidden = [model.hidden(tokens_BT, segments_BT=branches_BT, branching=branching)[before_M] for model in models]
        wanted_M = jnp.arange(before_M.shape[0]) < count
        found = compare_tokens(hidden[0], models[0].head, hidden[1], models[1].head, targets_M, wanted_M)
        return TokenComparison(*(gather_rows(of_token_M, mesh, axis=0) for of_token_M in found))

    return run_on_mesh(program, both, (tokens_BT, branches_BT, before_M, targets_M, count), mesh, P())


def compare_rows(
    parts: ModelParts,
    reference: ModelParts,
    rows: Sequence[ScoredIds],
    progress: Callable[[int], None] = lambda rows_done: None,
    cache: ResultCache = NO_CACHE,
) -> RowComparison:
    """Compares a model with its reference on each row, in order.

    Args:
      rows, progress: see `loglikelihood.score_rows`.
      cache: results of this model with this reference.
    """
    check_scorable(rows, combine(parts))
    mesh = mesh_of(parts)
    sums, done = np.zeros((3, len(rows))), 0
    for batch, packed in batches_of(parts, rows):
        inputs, row_K, place_K = scoring_inputs(batch, packed, row_shards(mesh))
        compute = functools.partial(compare_given_tokens, (parts, reference), *inputs, mesh=mesh)
        for sums_R, of_token_M in zip(sums, cache.get_or_compute(inputs, compute), strict=True):
            np.add.at(sums_R, row_K, of_token_M[place_K].astype(np.float64))
        done += len(np.unique(row_K))
        progress(done)
    return RowComparison(nll=sums[0], reference_nll=sums[1], divergence=sums[2])
