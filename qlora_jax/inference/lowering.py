"""Lowers inference programs from shapes, to know their memory before weights are loaded.

For a model on a mesh, shapes have shardings, and bytes are those of one device.

Dimension key: B batch, T positions of a call, D embed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from qlora_jax.inference.decode import batch_size, chunks, decode_step, empty_cache, prefill_chunk, slots_for
from qlora_jax.inference.mesh_inference import row_shapes, row_shards
from qlora_jax.inference.sampling import GREEDY, Sampling
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.kv_cache import KVCache
from qlora_jax.models.partition import (
    ModelFunction,
    ModelParts,
    combine,
    parts_specs,
    prepare_for_decoding,
    with_memory_of,
)
from qlora_jax.sharding import mesh_of, part_bytes, placed_shapes


class LoweredProgram(NamedTuple):
    """A program that is ready to compile.

    Fields:
      shape: description of its batch.
      lowered: the lowered function.
      live_bytes: bytes of its inputs, and of arrays that stay on the device while it runs, without the model.
    """

    shape: str
    lowered: jax.stages.Lowered
    live_bytes: int


def lower_program(
    shape: str,
    function: ModelFunction,
    parts: ModelParts,
    inputs: tuple[object, ...],
    extra_bytes: int = 0,
    **static: object,
) -> LoweredProgram:
    """Lowers `function(parts, *inputs, mesh=..., **static)` for the mesh of `parts`.

    Args:
      extra_bytes: bytes that stay on the device while the program runs, and are not inputs.
    """
    mesh = mesh_of(parts)
    shapes = row_shapes(inputs, mesh)
    return LoweredProgram(shape, function.lower(parts, *shapes, mesh=mesh, **static), part_bytes(shapes) + extra_bytes)


def lower_decoding(
    parts: ModelParts, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling = GREEDY
) -> Iterator[LoweredProgram]:
    """Lowers the two largest programs of decoding: the longest prefill chunk, and one decode step.

    Args:
      parts: arrays, or ShapeDtypeStructs.
      prompts: token ids of the prompts of one batch.
    """
    size, longest = batch_size(len(prompts), row_shards(mesh_of(parts))), max(map(len, prompts))
    decoding, added_bytes = _decoding_shapes(parts)

    def start(parts: ModelParts) -> tuple[jax.Array, KVCache]:
        model = combine(parts)
        return empty_cache(model, size, slots_for(longest + max_new_tokens, model.config))

    last_BD, cache = jax.eval_shape(start, decoding)
    keys_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
    tokens_BT = np.zeros((size, max(length for _, length in chunks(longest))), np.int32)
    start_B, shape = tokens_BT[:, 0], f"{size} x {cache.k.shape[3]} cache positions"
    prefill = (tokens_BT, start_B, start_B, last_BD, cache)
    yield lower_program(shape, prefill_chunk, decoding, prefill, added_bytes)
    step = (start_B, start_B, cache, keys_B, np.int32(0))
    yield lower_program(shape, decode_step, decoding, step, added_bytes, sampling=sampling)


def _decoding_shapes(parts: ModelParts) -> tuple[ModelParts, int]:
    """(shapes of the result of `prepare_for_decoding`, bytes of the arrays that it creates)."""
    mesh = mesh_of(parts)
    decoding = with_memory_of(jax.eval_shape(prepare_for_decoding, parts), parts)
    if mesh is not None:
        decoding = placed_shapes(decoding, parts_specs(decoding, mesh), mesh)
    shared = [
        leaf
        for name, leaves in decoding.lora.items()
        for key, leaf in leaves.items()
        if key in parts.lora[name] and leaf.dtype == parts.lora[name][key].dtype
    ]
    return decoding, part_bytes(decoding) - part_bytes((shared, parts.base))


def config_of(parts: ModelParts) -> ModelConfig:
    """The configuration of a model, given as arrays or as shapes."""
    found: list[ModelConfig] = []
    jax.eval_shape(lambda parts: found.append(combine(parts).config), parts)
    return found[0]
