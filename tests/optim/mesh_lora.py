"""LoRA parameters that a mesh of eight devices cuts, and some that it does not. A helper for tests."""

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.models.partition import lora_specs
from qlora_jax.sharding import make_mesh, place

LAYERS = 4
SHAPES = {
    # Large tensors, whose state is in 8 bits; an eighth is smaller than 4,096 elements.
    "model.layers.self_attn.q_proj": {"lora_a": (512, 16), "lora_b": (16, 512)},
    # A small tensor that is cut; a large one of 18.75 blocks, which is whole.
    "model.layers.mlp.down_proj": {"lora_a": (64, 32), "lora_b": (12, 400)},
    # The magnitudes of DoRA are whole.
    "model.layers.mlp.up_proj": {"magnitude": (512,)},
    # Rows of a table are whole, whatever their shape.
    "lm_head": {"lora_a": (512, 16)},
}
CUT = 3  # leaves that are cut over 4 or 8 devices


def lora_of(seed: int, scale: float = 0.1, dtype: str = "float32") -> dict[str, dict[str, jax.Array]]:
    """Random parameters, or gradients."""
    rng = np.random.default_rng(seed)

    def leaf(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(rng.normal(0, scale, (LAYERS, *shape)), dtype)

    return {name: {key: leaf(shape) for key, shape in leaves.items()} for name, leaves in SHAPES.items()}


def on_mesh(tree, mesh):
    """The tree on a mesh, cut as LoRA parameters are."""
    return tree if mesh is None else place(tree, lora_specs(tree, mesh), mesh)


def meshes():
    """Every mesh of eight devices that cuts something, and one that does not."""
    return [make_mesh(data, 8 // data) for data in (1, 2, 8)]


def assert_same_bits(found, expected) -> None:
    """Checks that two trees have the same leaves, to the bit and the dtype."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    differing = [
        index
        for index, (a, b) in enumerate(pairs)
        if a.dtype != b.dtype or np.asarray(a).tobytes() != np.asarray(b).tobytes()
    ]
    assert differing == []
