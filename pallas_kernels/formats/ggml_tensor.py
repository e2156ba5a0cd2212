"""GgmlTensor: a weight in the bytes of blocks, of ggml or of other files' codes, as a pytree; its layouts and values.

A block of a file is a header with its scales, then its codes. 17 or 18 bytes are not aligned, and kernels copy tiles of
64 bytes. In the layout `split_k` of a GgmlTensor, each row of a weight has the same bits elsewhere:

| bytes of a row         | content                                                                                    |
|------------------------|--------------------------------------------------------------------------------------------|
| 64 ceil(K / 128)       | codes as in `split_k` of `layouts`: [64p+j] = code(128p+64+j) << 4 or code(128p+j), j < 64 |
| K / weights per block, | the header of each block, as the file has it                                               |
| times bytes per header |                                                                                            |
| up to 63               | zeros, so that every row starts at a multiple of 64 bytes                                  |

A row has no other bytes than its blocks, if K is a multiple of 128 and the headers' bytes are one of 64. Nothing is
rounded: `to_blocks` returns the bytes of the file.

Dimension key: N out, K in; `...` stacked layers.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.formats.ggml_blocks import BLOCK_FORMATS, PART, FourBitCode, packed_parts, row_bytes
from pallas_kernels.formats.layouts import LAYOUTS, RUN, pack_runs, unpack_runs
from pallas_kernels.formats.qtensor import Leaf

BLOCKS, SPLIT_K = "blocks", "split_k"
ALIGNMENT = RUN  # bytes: TMA's view of rows in tiles has whole tiles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GgmlTensor:
    """A weight in codes that a file stores (GGUF, NVFP4, FP8, groups of integers): the bytes of its blocks, along K.

    Leaf:
      codes: uint8 [..., N, bytes per row], rows in the order of Hugging Face; leading axes are stacked layers, or
        layers and experts.
    Static:
      ggml_type: a key of BLOCK_FORMATS.
      shape: (N, K) of one weight.
      dtype: name of the compute dtype.
      layout: order of the bytes of a row: BLOCKS as in the file, or SPLIT_K.

    Nothing is validated here, because the leaf may be a tracer or a ShapeDtypeStruct. Constructors validate.
    """

    codes: Leaf
    ggml_type: str = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(default=BLOCKS, metadata={"static": True})

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The leading axes: (layers,) of a stack, () of a single weight."""
        return tuple(self.codes.shape[:-2])

    @property
    def code(self) -> FourBitCode | None:
        """The code of 4 bits that GPU kernels take; None: the blocks have another form."""
        return BLOCK_FORMATS[self.ggml_type].code

    @property
    def nbytes(self) -> int:
        """The bytes of the codes."""
        return math.prod(self.codes.shape)

    def layer(self, index: int | jax.Array) -> "GgmlTensor":
        """Returns the weight of one layer of a stack; `index` may be traced."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), self)


def dequantize_ggml(weight: GgmlTensor, dtype: DTypeLike | None = None) -> jax.Array:
    """Returns the weights, computed in f32 as ggml does and then cast to `dtype` (default: the compute dtype).

    The result has shape [..., N, K], with the leading axes of a stack. For one layer, pass `weight.layer(i)`.
    """
    block = BLOCK_FORMATS[weight.ggml_type]
    with jax.named_scope("dequantize"):
        codes = jnp.asarray(weight.codes)
        codes = codes if weight.layout == BLOCKS else to_blocks(codes, weight.ggml_type, weight.shape[-1])
        blocks = codes.reshape(*codes.shape[:-1], -1, block.nbytes)
        values = block.decode(blocks).astype(weight.dtype if dtype is None else dtype)
        return values.reshape(*codes.shape[:-1], weight.shape[-1])


def finite_scales(codes: np.ndarray, ggml_type: str) -> bool:
    """True if the scales of all blocks, and codes that may be none, are finite, so that all weights are.

    Args:
      codes: uint8 [..., bytes per row].
    """
    block = BLOCK_FORMATS[ggml_type]
    blocks = codes.reshape(-1, block.nbytes)
    runs = [*((at, block.half_type, 1) for at in block.halves), *block.floats]
    numbers = (np.ascontiguousarray(blocks[:, at : at + count * kind.itemsize]).view(kind) for at, kind, count in runs)
    return all(np.isfinite(each).all() for each in numbers)


def split_problem(ggml_type: str, shape: tuple[int, ...]) -> str | None:
    """Returns why a weight (N, K) in blocks of a type cannot have the layout `split_k`, or None if it can."""
    if BLOCK_FORMATS[ggml_type].code is None:
        return f"{ggml_type} is not a table of 16 values times one scale per group of columns"
    if shape[0] % RUN or shape[1] % RUN:
        return f"layout 'split_k' requires N and K in {RUN}s, found {shape=}"
    return None


def block_layout(platform: str, ggml_type: str, shape: tuple[int, ...]) -> str:
    """Returns the layout in which a weight in blocks is held on a platform; all GPUs have the same, as for QTensor."""
    return SPLIT_K if platform == "gpu" and split_problem(ggml_type, shape) is None else BLOCKS


def held_bytes(layout: str, ggml_type: str, columns: int) -> int:
    """Returns the bytes of a row of weights in a layout."""
    if layout == BLOCKS:
        return row_bytes(ggml_type, columns)
    end = header_range(ggml_type, columns)[1]
    return end + -end % ALIGNMENT


def header_range(ggml_type: str, columns: int) -> tuple[int, int]:
    """Returns where the headers of a row in `split_k` start and end."""
    block, (_, start) = BLOCK_FORMATS[ggml_type], LAYOUTS[SPLIT_K].codes_shape((RUN, columns))
    return start, start + columns // block.weights * block.header


def to_split_k[Bytes: (np.ndarray, jax.Array)](blocks: Bytes, ggml_type: str) -> Bytes:
    """Returns rows of blocks, uint8 [..., bytes per row], in the layout `split_k`; of NumPy or JAX, as given."""
    xp, block, lead = blocks.__array_namespace__(), BLOCK_FORMATS[ggml_type], blocks.shape[:-1]
    each = blocks.reshape(*lead, -1, block.nbytes)
    packed = each[..., block.header :].reshape(*lead, -1, PART // 2)
    codes = xp.concat([packed & 15, packed >> 4], axis=-1).reshape(*lead, -1)
    row = xp.concat([pack_runs(codes), each[..., : block.header].reshape(*lead, -1)], axis=-1)
    return xp.pad(row, [(0, 0)] * len(lead) + [(0, -row.shape[-1] % ALIGNMENT)])


def to_blocks[Bytes: (np.ndarray, jax.Array)](rows: Bytes, ggml_type: str, columns: int) -> Bytes:
    """Returns rows in the layout `split_k` as the blocks of the file: the inverse of to_split_k."""
    xp, block, lead = rows.__array_namespace__(), BLOCK_FORMATS[ggml_type], rows.shape[:-1]
    start, end = header_range(ggml_type, columns)
    codes = packed_parts(unpack_runs(rows[..., :start], columns)).reshape(*lead, -1, block.weights // 2)
    headers = rows[..., start:end].reshape(*lead, -1, block.header)
    return xp.concat([headers, codes], axis=-1).reshape(*lead, -1)
