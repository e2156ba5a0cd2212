"""The programs of an engine: one that runs the model on tokens of any rows, and the arrays of its cache.

A decode call has one token of each of R rows, [R, 1]. A prompt call has M tokens of any rows, [1, M]. On a mesh each
device has its own rows and its own pages, so a decode call is [D R, 1] and a prompt call [D, M].

Dimension key: D devices, B, T tokens of a call, R rows, V vocab, M = B T, L layers, I pages of a row.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import KVPages
from pallas_kernels.attention.pages import PAGE
from pallas_kernels.lazy_zeros import lazy_zeros
from qlora_jax.inference.engine.kv_page_pool import groups_of, most_pages
from qlora_jax.inference.engine.token_sampler import Choice, log_probabilities
from qlora_jax.inference.mesh_inference import cache_specs, row_shapes, row_shards, run_on_mesh
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import ModelFunction, ModelParts, combine
from qlora_jax.nn.request_adapters import set_own
from qlora_jax.sharding import AnyMesh, gather_rows

ROW_COUNTS = (1, 2, 4, 8, 16)  # rows of a decode call on each device
PROMPT_TOKENS = (32, 128, 512)  # tokens of a prompt call on each device
FIRST_LENGTH = 256  # rotations that depend on a row's length take it from 256, 512, 1024, ...
FIRST_BLOCKS = 32  # a table has room for 32, 128, 512, ... pages of each row


def round_up(number: int, sizes: tuple[int, ...]) -> int:
    """Returns the first size that is at least `number`; `sizes` are ascending."""
    return next(size for size in sizes if size >= number)


def prompt_call(tokens: int) -> int:
    """Returns the size of a call for so many waiting tokens: one that they nearly fill, or that fills with them."""
    smaller = [size for size in PROMPT_TOKENS if size <= tokens]
    larger = [size for size in PROMPT_TOKENS if size >= tokens]
    return larger[0] if larger and (not smaller or 2 * tokens > larger[0]) else smaller[-1]


def table_blocks(positions: int, config: ModelConfig) -> int:
    """Returns the number of pages per row of a table for rows of so many positions."""
    blocks = FIRST_BLOCKS
    while blocks * PAGE < positions:
        blocks *= 4
    return min(blocks, -(-config.max_positions // PAGE))


def rotation_length(positions: int, config: ModelConfig) -> int | None:
    """Returns the length by which a row of so many positions rotates; None for rotations that depend on none."""
    if not config.rotations_depend_on_length:
        return None
    length = FIRST_LENGTH
    while length < positions:
        length *= 2
    return min(length, config.max_positions)


def page_bytes(config: ModelConfig, dtype: DTypeLike) -> int:
    """Returns the bytes of one page, with its scales."""
    per_head = config.head_dim * jnp.dtype(dtype).itemsize + 4 * (jnp.dtype(dtype) == jnp.int8)
    return 2 * config.num_kv_heads * PAGE * per_head


def pages_for(config: ModelConfig, positions: Sequence[int], devices: int) -> int:
    """Returns the pages on each device with which no row of so many positions waits for pages.

    It is rounded up by at most a quarter, because another number of pages is another program.
    """
    groups, rows = groups_of(config), min(-(-len(positions) // devices), ROW_COUNTS[-1])
    limited = [min(each, config.max_positions) for each in positions]
    most = sorted(most_pages(groups, each, PROMPT_TOKENS[-1]) for each in limited)
    pages = sum(most[-rows:]) + 1
    unit = 1 << max(0, pages.bit_length() - 3)
    return -(-pages // unit) * unit


def empty_cache(config: ModelConfig, pages: int, dtype: DTypeLike, mesh: AnyMesh | None) -> KVPages:
    """Returns `pages` pages of zeros on each device, without a table; one CPU allocates pages when they are written."""
    shapes = row_shapes(cache_shapes(config, pages * row_shards(mesh), dtype), mesh)
    if mesh is None:
        return jax.tree.map(lambda leaf: lazy_zeros(leaf.shape, leaf.dtype), shapes)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), shapes)


def cache_shapes(config: ModelConfig, pages: int, dtype: DTypeLike, rows: int = 0, blocks: int = 0) -> KVPages:
    """Returns the shapes of a cache and its table."""
    sizes = pages, config.num_kv_heads, config.head_dim, dtype
    return jax.eval_shape(lambda: KVPages.empty(*sizes, jnp.zeros((config.num_layers, rows, blocks), jnp.int32)))


@functools.partial(ModelFunction, static_argnames=("length", "mesh"), donate_argnames="cache")
def advance(
    parts: ModelParts,
    tokens_M: Int[Array, " M"],
    rows_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    last_R: Int[Array, " R"],
    cache: KVPages,
    own_BT: Int[Array, "B T"] | None = None,
    *,
    length: int | None = None,
    mesh: AnyMesh | None = None,
) -> tuple[Float[Array, "R V"], KVPages]:
    """Runs the model on tokens and writes their keys and values.

    Args:
      rows_BT: row of the cache's table of each token; on a mesh, of its device's part of it.
      positions_BT: position of each token; -1 is padding.
      last_R: the tokens, as numbers within the call, after which the next one is wanted.
      own_BT: number of the adapter of each token, if the model has adapters of several runs.
      length: see `CausalLM.extend`.

    Returns:
      (logits after the tokens of `last_R` of all devices, in f32, on every device; the cache).
    """
    results = P(), cache_specs(cache)
    program = functools.partial(_advance, length, mesh)
    return run_on_mesh(program, parts, (tokens_M, rows_BT, positions_BT, last_R, cache, own_BT), mesh, results)


SCORED_TOGETHER = 32  # tokens whose logits are in memory at once


@functools.partial(ModelFunction, static_argnames=("likeliest", "length"), donate_argnames="cache")
def advance_and_score(
    parts: ModelParts,
    tokens_M: Int[Array, " M"],
    rows_BT: Int[Array, "1 M"],
    positions_BT: Int[Array, "1 M"],
    last_R: Int[Array, " R"],
    cache: KVPages,
    own_BT: Int[Array, "1 M"] | None,
    next_M: Int[Array, " M"],
    *,
    likeliest: int,
    length: int | None = None,
) -> tuple[Float[Array, "R V"], KVPages, Choice]:
    """Runs `advance` on one device, and scores the token after each one.

    Returns:
      (logits, cache, the tokens `next_M` with their log-probabilities and those of the likeliest ones).
    """
    model, hidden_MD, cache = _extended(parts, tokens_M, rows_BT, positions_BT, cache, own_BT, length)
    groups = hidden_MD.reshape(-1, SCORED_TOGETHER, hidden_MD.shape[1]), next_M.reshape(-1, SCORED_TOGETHER)
    scores = jax.lax.map(lambda each: log_probabilities(model.head.logits(each[0]), each[1], likeliest), groups)
    flat = [values.reshape(len(next_M), *values.shape[2:]) for values in scores]
    return model.head.logits(hidden_MD[last_R]), cache, Choice(next_M, *flat)


def _advance(length, mesh, parts, tokens_M, rows_BT, positions_BT, last_R, cache, own_BT):
    model, hidden_MD, cache = _extended(parts, tokens_M, rows_BT, positions_BT, cache, own_BT, length)
    return gather_rows(model.head.logits(hidden_MD[last_R]), mesh, axis=0), cache


def _extended(parts, tokens_M, rows_BT, positions_BT, cache, own_BT, length) -> tuple[CausalLM, jax.Array, KVPages]:
    """Returns (the model, hidden states of the tokens, the cache with them)."""
    model = combine(parts)
    if own_BT is not None:
        set_own(model, own_BT.reshape(-1))
    return model, *model.extend(tokens_M.reshape(rows_BT.shape), rows_BT, positions_BT, cache, length)


def decode_inputs(rows: int, positions: np.ndarray, mesh: AnyMesh | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (rows_BT, positions_BT, last_R) of a decode call; `positions` of all devices' rows."""
    numbers_R = np.tile(np.arange(rows, dtype=np.int32), row_shards(mesh))
    return numbers_R[:, None], positions.astype(np.int32)[:, None], numbers_R
