"""The work of the attention loops that visit blocks, by arithmetic: pairs of a query and a key, and products."""

from pallas_kernels.attention.bounds import IN_REGISTERS, Block, mma_blocks


def visited_pairs(length: int, window: int, block: Block) -> int:
    """Counts the (query, key) pairs of the blocks that are visited in a row of one text, padded to whole blocks.

    Without a window, q^2 I (I + 1) / 2 for blocks of q queries and as many keys.
    """
    seen = window if window < length else length
    firsts = [max(first - seen + 1, 0) // block.keys for first in range(0, length, block.queries)]
    ends = [-(-(first + block.queries) // block.keys) for first in range(0, length, block.queries)]
    return block.queries * block.keys * sum(end - first for first, end in zip(firsts, ends, strict=True))


def forward_passes(head_dim: int) -> tuple[tuple[int, Block], ...]:
    """Returns (products per pair, block) of each kernel of `mma`'s forward pass: q k^T, p v."""
    return ((2, mma_blocks(head_dim, capped=False).forward),)


def backward_passes(head_dim: int, *, capped: bool) -> tuple[tuple[int, Block], ...]:
    """Returns (products per pair, block) of each kernel of `mma`'s backward pass.

    q k^T, dp, dq; q k^T, dp, dk, dv. The last kernel is two if the sums of both results do not fit the registers.
    """
    _, dq, dkv, _ = mma_blocks(head_dim, capped=capped)
    return ((3, dq), (4, dkv)) if head_dim <= IN_REGISTERS else ((3, dq), (3, dkv), (2, dkv))
