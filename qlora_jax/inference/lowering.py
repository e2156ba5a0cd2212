"""Lowers inference programs from shapes, to know their memory before weights are loaded.

For a model on a mesh, shapes have shardings, and bytes are those of one device.

Dimension key: B, T tokens of a call, R rows whose next token is wanted.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from pallas_kernels import aot
from qlora_jax import runtime
from qlora_jax.inference.engine.model_calls import (
    PROMPT_TOKENS,
    ROW_COUNTS,
    advance,
    cache_shapes,
    page_bytes,
    pages_for,
    prompt_call,
    round_up,
    table_blocks,
)
from qlora_jax.inference.mesh_inference import row_shapes, row_shards
from qlora_jax.models.config import ModelConfig
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


class ProgramMemory(NamedTuple):
    """Device memory that programs need in addition to the model and its state.

    Fields:
      size: bytes.
      program: the program that needs most.
    """

    size: int
    program: str


def most_memory(name: str, programs: Iterable[LoweredProgram]) -> ProgramMemory:
    """Compiles programs, and returns the most memory that one of them needs; `name` is what they are for."""
    found = []
    for program in programs:
        memory = aot.read_memory(program.lowered.compile().memory_analysis()).device
        size = program.live_bytes + memory.temporaries + memory.outputs - memory.aliases
        found.append(ProgramMemory(size, f"{name}, {program.shape}"))
    runtime.give_memory_back()
    return max(found)


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
    parts: ModelParts, prompts: Sequence[Sequence[int]], max_new_tokens: int, cache_bytes: int | None = None
) -> Iterator[LoweredProgram]:
    """Lowers the two largest programs of decoding: the longest call for prompts, and the one for all rows' next tokens.

    Args:
      parts: arrays, or ShapeDtypeStructs.
      prompts: token ids of the prompts of one batch.
      cache_bytes: limit of the cache on each device; None: as large as these prompts need.
    """
    devices, config = row_shards(mesh_of(parts)), config_of(parts)
    positions = [min(len(prompt) + max_new_tokens, config.max_positions) for prompt in prompts]
    of_device = sorted(map(len, prompts))[-min(-(-len(prompts) // devices), ROW_COUNTS[-1]) :]
    rows, tokens = round_up(len(of_device), ROW_COUNTS), prompt_call(min(sum(of_device), PROMPT_TOKENS[-1]))
    decoding, added_bytes = _decoding_shapes(parts)
    dtype = jax.eval_shape(lambda parts: combine(parts).model.embed_tokens.weight[...], decoding).dtype
    needed, blocks = pages_for(config, positions, devices), table_blocks(max(positions), config)
    most = needed if cache_bytes is None else cache_bytes // page_bytes(config, dtype)
    pages = devices * min(needed, most)
    calls = [("prompts", (devices, tokens), 1 if len(of_device) == 1 else ROW_COUNTS[-1])]
    for name, size, each in [*calls, ("replies", (devices * rows, 1), rows)]:
        tokens_BT, last_R = np.zeros(size, np.int32), np.zeros(devices * each, np.int32)
        cache = cache_shapes(config, pages, dtype, devices * each, blocks)
        shape = f"{name}, {devices * rows} rows, {pages:,} cache pages"
        yield lower_program(
            shape, advance, decoding, (tokens_BT.reshape(-1), tokens_BT, tokens_BT, last_R, cache), added_bytes
        )


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
