"""Computes the outputs of a model's sequence head for texts: logits, numbers, rewards, or pooled hidden states.

Texts are padded on the right, where no token sees the padding, to a few lengths, so that each length compiles once.

Dimension key: R texts, B rows of a batch, T positions, C outputs.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float64, Int, Int32

from qlora_jax.evaluation.batches import Batch, batches_by_length, pad_rows
from qlora_jax.inference.lowering import LoweredProgram, lower_program
from qlora_jax.inference.mesh_inference import row_shards, run_on_mesh
from qlora_jax.inference.result_cache import NO_CACHE, ResultCache
from qlora_jax.models.model_function import ModelFunction
from qlora_jax.models.partition import ModelParts, combine
from qlora_jax.sharding import AnyMesh, gather_rows, mesh_of

TextIds = Int32[np.ndarray, " _"]


@functools.partial(ModelFunction, static_argnames="mesh")
def outputs_of_batch(
    parts: ModelParts, tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, " B"], *, mesh: AnyMesh | None = None
) -> Float[Array, "B C"]:
    """Returns the head's outputs for one text per row, in f32.

    Args:
      lengths_B: the number of tokens of each text; 0 for a row of padding.
    """

    def program(parts: ModelParts, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
        model = combine(parts)
        assert model.score is not None
        positions_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        sequences_BT = (positions_T[None] >= lengths_B[:, None]).astype(jnp.int32)
        outputs_BC = model.score(model.hidden(tokens_BT), sequences_BT, 1)[:, 0]
        return gather_rows(outputs_BC, mesh, axis=0)

    return run_on_mesh(program, parts, (tokens_BT, lengths_B), mesh, P())


def sequence_outputs(
    parts: ModelParts,
    texts: Sequence[TextIds],
    progress: Callable[[int], None] = lambda texts_done: None,
    cache: ResultCache = NO_CACHE,
) -> Float64[np.ndarray, "R C"]:
    """Returns the head's outputs for each text, in order.

    Args:
      progress: called with the number of texts done so far.
      cache: outputs of this model.
    """
    found: dict[int, np.ndarray] = {}
    mesh = mesh_of(parts)
    for batch in _batches(texts, mesh):
        inputs = _inputs(texts, batch)
        (outputs_BC,) = cache.get_or_compute(inputs, lambda i=inputs: (outputs_of_batch(parts, *i, mesh=mesh),))
        found |= dict(zip(batch.rows, outputs_BC, strict=False))
        progress(len(found))
    return np.stack([found[index] for index in range(len(texts))]).astype(np.float64)


def lower_outputs(parts: ModelParts, texts: Sequence[TextIds]) -> Iterator[LoweredProgram]:
    """Lowers the program of the largest batch; `parts` may be ShapeDtypeStructs."""
    batch = max(_batches(texts, mesh_of(parts)), key=lambda batch: batch.positions)
    yield lower_program(batch.shape, outputs_of_batch, parts, _inputs(texts, batch))


def _batches(texts: Sequence[TextIds], mesh: AnyMesh | None) -> list[Batch]:
    return batches_by_length([len(ids) for ids in texts], row_shards(mesh))


def _inputs(texts: Sequence[TextIds], batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    members = [texts[row] for row in batch.rows]
    lengths_B = np.zeros(batch.size, np.int32)
    lengths_B[: len(members)] = [len(ids) for ids in members]
    return pad_rows(batch, members), lengths_B
