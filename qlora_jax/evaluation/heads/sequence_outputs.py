"""Computes the outputs of a model's sequence head for texts: logits, numbers, rewards, or pooled hidden states.

Many texts are packed into rows of one length, in which each sees only itself: few positions are padding, and one
program computes them all. If rotations depend on the row's length, each text has its own row.

Dimension key: R texts, B rows of a batch, T positions, S slots for the texts of a row, C outputs.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float64, Int, Int32

from qlora_jax.evaluation.packed_batches import PackedBatch, packed_batches
from qlora_jax.inference.lowering import LoweredProgram, config_of, lower_program
from qlora_jax.inference.mesh_inference import row_shards, run_on_mesh
from qlora_jax.inference.result_cache import NO_CACHE, ResultCache
from qlora_jax.models.model_function import ModelFunction
from qlora_jax.models.partition import ModelParts, combine
from qlora_jax.sharding import AnyMesh, gather_rows, mesh_of

TextIds = Int32[np.ndarray, " _"]


@functools.partial(ModelFunction, static_argnames=("slots", "mesh"))
def outputs_of_batch(
    parts: ModelParts,
    tokens_BT: Int[Array, "B T"],
    slots_BT: Int[Array, "B T"],
    *,
    slots: int,
    mesh: AnyMesh | None = None,
) -> Float[Array, "B S C"]:
    """Returns the head's outputs for the texts of each row, in f32; those of empty slots are undefined.

    Args:
      slots_BT: the slot of the text that each position belongs to, ascending; S for padding.
      slots: S.
    """

    def program(parts: ModelParts, tokens_BT: jax.Array, slots_BT: jax.Array) -> jax.Array:
        model = combine(parts)
        assert model.score is not None
        # One text per row needs no mask: no token sees the padding on its right.
        hidden_MD = model.hidden(tokens_BT, segments_BT=slots_BT if slots > 1 else None)
        return gather_rows(model.score(hidden_MD, slots_BT, slots), mesh, axis=0)

    return run_on_mesh(program, parts, (tokens_BT, slots_BT), mesh, P())


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
    for batch in _batches(parts, texts):
        arrays = batch.arrays(texts)
        compute = functools.partial(outputs_of_batch, parts, *arrays, slots=batch.slots, mesh=mesh)
        (outputs_BSC,) = cache.get_or_compute((*arrays, batch.slots), lambda compute=compute: (compute(),))
        for members, outputs_SC in zip(batch.packs, outputs_BSC, strict=False):
            found |= dict(zip(members, outputs_SC, strict=False))
        progress(len(found))
    return np.stack([found[index] for index in range(len(texts))]).astype(np.float64)


def lower_outputs(parts: ModelParts, texts: Sequence[TextIds]) -> Iterator[LoweredProgram]:
    """Lowers the program of the largest batch; `parts` may be ShapeDtypeStructs."""
    batch = max(_batches(parts, texts), key=lambda batch: batch.positions)
    yield lower_program(batch.shape, outputs_of_batch, parts, batch.arrays(texts), slots=batch.slots)


def _batches(parts: ModelParts, texts: Sequence[TextIds]) -> list[PackedBatch]:
    share = not config_of(parts).rotations_depend_on_length
    return packed_batches([len(ids) for ids in texts], row_shards(mesh_of(parts)), share=share)
