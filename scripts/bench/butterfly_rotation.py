"""Counts what BOFT's rotations would cost next to OFT's and LoRA's, in one projection, as XLA compiles them for a CPU.

    python -m scripts.bench.butterfly_rotation [--tokens 2048] [--width 4096] [--block 32] [--rank 16]

BOFT multiplies several block-diagonal rotations, and permutes all inputs before and after each. Prints operations and
bytes read and written in a forward pass in bfloat16. They depend on the program alone, not on the machine's speed.

Dimension key: M tokens, K inputs, S block size, F factors.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scripts.bench.support.progress import phases

FACTORS = (1, 2, 4)


def rotate(x_MK: Float[Array, "M K"], blocks: Float[Array, "B S S"]) -> Float[Array, "M K"]:
    """Returns OFT's product of each token with a block-diagonal matrix."""
    count, size, _ = blocks.shape
    return jnp.einsum("mbs,bst->mbt", x_MK.reshape(-1, count, size), blocks).reshape(x_MK.shape)


def butterfly(
    x_MK: Float[Array, "M K"], blocks: Float[Array, "F B S S"], before: Int[Array, "F K"], after: Int[Array, "F K"]
) -> Float[Array, "M K"]:
    """Returns BOFT's product: each factor permutes the inputs, rotates, and permutes them back."""
    for factor, here, back in zip(blocks, before, after, strict=True):
        x_MK = rotate(x_MK[:, here], factor)[:, back]
    return x_MK


def low_rank(x_MK: Float[Array, "M K"], a: Float[Array, "K R"], b: Float[Array, "R K"]) -> Float[Array, "M K"]:
    """Returns LoRA's product for a square weight."""
    return (x_MK @ a) @ b


def cost(function: Callable[..., Array], *shapes: jax.ShapeDtypeStruct) -> tuple[float, float]:
    """Returns the operations and the bytes of a compiled function."""
    found = jax.jit(function).lower(*shapes).compile().cost_analysis()
    assert found is not None, "a CPU reports costs"
    return found["flops"], found["bytes accessed"]


def costs(tokens: int, width: int, block: int, rank: int) -> dict[str, tuple[float, float]]:
    """Returns operations and bytes by method."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    x, blocks = array(tokens, width), (width // block, block, block)
    order = {count: jax.ShapeDtypeStruct((count, width), jnp.int32) for count in FACTORS}
    return {
        f"LoRA, rank {rank}": cost(low_rank, x, array(width, rank), array(rank, width)),
        "OFT": cost(rotate, x, array(*blocks)),
        **{
            f"BOFT of {count}": cost(butterfly, x, array(count, *blocks), order[count], order[count])
            for count in phases("compiling factors:", FACTORS)
        },
    }


def main() -> None:
    """Prints a line per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 2048, "width": 4096, "block": 32, "rank": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, (operations, moved) in costs(**vars(parser.parse_args())).items():
        print(f"{name:<16}{operations / 1e9:8.2f} GFLOP {moved / 2**20:8.1f} MiB")


if __name__ == "__main__":
    main()
