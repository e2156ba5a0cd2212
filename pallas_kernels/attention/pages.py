"""The pages of a key-value cache: keys and values of earlier positions, for all layers and rows.

A page holds S positions of one layer. A row's positions are in the pages that its table lists, so rows of any lengths
share one memory, and rows that begin with the same tokens may share pages.

Dimension key: P pages, L layers, R rows, I pages per row and layer, B rows and T tokens of a call, K kv-heads,
S positions per page, H head_dim.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.formats.qtensor import Leaf

POSITIONS = 32  # per page
SCRATCH = 0  # the page that tokens without a position write to; no table lists it
GREATEST_CODE = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVPages:
    """Keys and values of earlier positions in pages, with rotated keys.

    Leaves may be ShapeDtypeStructs, for programs that are compiled before pages exist.

    Attributes:
      k, v: [P, K, S, H], in f32, bf16 or f16, or int8 codes.
      k_scale, v_scale: f32 [P, K, S], the factors of codes; None: k and v are the numbers.
      pages_LRI: the page of each layer, row and S positions, in int32.
    """

    k: Leaf
    v: Leaf
    k_scale: Leaf = None
    v_scale: Leaf = None
    pages_LRI: Leaf

    @classmethod
    def empty(
        cls, pages: int, table_LRI: tuple[int, int, int], heads_KH: tuple[int, int], dtype: DTypeLike
    ) -> "KVPages":
        """Returns zeros in so many pages, page SCRATCH among them, and a table that lists only that one.

        Args:
          table_LRI: layers, rows, and pages of each row and layer.
          heads_KH: kv-heads and their width.
          dtype: that of the numbers; int8: they are stored as codes.
        """
        kv_heads, width = heads_KH
        numbers = [jnp.zeros((pages, kv_heads, POSITIONS, width), dtype) for _ in range(2)]
        coded = numbers[0].dtype == jnp.int8
        scales = [jnp.zeros((pages, kv_heads, POSITIONS), jnp.float32) if coded else None for _ in range(2)]
        table = jnp.full(table_LRI, SCRATCH, jnp.int32)
        return cls(k=numbers[0], v=numbers[1], k_scale=scales[0], v_scale=scales[1], pages_LRI=table)

    @classmethod
    def for_rows(cls, layers: int, rows: int, positions: int, heads_KH: tuple[int, int], dtype: DTypeLike) -> "KVPages":
        """Returns empty pages in which each row has room for so many positions."""
        shape = layers, rows, -(-positions // POSITIONS)
        pages = cls.empty(math.prod(shape) + 1, shape, heads_KH, dtype)
        return dataclasses.replace(pages, pages_LRI=jnp.arange(1, math.prod(shape) + 1, dtype=jnp.int32).reshape(shape))

    def write(
        self,
        layer: Int[Array, ""] | int,
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        rows_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
    ) -> "KVPages":
        """Writes the keys and values of a layer at their positions, in place inside a scan.

        Args:
          rows_BT: the row R of each token.
          positions_BT: its position in the row; -1: it has none, and its numbers go to page SCRATCH.
        """
        size = self.k.shape[2]
        at_BT = jnp.maximum(positions_BT, 0)
        pages_BT = jnp.where(positions_BT < 0, SCRATCH, self.pages_LRI[layer, rows_BT, at_BT // size])
        k, k_scale = _put(self.k, self.k_scale, k_BTKH, pages_BT, at_BT % size)
        v, v_scale = _put(self.v, self.v_scale, v_BTKH, pages_BT, at_BT % size)
        return dataclasses.replace(self, k=k, v=v, k_scale=k_scale, v_scale=v_scale)


def _put(
    numbers: jax.Array, scales: jax.Array | None, new_BTKH: jax.Array, pages_BT: jax.Array, slots_BT: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    if scales is None:
        return numbers.at[pages_BT, :, slots_BT].set(new_BTKH.astype(numbers.dtype)), None
    codes_BTKH, scales_BTK = quantize(new_BTKH)
    return numbers.at[pages_BT, :, slots_BT].set(codes_BTKH), scales.at[pages_BT, :, slots_BT].set(scales_BTK)


def quantize(x: Float[Array, "*Z H"]) -> tuple[Int[Array, "*Z H"], Float[Array, "*Z"]]:
    """Returns int8 codes from -127 to 127, and their f32 factors, max |x| / 127 for each last axis."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / GREATEST_CODE
    codes = jnp.round(x / jnp.where(scales > 0, scales, 1)[..., None])
    return codes.astype(jnp.int8), scales


def dequantize(codes: Int[Array, "*Z H"], scales: Float[Array, "*Z"]) -> Float[Array, "*Z H"]:
    """Returns codes * scales in f32."""
    return codes.astype(jnp.float32) * scales[..., None]
