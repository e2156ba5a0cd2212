"""Divergence of a model from its reference on the tokens of given answers, by their full predictions.

Dimension key: B rows of a batch, T positions, D embed, M padded scored tokens, S devices with rows.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float64, Int

from qlora_jax.evaluation.loglikelihood import batches_of, branching_of, check_scorable, scoring_inputs
from qlora_jax.evaluation.shared_prefixes import ScoredIds, pack_rows
from qlora_jax.inference.mesh_inference import row_shards, run_on_mesh
from qlora_jax.inference.result_cache import NO_CACHE, ResultCache
from qlora_jax.models.partition import ModelParts, combine
from qlora_jax.nn.lm_head.divergence import token_divergence
from qlora_jax.sharding import AnyMesh, gather_rows, mesh_of


@functools.partial(jax.jit, static_argnames="mesh")
def divergence_of_tokens(
    both: tuple[ModelParts, ModelParts],
    tokens_BT: Int[Array, "B T"],
    branches_BT: Int[Array, "B T"] | None,
    before_M: Int[Array, " M"],
    count: Int[Array, "*S"],
    *,
    mesh: AnyMesh | None = None,
) -> jax.Array:
    """Returns KL(model || reference) of the token after each of the first `count` positions `before`, in nats.

    Args:
      both: the model and its reference.
      tokens_BT, branches_BT, before_M, count, mesh: see `loglikelihood.score_tokens`.
    """

    def program(both, tokens_BT, branches_BT, before_M, count):
        branching = None if branches_BT is None else branching_of(branches_BT)
        models = [combine(parts) for parts in both]
        hidden = [model.hidden(tokens_BT, segments_BT=branches_BT, branching=branching)[before_M] for model in models]
        wanted_M = jnp.arange(before_M.shape[0]) < count
        found_M = token_divergence(hidden[0], models[0].head, hidden[1], models[1].head, wanted_M)
        return gather_rows(found_M, mesh, axis=0)

    return run_on_mesh(program, both, (tokens_BT, branches_BT, before_M, count), mesh, P())


def divergence_of_rows(
    parts: ModelParts,
    reference: ModelParts,
    rows: Sequence[ScoredIds],
    progress: Callable[[int], None] = lambda rows_done: None,
    cache: ResultCache = NO_CACHE,
) -> Float64[np.ndarray, " rows"]:
    """Returns the sum over each row's scored tokens of KL(model || reference) at the position before, in nats.

    Args:
      rows, progress: see `loglikelihood.score_rows`.
      cache: results of this model with this reference.
    """
    model = combine(parts)
    check_scorable(rows, model)
    mesh = mesh_of(parts)
    found, done, devices = np.zeros(len(rows)), 0, row_shards(mesh)
    for batch, packed in batches_of(pack_rows(rows, share=not model.config.rotations_depend_on_length), devices):
        inputs, row_K, place_K = scoring_inputs(batch, packed, devices)
        given = inputs.tokens_BT, inputs.branches_BT, inputs.before_M, inputs.count
        compute = functools.partial(divergence_of_tokens, (parts, reference), *given, mesh=mesh)
        (kl_M,) = cache.get_or_compute(given, lambda compute=compute: (compute(),))
        np.add.at(found, row_K, kl_M[place_K].astype(np.float64))
        done += len(np.unique(row_K))
        progress(done)
    return found
