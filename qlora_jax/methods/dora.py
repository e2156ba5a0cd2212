"""Weight-decomposed low-rank adapters, DoRA (Liu et al., 2024).

Dimension key: L layers, M rows, K in, N out, R rank.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from pallas_kernels.dense_matmul import dot_nn, dot_tn
from qlora_jax.config import LoraArgs
from qlora_jax.methods.adapter_cost import F32, ONCE, AdapterShape, StepSizes, Work
from qlora_jax.methods.lora import LowRankMethod, LowRankStart
from qlora_jax.methods.low_rank_cost import ranked_projections
from qlora_jax.methods.method import Given
from qlora_jax.models.config import ModelConfig
from qlora_jax.nn.column_scale import scale_columns
from qlora_jax.nn.dropout import dropout
from qlora_jax.nn.frozen_weight import Part, dense_weight, gather_layer, ops_of, weight_specs
from qlora_jax.nn.linear import FrozenLayer, LinearAdapter, Weight
from qlora_jax.nn.lora import BatchedLoRA, adapter_deltas, add_delta, low_rank_deltas
from qlora_jax.nn.variables import Frozen, TrainedLeaf, select_layer
from qlora_jax.sharding import AnyMesh, gathered, lora_spec, shards_of

EPS = float(jnp.finfo(jnp.float32).eps)


class BatchedDoRA(BatchedLoRA):
    """DoRA of several runs: low-rank adapters, and `scale` [L, runs, N]."""

    def __init__(self, adapters: "Sequence[InferenceDoRA | None]", layers: int):
        super().__init__(adapters, layers)
        ones_LN = np.ones((layers, self.lora_b[...].shape[3]), np.float32)
        scales = [ones_LN if adapter is None else np.asarray(adapter.scale[...]) for adapter in adapters]
        self.scale = Frozen(jnp.asarray(np.stack(scales, axis=1)))

    def on_product(
        self, y_MN: jax.Array, x_MK: jax.Array, layer: jax.Array | int | None, own_M: jax.Array
    ) -> jax.Array:
        """Returns scale * (y + scaling * x A B)."""
        scale_MN = select_layer(self.scale[...], layer)[own_M]
        added_MN = y_MN + self.delta(x_MK, layer, own_M).astype(y_MN.dtype)
        scaled_MN = (added_MN.astype(jnp.float32) * scale_MN).astype(y_MN.dtype)
        return jnp.where(self.present[...][own_M][:, None], scaled_MN, y_MN)

    def on_result(self, y_MN: jax.Array, x_MK: jax.Array, layer: jax.Array | int | None, own_M: jax.Array) -> jax.Array:
        """Returns y."""
        return y_MN


class DoRA(LinearAdapter):
    """y = magnitude / ||W + scaling (A B)^T|| * (x W^T + scaling x A B) + b, with norms of rows, as PEFT computes it.

    Gradients treat the norm as a constant (section 4.3 of the paper). With dropout d(x), PEFT computes only the change
    from dropped inputs: y = x W^T + b + c (d(x) W^T + scaling d(x) A B) - d(x) W^T, where c is the quotient above.
    We do the same, which takes a second frozen product.

    The square of the norm is ||W||^2 + 2 scaling sum_r B_r (W A)_r + scaling^2 sum_r B_r (A^T A B)_r. ||W||^2 is
    computed once, because W is frozen. So a step costs one frozen product of R rows, and no weight is dequantized.
    Accuracy is lost only where the delta cancels W: the square is then off by f32's eps times ||W||^2 + ||delta||^2.
    W, A and B are in the compute dtype.

    On a mesh, magnitudes and norms are whole on every device, which computes those of all rows.

    `lora_a` [L, K, R] and `lora_b` [L, R, N] are in f32 or bf16. `magnitude` [L, N] is in f32, because bf16 would round
    its updates away. Inside the scan over layers they have one layer each. `weight_norms2` [L, N] in f32 is frozen.
    """

    LEAVES = (TrainedLeaf("lora_a"), TrainedLeaf("lora_b"), TrainedLeaf("magnitude", vector=True))
    SAVED = ("lora_xa", "unscaled", "dora_norms")
    for_batch = BatchedDoRA

    def __init__(
        self,
        lora_a: Float[Array, "*L K R"],
        lora_b: Float[Array, "*L R N"],
        magnitude: Float[Array, "*L N"],
        weight_norms2: Float[Array, "*stack N"],
        scaling: float,
        dropout: float,
    ):
        self.lora_a = nnx.LoRAParam(lora_a)
        self.lora_b = nnx.LoRAParam(lora_b)
        self.magnitude = nnx.LoRAParam(magnitude)
        self.weight_norms2 = Frozen(weight_norms2)
        self.scaling = scaling
        self.dropout = dropout

    @classmethod
    def init(
        cls,
        lora_a: Float[Array, "L K R"],
        lora_b: Float[Array, "L R N"],
        weight: Weight,
        scaling: float,
        dropout: float,
        mesh: AnyMesh | None = None,
    ) -> "DoRA":
        """Creates adapters of a stack that change nothing: magnitudes equal the norms at these A and B.

        Args:
          mesh: the devices that A, B and the weight are cut over; None: one device.
        """
        norms2_LN = squared_norms(weight, mesh)
        magnitude_LN = stack_norms(lora_a, lora_b, norms2_LN, weight, scaling, mesh)
        return cls(lora_a, lora_b, magnitude_LN, norms2_LN, scaling, dropout)

    @staticmethod
    def apply(
        adapters: "Sequence[DoRA]",
        x_MK: Float[Array, "M K"],
        frozen: Sequence[FrozenLayer],
        keys: Sequence[jax.Array | None],
    ) -> list[jax.Array]:
        """Returns each layer's result; without dropout, all layers share one product with A."""
        with jax.named_scope("lora"):
            added = adapter_deltas(adapters, x_MK, keys, low_rank_deltas)
        rows = zip(adapters, frozen, keys, added, strict=True)
        return [adapter._applied(x_MK, one, keys_B, delta) for adapter, one, keys_B, delta in rows]

    def _applied(
        self, x_MK: jax.Array, frozen: FrozenLayer, keys_B: jax.Array | None, delta_MN: jax.Array
    ) -> jax.Array:
        scale_N = self._scale(frozen, x_MK.dtype)
        product_MN = frozen.product(dropout(x_MK, self.dropout, keys_B))
        scaled_MN = scale_columns(checkpoint_name(product_MN + delta_MN, "unscaled"), scale_N)
        if self.dropout == 0.0 or keys_B is None:
            return frozen.biased(scaled_MN)
        return frozen(x_MK) + (scaled_MN - product_MN)

    def _scale(self, frozen: FrozenLayer, dtype: DTypeLike) -> jax.Array:
        """Returns magnitude / norms, [N]."""
        a_KR, b_RN = (leaf[...].astype(dtype) for leaf in (self.lora_a, self.lora_b))
        norms_N = row_norms(a_KR, b_RN, select_layer(self.weight_norms2[...], frozen.layer), frozen, self.scaling)
        return self.magnitude[...] / checkpoint_name(norms_N, "dora_norms")

    def select_layer(self, layer: jax.Array | int) -> "DoRA":
        """Returns the adapter of one layer of the stack."""
        a, b, magnitude, norms2 = (
            leaf[...][layer] for leaf in (self.lora_a, self.lora_b, self.magnitude, self.weight_norms2)
        )
        return DoRA(a, b, magnitude, norms2, self.scaling, self.dropout)

    def merge(self, weight: Float[Array, "N K"]) -> Float[Array, "N K"]:
        """Returns the merged weight in f32, its rows scaled to the lengths in `magnitude`."""
        whole_NK = add_delta(weight, self)
        return whole_NK * (self.magnitude[...] / jnp.linalg.norm(whole_NK, axis=1))[:, None]

    def for_decoding(self, weight: Weight, mesh: AnyMesh | None) -> "DoRA":
        """Returns the adapter with its norms computed once."""
        return InferenceDoRA(self, weight, mesh)


