"""Running sums over the logits of a frozen head, in tiles of its rows, so that [tokens, vocab] never exists.

As in flash attention, exp(logit - largest so far) is summed tile by tile, so one pass gives log-sum-exp. Other
statistics of the logits are computed in the same pass.

Dimension key: D embed, V vocab, C tokens of a chunk, W rows of the head in a tile.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dense_matmul import dot_nn
from pallas_kernels.devices import target_device
from qlora_jax.nn.lm_head.head import Head


class Tile(NamedTuple):
    """The size of a tile: `tokens` hidden states times `rows` of the head."""

    tokens: int
    rows: int


# Tiles by platform. On CPUs, [256, 2048] logits fit a core's cache of 2 MB, 1.6 times as fast as [256, V]; with 1 MB
# both are equally fast. On other platforms a tile has the whole head, because XLA on GPUs copies a tile before it
# multiplies. 512 tokens keep products above 300 FLOP per byte of the head, about what the fastest cards compute.
TILES = {"cpu": Tile(256, 2048)}
WHOLE_HEAD = Tile(512, 2**31)


def tile_size(platform: str, tokens: int, vocabulary: int) -> Tile:
    """Returns the tile of a platform, at most as large as the work."""
    tile = TILES.get(platform, WHOLE_HEAD)
    return Tile(min(tile.tokens, tokens), min(tile.rows, vocabulary))


class RunningSums(NamedTuple):
    """Statistics of the logits l over the tiles so far.

    Fields:
      largest_C: the largest logit.
      sum_C: sum exp(l - largest).
      target_C: the target's logit; 0 until its tile.
      weighted_CD: sum exp(l - largest) w; None if no gradient is required.
      first_C: the smallest row that has the largest logit; None if not required.
      logit_C: sum exp(l - largest) l; None if no entropy is required.
    """

    largest_C: jax.Array
    sum_C: jax.Array
    target_C: jax.Array
    weighted_CD: jax.Array | None = None
    first_C: jax.Array | None = None
    logit_C: jax.Array | None = None

    @property
    def lse_C(self) -> jax.Array:
        """log sum exp(l)."""
        return jnp.log(self.sum_C) + self.largest_C

    @property
    def nll_C(self) -> jax.Array:
        """-log softmax(l)[target]."""
        return self.lse_C - self.target_C

    @property
    def entropy_C(self) -> jax.Array | None:
        """-sum softmax(l) log softmax(l); None if it is not required."""
        return None if self.logit_C is None else self.lse_C - self.logit_C / self.sum_C


def sum_over_tiles(
    hidden_CD: jax.Array,
    head: Head,
    targets_C: jax.Array,
    *,
    weighted: bool = False,
    first: bool = False,
    entropy: bool = False,
) -> RunningSums:
    """Sums over the whole head.

    Args:
      weighted: True to compute `weighted_CD`.
      first: True to compute `first_C`.
      entropy: True to compute `logit_C`.
    """

    def add(run: RunningSums, tiles: Sequence[Head], start: jax.typing.ArrayLike) -> RunningSums:
        return _add_tile(run, hidden_CD, tiles[0], targets_C, start)

    return fold_tiles(add, _start(hidden_CD, weighted, first, entropy), (head,), hidden_CD.shape[0])


def fold_tiles[Run](
    add: Callable[[Run, Sequence[Head], jax.typing.ArrayLike], Run], run: Run, heads: Sequence[Head], tokens: int
) -> Run:
    """Returns the statistics of heads of one vocabulary over all tiles: full ones in a loop, then the rest.

    Args:
      add: (statistics so far, a tile of each head, its first row) -> statistics.
      run: the statistics before the first tile.
      tokens: hidden states of a tile.
    """
    vocabulary = heads[0].weight_VD.shape[0]
    rows = tile_size(target_device().platform, tokens, vocabulary).rows
    if rows == vocabulary:
        return add(run, heads, 0)
    whole, rest = divmod(vocabulary, rows)

    def one(index: jax.Array, run: Run) -> Run:
        tiles = [head.rows(lambda x: jax.lax.dynamic_slice_in_dim(x, index * rows, rows)) for head in heads]
        return add(run, tiles, index * rows)

    run = jax.lax.fori_loop(0, whole, one, run)
    return add(run, [head.rows(lambda x: x[-rest:]) for head in heads], whole * rows) if rest else run


def first_id_where(found_CW: jax.Array, ids_W: jax.Array) -> jax.Array:
    """Returns the smallest id that is found; XLA on CPUs vectorizes this form, unlike jnp.argmax."""
    return jnp.min(jnp.where(found_CW, ids_W[None], jnp.iinfo(jnp.int32).max), axis=1)


def _start(hidden_CD: jax.Array, weighted: bool, first: bool, entropy: bool) -> RunningSums:
    zeros_C = jnp.zeros(hidden_CD.shape[0], jnp.float32)
    return RunningSums(
        largest_C=zeros_C - jnp.inf,
        sum_C=zeros_C,
        target_C=zeros_C,
        weighted_CD=jnp.zeros(hidden_CD.shape, jnp.float32) if weighted else None,
        first_C=zeros_C.astype(jnp.int32) if first else None,
        logit_C=zeros_C if entropy else None,
    )


def _add_tile(
    run: RunningSums, hidden_CD: jax.Array, tile: Head, targets_C: jax.Array, start: jax.typing.ArrayLike
) -> RunningSums:
    """Adds one tile, whose first row is row `start` of the head."""
    logits_CW = tile.logits(hidden_CD)
    rows, place_C = logits_CW.shape[1], targets_C - start
    tile_C = jnp.max(logits_CW, axis=-1)
    largest_C = jnp.maximum(run.largest_C, tile_C)
    exp_CW = jnp.exp(logits_CW - largest_C[:, None])
    shrink_C = jnp.exp(run.largest_C - largest_C)
    at_place_C = jnp.take_along_axis(logits_CW, jnp.clip(place_C, 0, rows - 1)[:, None], axis=-1)[:, 0]
    weighted_CD, first_C, logit_C = run.weighted_CD, run.first_C, run.logit_C
    if weighted_CD is not None:
        slope_CW = tile.slope(logits_CW)
        factors_CW = exp_CW if slope_CW is None else exp_CW * slope_CW
        weighted_CD = weighted_CD * shrink_C[:, None] + dot_nn(factors_CW.astype(hidden_CD.dtype), tile.weight_VD)
    if first_C is not None:
        in_tile_C = start + first_id_where(logits_CW == tile_C[:, None], jnp.arange(rows))
        first_C = jnp.where(tile_C > run.largest_C, in_tile_C, first_C)
    if logit_C is not None:
        finite_CW = jnp.where(jnp.isneginf(logits_CW), 0.0, logits_CW)
        logit_C = logit_C * shrink_C + jnp.sum(exp_CW * finite_CW, axis=-1)
    return RunningSums(
        largest_C=largest_C,
        sum_C=run.sum_C * shrink_C + jnp.sum(exp_CW, axis=-1),
        target_C=jnp.where((place_C >= 0) & (place_C < rows), at_place_C, run.target_C),
        weighted_CD=weighted_CD,
        first_C=first_C,
        logit_C=logit_C,
    )
