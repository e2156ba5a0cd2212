"""Mean squares of the inputs of each linear layer on given texts: the importance of a weight's column.

A quantizer that weights its errors by them keeps columns precise that are multiplied by large inputs. llama.cpp's tool
imatrix computes the same means.

Dimension key: B rows of a batch, T positions, M = B T, K in.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import io_callback
from jaxtyping import Array, Float, Float32, Int32

from qlora_jax.evaluation.batches import batches_by_length, pad_rows
from qlora_jax.io.tensor_map import slots_of
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import ModelParts, combine
from qlora_jax.nn.linear import FrozenLayer, LinearAdapter, QLinear
from qlora_jax.nn.variables import Frozen

Add = Callable[[str, jax.Array, jax.Array], None]  # takes a linear's path, the row in its stack, and sums [K]


class InputSquares(LinearAdapter):
    """Gives the sums of a linear's squared inputs to the host, and changes no result.

    Args:
      name: path of the linear.
      counted_M: 1 at real tokens, 0 at padding.
      add: called with (name, row in the stack of layers, sums).
    """

    LEAVES = ()

    def __init__(self, name: str, counted_M: Float[Array, " M"], add: Add):
        self.name, self.add = name, add
        self.counted_M = Frozen(counted_M)

    @staticmethod
    def apply(
        adapters: Sequence["InputSquares"],
        x_MK: jax.Array,
        frozen: Sequence[FrozenLayer],
        keys: Sequence[jax.Array | None],
    ) -> list[jax.Array]:
        """Returns the results of the frozen layers."""
        sums_K = jnp.sum(jnp.square(x_MK.astype(jnp.float32)) * adapters[0].counted_M[...][:, None], axis=0)
        for adapter, layer in zip(adapters, frozen, strict=True):
            io_callback(functools.partial(adapter.add, adapter.name), None, layer.layer, sums_K)
        return [layer(x_MK) for layer in frozen]

    def select_layer(self, layer: int) -> "InputSquares":
        """Returns itself, which has no values of layers."""
        return self

    def merge(self, weight: jax.Array) -> jax.Array:
        """Returns the weight, which this does not change."""
        return weight


def mean_squares(
    parts: ModelParts, texts: Sequence[Int32[np.ndarray, "_"]], progress: Callable[[int], None] = lambda done: None
) -> dict[str, Float32[np.ndarray, "_"]]:
    """Returns the mean square of each input over all tokens of the texts, by the name of the weight on disk.

    Sums are f32 within a batch and f64 across batches. Each text is computed whole, and sees only itself. Experts have
    no means, since each sees other tokens.

    Args:
      parts: a model without adapters.
      progress: called with the number of texts done so far.
    """
    names = dict(_weight_names(combine(parts)))
    sums: dict[str, np.ndarray] = {}

    def add(module: str, row: jax.Array, sums_K: jax.Array) -> None:
        name = names[module][int(row)]
        sums[name] = sums.get(name, 0.0) + np.asarray(sums_K, np.float64)

    @jax.jit
    def run(parts: ModelParts, tokens_BT: jax.Array, counted_BT: jax.Array) -> jax.Array:
        model = combine(parts)
        for module, linear in _linears(model):
            linear.adapter = InputSquares(module, counted_BT.reshape(-1), add)
        return model.hidden(tokens_BT)[0]

    done = 0
    for batch in batches_by_length([len(ids) for ids in texts]):
        members = [texts[row] for row in batch.rows]
        counted_BT = pad_rows(batch, [np.ones(len(ids), np.int32) for ids in members]).astype(np.float32)
        jax.block_until_ready(run(parts, pad_rows(batch, members), counted_BT))
        jax.effects_barrier()  # batches are added in their order
        done += len(members)
        progress(done)
    tokens = sum(map(len, texts))
    return {name: (found / tokens).astype(np.float32) for name, found in sums.items()}


def _linears(model: CausalLM) -> Iterator[tuple[str, QLinear]]:
    """Yields every linear of the layers, and its path."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, QLinear):
            yield ".".join(map(str, path)), node


def _weight_names(model: CausalLM) -> Iterator[tuple[str, list[str]]]:
    """Yields the path of each linear, and the names of its weights in the order of its stack."""
    linears = dict(_linears(model))
    for slot in slots_of(model):
        *module, leaf = map(str, slot.path)
        if leaf == "weight" and ".".join(module) in linears:
            yield ".".join(module), slot.names
