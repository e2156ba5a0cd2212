"""The key-value cache of decoding in pages, which rows of any length share.

A page has S neighbouring positions of one row in one layer. Page 0 belongs to no row: padding writes there.

Dimension key: P pages, K kv-heads, S positions of a page, H head_dim, L layers, R rows of the cache, I pages of a row,
B, T the tokens of a call.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.formats.qtensor import Leaf

PAGE = 32  # positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVPages:
    """Keys and values of earlier positions, with rotated keys. Leaves may be ShapeDtypeStructs.

    Attributes:
      k, v: [P, K, S, H] in f32, bf16 or f16; or in int8, with scales.
      k_scale, v_scale: factor of each position and head in f32, [P, K, S]; None unless pages are int8.
      pages_LRI: the page of positions I S to I S + S - 1 of each row and layer.
    """

    k: Leaf
    v: Leaf
    k_scale: Leaf | None
    v_scale: Leaf | None
    pages_LRI: Leaf

    @classmethod
    def empty(cls, pages: int, kv_heads: int, head_dim: int, dtype: DTypeLike, pages_LRI: jax.Array) -> "KVPages":
        """Returns pages of zeros."""
        shape = (pages, kv_heads, PAGE, head_dim)
        scales = [jnp.zeros(shape[:3], jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None for _ in range(2)]
        values = [jnp.zeros(shape, dtype) for _ in range(2)]
        return cls(k=values[0], v=values[1], k_scale=scales[0], v_scale=scales[1], pages_LRI=pages_LRI)

    @classmethod
    def for_rows(cls, layers: int, rows: int, positions: int, heads: tuple[int, int], dtype: DTypeLike) -> "KVPages":
        """Returns an empty cache in which each row has pages for so many positions.

        Args:
          heads: (number of kv-heads, head_dim).
        """
        shape = layers, rows, -(-positions // PAGE)
        table_LRI = jnp.arange(1, math.prod(shape) + 1, dtype=jnp.int32).reshape(shape)
        return cls.empty(math.prod(shape) + 1, *heads, dtype, table_LRI)

    def write(
        self,
        layer: jax.Array | int,
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        rows_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
    ) -> "KVPages":
        """Writes keys and values at positions of rows, in place inside a scan; a position of -1 is padding."""
        at_BT = jnp.maximum(positions_BT, 0)
        own_BT = self.pages_LRI[layer, rows_BT, at_BT // PAGE]
        page_BT, slot_BT = jnp.where(positions_BT < 0, 0, own_BT), at_BT % PAGE
        put = {}
        for name, new in (("k", k_BTKH), ("v", v_BTKH)):
            pages, scales = getattr(self, name), getattr(self, f"{name}_scale")
            if scales is not None:
                new, scale_BTK = quantize(new)
                put[f"{name}_scale"] = scales.at[page_BT, :, slot_BT].set(scale_BTK)
            put[name] = pages.at[page_BT, :, slot_BT].set(new.astype(pages.dtype))
        return dataclasses.replace(self, **put)


def quantize(x: Float[Array, "*B H"]) -> tuple[Int[Array, "*B H"], Float[Array, "*B"]]:
    """Returns (codes in int8, the factor of each vector in f32); x is about codes * factor."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    codes = jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None])
    return codes.astype(jnp.int8), scale


def dequantize(codes: Int[Array, "*B H"], scale: Float[Array, "*B"]) -> Float[Array, "*B H"]:
    """Returns codes * factor in f32."""
    return codes.astype(jnp.float32) * scale[..., None]