class InferenceDoRA(DoRA):
    """DoRA with norms computed once, for inference only. `scale` [L, N] is magnitude / norms.

    Args:
      mesh: the devices that the adapter and the weight are cut over; None: one device.
    """

    LEAVES = (*DoRA.LEAVES, TrainedLeaf("scale", vector=True))

    def __init__(self, adapter: DoRA, weight: Weight, mesh: AnyMesh | None = None):
        a, b, magnitude = (leaf[...] for leaf in (adapter.lora_a, adapter.lora_b, adapter.magnitude))
        norms2 = adapter.weight_norms2[...]
        super().__init__(a, b, magnitude, norms2, adapter.scaling, 0.0)
        self.scale = nnx.LoRAParam(magnitude / stack_norms(a, b, norms2, weight, adapter.scaling, mesh))

    def _scale(self, frozen: FrozenLayer, dtype: DTypeLike) -> jax.Array:
        return self.scale[...]

    def for_decoding(self, weight: Weight, mesh: AnyMesh | None) -> "DoRA":
        """Returns itself."""
        return self


def row_norms(
    a_KR: Float[Array, "K R"],
    b_RN: Float[Array, "R N"],
    weight_norms2_N: Float[Array, " N"],
    frozen: FrozenLayer,
    scaling: float,
) -> Float[Array, " N"]:
    """Returns ||W + scaling (A B)^T|| of each row in f32, without gradient; A and B are in the compute dtype."""
    a_KR, b_RN = jax.lax.stop_gradient((a_KR, b_RN))
    with jax.named_scope("dora"):
        wa_RN = frozen.product(a_KR.T).astype(jnp.float32)
        aab_RN = dot_nn(dot_tn(a_KR, a_KR), b_RN.astype(jnp.float32))
        b_RN = b_RN.astype(jnp.float32) * scaling
        delta2_N = jnp.sum(b_RN * aab_RN, axis=0) * scaling
        norms2_N = weight_norms2_N + 2 * jnp.sum(b_RN * wa_RN, axis=0) + delta2_N
        return jnp.sqrt(jnp.maximum(norms2_N, EPS * (weight_norms2_N + delta2_N)))


