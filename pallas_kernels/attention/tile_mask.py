"""Tiles of attention, and the mask of each tile.

A tile is a chunk of queries against a chunk of keys, for all rows and heads at once. Fully masked tiles are skipped:
keys after the queries, before a window, or before a packed segment.

Dimension key: B batch, T positions, N q-heads, K kv-heads, G = N / K q-heads a kv-head, H head_dim, Z = B K,
C positions of a chunk, M = G C, I chunks of queries, J chunks of P keys,
D number of chunks between keys and queries.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

# Positions per chunk. The scores of a tile should fit the processor's caches: on 2 cores, 9 heads of 256 x 256 or 36 of
# 128 x 128 are fastest. Lengths between, such as 192, are slower than both.
LARGE, SMALL = 256, 128
LARGE_FITS = 16  # largest product of rows and heads for which the large chunk is used
SHORT = 512  # up to this length, all keys that a chunk of queries sees are one tile


def _chunk(rows_and_heads: int, length: int) -> int:
    """Returns the chunk that pads least, or the larger one if both pad equally."""
    if length <= SMALL:
        return length
    large_is_best = rows_and_heads <= LARGE_FITS and length > SHORT and -length % LARGE == -length % SMALL
    return LARGE if large_is_best else SMALL


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Equal chunks of positions. The last one is padded at its end, where no real query sees a key."""

    batch: int
    length: int
    kv_heads: int
    chunk: int
    unrolled: bool = False  # True: no loop; each chunk of queries has all its keys in one tile

    @classmethod
    def of(cls, q_BTNH: jax.Array, k_BTKH: jax.Array) -> "Tiling":
        """Returns the tiling for these shapes."""
        batch, length, heads, _ = q_BTNH.shape
        unrolled = length <= SHORT and batch * heads <= LARGE_FITS
        return cls(batch, length, k_BTKH.shape[2], _chunk(batch * heads, length), unrolled)

    @property
    def chunks(self) -> int:
        """Number of chunks I."""
        return -(-self.length // self.chunk)

    @property
    def key_tiling(self) -> "Tiling":
        """The tiling of keys: that of queries, or one chunk if a tile may have any number of keys."""
        return dataclasses.replace(self, chunk=self.chunks * self.chunk) if self.unrolled else self

    def split(self, x_BTNH: Shaped[Array, "B T N H"]) -> Shaped[Array, "I Z M H"]:
        """Splits into chunks, with the heads that share a key head as rows of one matrix."""
        b, t, n, h = x_BTNH.shape
        x = jnp.pad(x_BTNH, ((0, 0), (0, self.chunks * self.chunk - t), (0, 0), (0, 0)))
        x = x.reshape(b, self.chunks, self.chunk, self.kv_heads, n // self.kv_heads, h)
        return x.transpose(1, 0, 3, 4, 2, 5).reshape(self.chunks, b * self.kv_heads, n // self.kv_heads * self.chunk, h)

    def join(self, x_IZMH: Shaped[Array, "I Z M H"]) -> Shaped[Array, "B T N H"]:
        """Inverts `split`."""
        i, _, m, h = x_IZMH.shape
        groups = m // self.chunk
        x = x_IZMH.reshape(i, self.batch, self.kv_heads, groups, self.chunk, h).transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(self.batch, i * self.chunk, self.kv_heads * groups, h)[:, : self.length]

    def over_chunks[Carry, Result](
        self, step: Callable[[Carry, tuple], tuple[Carry, Result]], carry: Carry, xs: tuple[jax.Array, ...]
    ) -> tuple[Carry, Result]:
        """Computes jax.lax.scan(step, carry, (indices, *xs)); if unrolled, each index is an int."""
        if not self.unrolled:
            return jax.lax.scan(step, carry, (jnp.arange(self.chunks, dtype=jnp.int32), *xs))
        results = []
        for i in range(self.chunks):
            carry, result = step(carry, (i, *(x[i] for x in xs)))
            results.append(result)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *results)


@dataclasses.dataclass(frozen=True)
class KeyTile:
    """The keys of a tile: the first `count` of chunk j. `masked` is False if the tile's queries see all of them."""

    j: jax.Array | int
    count: int
    masked: bool

    def of(self, x_JZPH: jax.Array) -> jax.Array:
        """Returns the tile's part [Z, C, H] of an array of all keys."""
        _, z, _, h = x_JZPH.shape
        return jax.lax.dynamic_slice(x_JZPH, (self.j, 0, 0, 0), (1, z, self.count, h))[0]

    def add(self, x_JZHP: jax.Array, more_ZHC: jax.Array) -> jax.Array:
        """Returns a transposed array of all keys with `more_ZHC` added to the tile's part."""
        start = (self.j, 0, 0, 0)
        before = jax.lax.dynamic_slice(x_JZHP, start, (1, *more_ZHC.shape))
        return jax.lax.dynamic_update_slice(x_JZHP, before + more_ZHC[None], start)


@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """The causal mask: a key is visible if 0 <= query - key < window, and in the same segment.

    Attributes:
      first_I: first chunk of keys that the queries of each chunk may see.
      bands_DCC: mask by position only, for keys that lie D chunks before the queries. Computed once: loading it is
        several times faster than comparing positions in each pass over scores.
    """

    tiling: Tiling
    window: int | Int[Array, ""] | None
    segments_BS: Int[Array, "B S"] | None
    first_I: Int[Array, " I"]
    bands_DCC: Bool[Array, "D C C"]

    @classmethod
    def of(
        cls, tiling: Tiling, window: int | Int[Array, ""] | None, segments_BT: Int[Array, "B T"] | None
    ) -> "AttentionMask":
        """Creates the mask of whole rows for a tiling."""
        if isinstance(window, int) and window >= tiling.length:
            window = None
        starts_I = tiling.chunk * jnp.arange(tiling.chunks, dtype=jnp.int32)
        first_I = jnp.zeros_like(starts_I) if window is None else jnp.maximum(starts_I - window + 1, 0) // tiling.chunk
        bands_DCC = _bands(tiling, window)
        if segments_BT is None:
            return cls(tiling, window, None, first_I, bands_DCC)
        padding = ((0, 0), (0, tiling.chunks * tiling.chunk - tiling.length))
        segments_BS = jnp.pad(segments_BT.astype(jnp.int32), padding, mode="edge")
        first_I = jnp.maximum(first_I, _first_of_segments(segments_BS, tiling.chunks))
        return cls(tiling, window, segments_BS, first_I, bands_DCC)

    def fold_tiles[Carry](self, tile: Callable[[KeyTile, Carry], Carry], carry: Carry, i: jax.Array | int) -> Carry:
        """Folds carry = tile(keys, carry) over all keys that queries of chunk i may see; their own chunk comes last."""
        chunk = self.tiling.chunk
        if isinstance(i, int):
            return tile(KeyTile(0, (i + 1) * chunk, True), carry)
        # Causality masks nothing in chunks before the queries' own.
        masked = self.window is not None or self.segments_BS is not None
        first = jax.lax.dynamic_index_in_dim(self.first_I, i, keepdims=False)
        carry = jax.lax.fori_loop(first, i, lambda j, carry: tile(KeyTile(j, chunk, masked), carry), carry)
        return tile(KeyTile(i, chunk, True), carry)

    def mask(self, scores_ZMC: jax.Array, i: jax.Array | int, keys: KeyTile, hidden: float) -> jax.Array:
        """Returns the scores of the queries of chunk i, with `hidden` in place of masked ones."""
        if not keys.masked:
            return scores_ZMC
        return hide(scores_ZMC, self._of_tile(i, keys), hidden)

    def _of_tile(self, i: jax.Array | int, keys: KeyTile) -> Bool[Array, "B_or_1 C S"]:
        c = self.tiling.chunk
        if isinstance(i, int):
            visible = _within(_behind(c, keys.count) + i * c, self.window)[None]
        else:  # the index is clamped: beyond the last band, all bands are equal
            visible = jax.lax.dynamic_index_in_dim(self.bands_DCC, i - keys.j)
        if self.segments_BS is None:
            return visible
        first_key = keys.j * self.tiling.key_tiling.chunk
        of_queries_BC = jax.lax.dynamic_slice_in_dim(self.segments_BS, i * c, c, axis=1)
        of_keys_BS = jax.lax.dynamic_slice_in_dim(self.segments_BS, first_key, keys.count, axis=1)
        return visible & (of_queries_BC[:, :, None] == of_keys_BS[:, None, :])


def hide(scores_ZMC: jax.Array, visible: Bool[Array, "B_or_1 C S"], hidden: float) -> jax.Array:
    """Returns the scores of a tile, with `hidden` where a key is not visible."""
    z, m, s = scores_ZMC.shape
    rows, c, _ = visible.shape
    scores = scores_ZMC.reshape(rows, z * m // c // rows, c, s)
    return jnp.where(visible[:, None], scores, hidden).reshape(z, m, s)


def _behind(queries: int, keys: int) -> Int[Array, "C S"]:
    """Returns query - key for queries and keys that start at the same position."""
    return jnp.arange(queries, dtype=jnp.int32)[:, None] - jnp.arange(keys, dtype=jnp.int32)[None, :]


def _within(behind: jax.Array, window: int | jax.Array | None) -> jax.Array:
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)


def _bands(tiling: Tiling, window: int | jax.Array | None) -> Bool[Array, "D C C"]:
    """Returns the masks by position, for each number of chunks between queries and keys until masks repeat."""
    chunk = tiling.chunk
    # With a traced window, the mask may differ for any number of chunks.
    unfixed = 1 if window is None else tiling.chunks - 1
    furthest = (chunk + window - 2) // chunk if isinstance(window, int) else unfixed
    chunks_D11 = jnp.arange(furthest + 1, dtype=jnp.int32)[:, None, None]
    return _within(chunks_D11 * chunk + _behind(chunk, chunk)[None], window)


def _first_of_segments(segments_BS: jax.Array, chunks: int) -> jax.Array:
    """Returns the first chunk of keys whose range of ids meets that of each chunk, in any row; exact if ids ascend."""
    segments_BIC = segments_BS.reshape(segments_BS.shape[0], chunks, -1)
    low_BI, high_BI = jnp.min(segments_BIC, axis=2), jnp.max(segments_BIC, axis=2)
    meets_BII = (low_BI[:, :, None] <= high_BI[:, None]) & (low_BI[:, None] <= high_BI[:, :, None])
    return jnp.argmax(jnp.any(meets_BII, axis=0), axis=1).astype(jnp.int32)