@functools.partial(jax.jit, static_argnames=("scaling", "mesh"))
def stack_norms(
    lora_a: Float[Array, "L K R"],
    lora_b: Float[Array, "L R N"],
    weight_norms2: Float[Array, "L N"],
    weight: Weight,
    scaling: float,
    mesh: AnyMesh | None = None,
) -> Float[Array, "L N"]:
    """Computes `row_norms` of all layers, one after another; on a mesh, every device computes all of them."""
    arrays, program = (lora_a, lora_b, weight, weight_norms2), functools.partial(_stack_norms, scaling=scaling)
    if mesh is None:
        return program(arrays)
    specs = *(lora_spec(leaf.shape, mesh) for leaf in (lora_a, lora_b)), weight_specs(weight, mesh), P()
    return _on_every_device(program, arrays, specs, mesh)


def _stack_norms(arrays: tuple[PyTree, PyTree, Weight, jax.Array], scaling: float) -> jax.Array:
    *factors, weight, weight_norms2 = arrays

    def norms(layer: jax.Array) -> jax.Array:
        a_KR, b_RN = gathered(jax.tree.map(lambda stack: stack[layer].astype(weight.dtype), factors))
        frozen = FrozenLayer(gather_layer(weight, layer), None, layer)
        return row_norms(a_KR, b_RN, weight_norms2[layer], frozen, scaling)

    return jax.lax.map(norms, jnp.arange(len(weight_norms2), dtype=jnp.int32))


@functools.partial(jax.jit, static_argnames="mesh")
def squared_norms(weight: Weight, mesh: AnyMesh | None = None) -> Float[Array, "L N"]:
    """Computes ||W||^2 of each row of a stack, summed in f32; one layer is dequantized at a time.

    On a mesh, every device gathers a layer's packed codes, and computes all of its rows.
    """
    if mesh is None:
        return _squared_norms(weight)
    return _on_every_device(_squared_norms, weight, weight_specs(weight, mesh), mesh)


def _squared_norms(weight: Weight) -> jax.Array:
    def of_one(layer: Part) -> jax.Array:
        w_NK = dense_weight(gathered(layer))
        return jnp.sum(jnp.square(w_NK.astype(jnp.float32)), axis=1)

    return ops_of(weight).per_layer(lambda part: jax.lax.map(of_one, part), weight)


def _on_every_device(program: Callable[[PyTree], jax.Array], arrays: PyTree, specs: PyTree, mesh: AnyMesh) -> jax.Array:
    """Returns `program(arrays)`, which every device of a mesh computes for itself; cut arrays are Shards."""
    run = jax.shard_map(
        lambda parts: program(shards_of(parts, specs, mesh)),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P(),
        check_vma=False,  # kernels' results carry no such types
    )
    return run(arrays)


class DoRAMethod(LowRankMethod):
    """DoRA on projections."""

    merged_products = 0

    def shape(self, config: ModelConfig, spec: LoraArgs) -> AdapterShape:
        """Returns LoRA's facts; magnitudes scale results, norms read weights, and dropout takes a second product."""
        plain = super().shape(config, spec)
        names = frozenset(plain.layers)
        return plain._replace(scaled=names, rereads=names, products=dict.fromkeys(names, 2) if spec.dropout else ONCE)

    def work(self, sizes: StepSizes) -> tuple[Work, ...]:
        """Returns LoRA's work and that of the norms: 2 R N K + 2 R^2 (N + K) for W A, A^T A and (A^T A) B."""
        norms = sum(
            sizes.layers(name) * (2 * one.rank * math.prod(one.shape) + 2 * one.rank**2 * sum(one.shape))
            for name, one in ranked_projections(sizes.model, sizes.lora).items()
        )
        return (*super().work(sizes), Work("dora", norms, again=norms, per_micro_batch=True))

    def saved(self, sizes: StepSizes) -> dict[str, int]:
        """Returns the bytes of x A, and of the norms of the layers that the backward pass visits."""
        widths = sum(one.shape[0] for one in ranked_projections(sizes.model, sizes.lora).values())
        return super().saved(sizes) | {"dora_norms": sizes.backward_layers * F32 * widths}

    def adapter(self, start: LowRankStart, spec: LoraArgs, given: Given) -> DoRA:
        """Returns the adapter of one projection."""
        weight = start.linear.weight.get_value()
        return DoRA.init(start.lora_a, start.lora_b, weight, start.scaling, spec.dropout, given.mesh)


METHOD = DoRAMethod()
