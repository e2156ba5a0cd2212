"""The decoder's MLPs: dense, and sparse ones with a router and experts.

Dimension key: B batch, T positions, D embed, F mlp, E experts, k experts per token, S sparse layers, M = B T.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from qlora_jax.models.abstract_init import frozen_expert_leaves, frozen_linear_leaves
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.nn.activations import apply_activation, gated_activation
from qlora_jax.nn.experts import ExpertLinear, Experts
from qlora_jax.nn.linear import ModuleAdapter, QLinear, project
from qlora_jax.nn.random_keys import fold_in_rows
from qlora_jax.nn.router import route, routing_sums
from qlora_jax.nn.variables import Frozen, select_layer

# Sums of one layer: counts [B, E], probabilities [B, E], squared logsumexp [B], as in nn.router.Routing.
RoutingSums = tuple[jax.Array, jax.Array, jax.Array]
SHARED = "mlp.shared_experts."
TOKENS_AT_ONCE = 2048  # in a chunk of `by_chunks`; fused products on every card take as many rows


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    gate_proj: QLinear
    up_proj: QLinear
    gate_up_proj: QLinear  # in place of the two above if fused
    down_proj: QLinear

    def __init__(self, linears: Mapping[str, QLinear], config: ModelConfig):
        for name, linear in linears.items():
            setattr(self, name, linear)
        self.config = config
        self.adapter: ModuleAdapter | None = nnx.data(None)  # data: an adapter may be set later

    def __call__(self, x_MD, layer, keys_B):
        result_MD = self.down_proj(self._inner(x_MD, layer, keys_B), layer, keys_B)
        return result_MD if self.adapter is None else self.adapter(result_MD)

    def _inner(self, x_MD, layer, keys_B) -> jax.Array:
        config = self.config
        if not config.gated:
            up_MF = checkpoint_name(self.up_proj(x_MD, layer, keys_B), "mlp_up")
            return apply_activation(up_MF, config.activation)
        if config.fused_gate_up:
            gate_MF, up_MF = jnp.split(self.gate_up_proj(x_MD, layer, keys_B), 2, axis=1)
        else:
            gate_MF, up_MF = project([self.gate_proj, self.up_proj], x_MD, layer, keys_B)
        gate_MF, up_MF = checkpoint_name(gate_MF, "mlp_gate"), checkpoint_name(up_MF, "mlp_up")
        with jax.named_scope("swiglu"):
            return gated_activation(gate_MF, up_MF, config.gate_activation)


def by_chunks(
    mlp: Callable[[jax.Array, jax.Array | None], jax.Array],
    x_MD: Float[Array, "M D"],
    keys_B: jax.Array | None,
    rows: int,
) -> Float[Array, "M D"]:
    """Returns mlp(x, keys), computed chunk by chunk of each row's tokens, in the backward pass too.

    So no [M, F] array exists. The backward pass recomputes chunks. Masks of dropout differ from those of whole rows.
    """
    length, width = x_MD.shape[0] // rows, x_MD.shape[1]
    count = -(-length // TOKENS_AT_ONCE)
    size = -(-length // count)
    padded_BTD = jnp.pad(x_MD.reshape(rows, length, width), ((0, 0), (0, count * size - length), (0, 0)))
    keys_BZ = None if keys_B is None else jax.vmap(lambda key: fold_in_rows(key, jnp.arange(count)))(keys_B)
    keys_Z1 = None if keys_BZ is None else keys_BZ.reshape(-1, 1)
    given_ZCD = jax.lax.map(jax.checkpoint(lambda chunk: mlp(*chunk)), (padded_BTD.reshape(-1, size, width), keys_Z1))
    return given_ZCD.reshape(rows, -1, width)[:, :length].reshape(x_MD.shape)


class Router(QLinear):
    """The linear layer that scores experts, computed in f32; it is never quantized, and an adapter may be set.

    Args:
      name: the Hugging Face name without the layer's index.
      weight: [S, E, D].
      bias: [S, E], or None.
      selection_bias: f32 [S, E], added only for the choice; None: no such bias.
    """

    def __init__(
        self,
        name: str,
        weight: Float[Array, "S E D"],
        bias: Float[Array, "S E"] | None,
        selection_bias: Float[Array, "S E"] | None,
    ):
        super().__init__(name, weight, bias)
        self.e_score_correction_bias = None if selection_bias is None else Frozen(selection_bias)

    def logits(self, x_MD: Float[Array, "M D"], layer: jax.Array, keys_B: jax.Array | None) -> Float[Array, "M E"]:
        """Returns the f32 logits of all experts; a result in a narrower dtype would make scores equal that differ."""
        return self(x_MD.astype(jnp.float32), layer, keys_B)

    def selection_bias(self, layer: jax.Array) -> jax.Array | None:
        """Returns the bias of the choice in one layer, [E]."""
        bias = self.e_score_correction_bias
        return None if bias is None else select_layer(bias[...], layer)


class SparseMLP(nnx.Module):
    """The experts that a router chooses for each token, and a shared expert if the model has one.

    Leaves are stacked over the sparse layers, and `layer` counts these.
    """

    gate: Router
    experts: Experts
    shared_experts: MLP | None
    shared_expert_gate: QLinear | None

    def __init__(
        self,
        config: ModelConfig,
        gate: Router,
        experts: Experts,
        shared_experts: MLP | None,
        shared_expert_gate: QLinear | None,
    ):
        assert config.experts is not None
        self.rule = config.experts
        self.gate, self.experts = gate, experts
        self.shared_experts, self.shared_expert_gate = nnx.data(shared_experts), nnx.data(shared_expert_gate)
        self.adapter: ModuleAdapter | None = nnx.data(None)  # data: an adapter may be set later

    def __call__(self, x_MD, layer, keys_B, counted_BT=None) -> tuple[jax.Array, RoutingSums | None]:
        """Returns the result, and the sums of the router if `counted_BT` says which tokens count."""
        with jax.named_scope("router"):
            logits_ME = checkpoint_name(self.gate.logits(x_MD, layer, keys_B), "router_logits")
            experts_Mk, weights_Mk = route(logits_ME, self.rule, self.gate.selection_bias(layer), self.experts.by_row)
        result_MD = self.experts(x_MD, experts_Mk, weights_Mk, layer)
        if self.shared_experts is not None:
            result_MD = result_MD + self._shared(x_MD, layer, keys_B)
        if self.adapter is not None:
            result_MD = self.adapter(result_MD)
        sums = None if counted_BT is None else routing_sums(logits_ME, experts_Mk, self.rule.score, counted_BT)
        return result_MD, sums

    def _shared(self, x_MD: Float[Array, "M D"], layer: jax.Array, keys_B: jax.Array | None) -> Float[Array, "M D"]:
        assert self.shared_experts is not None
        shared_MD = self.shared_experts(x_MD, layer, keys_B)
        if self.shared_expert_gate is None:
            return shared_MD
        shared_MD = checkpoint_name(shared_MD, "shared_expert_out")  # the gradient of the gate reads it
        with jax.named_scope("shared_gate"):
            logit_M1 = checkpoint_name(self.shared_expert_gate(x_MD, layer, keys_B), "router_logits")
            gate_M1 = jax.nn.sigmoid(logit_M1.astype(jnp.float32))
        return gate_M1.astype(shared_MD.dtype) * shared_MD


class MixtureMLP(nnx.Module):
    """The MLPs of a model with experts: leaves of the dense layers next to those of the sparse layers.

    It holds leaves under their names; `in_layers` returns the MLP that runs.
    """

    def __init__(self, config: ModelConfig, weights: WeightFormat):
        assert config.experts is not None
        shapes = config.linear_shapes()
        names = [name for name in shapes if name.startswith("mlp.") and not name.startswith(SHARED)]
        dense = {name.removeprefix("mlp."): qlinear(name, config, weights) for name in names}
        for name, linear in dense.items():
            setattr(self, name, linear)
        self.config, self.dense = config, tuple(dense)
        self.gate = _router(config, weights)
        experts = config.experts
        assert experts is not None
        stack = len(experts.layers), experts.count
        linears = {
            name.rpartition(".")[2]: ExpertLinear(*frozen_expert_leaves(name, stack, shape, experts.bias, weights))
            for name, shape in config.expert_shapes().items()
        }
        self.experts = Experts(**linears, activation=config.gate_activation, count=experts.count)
        self.shared_experts = nnx.data(_shared_experts(config, weights))
        self.shared_expert_gate = nnx.data(_shared_expert_gate(config, weights))
        self.adapter: ModuleAdapter | None = nnx.data(None)  # data: an adapter may be set later

    def in_layers(self, run: range) -> MLP | SparseMLP:
        """Returns the MLP of consecutive layers that are all dense or all sparse."""
        assert self.config.experts is not None
        if run.start in self.config.experts.layers:
            modules = self.gate, self.experts, self.shared_experts, self.shared_expert_gate
            mlp = SparseMLP(self.config, *modules)
        else:
            mlp = MLP({name: getattr(self, name) for name in self.dense}, self.config)
        mlp.adapter = self.adapter
        return mlp


def qlinear(name: str, config: ModelConfig, weights: WeightFormat) -> QLinear:
    """Returns a projection of the layers, with placeholders as leaves; `name` is one within a layer."""
    shape, has_bias = config.linear_shapes()[name]
    weight, bias = frozen_linear_leaves(name, len(config.layers_with(name)), shape, has_bias, weights)
    return QLinear(config.hugging_face_name(f"model.layers.{name}"), weight, bias)


def _router(config: ModelConfig, weights: WeightFormat) -> Router:
    experts = config.experts
    assert experts is not None
    stack = len(experts.layers), experts.count
    bias = jnp.zeros(stack, weights.dtype) if experts.router_bias else None
    selection_bias = jnp.zeros(stack, jnp.float32) if experts.selection_bias else None
    name = config.hugging_face_name("model.layers.mlp.gate")
    return Router(name, jnp.zeros((*stack, config.embed_dim), weights.dtype), bias, selection_bias)


def _shared_experts(config: ModelConfig, weights: WeightFormat) -> MLP | None:
    names = [name for name in config.linear_shapes() if name.startswith(SHARED)]
    linears = {name.removeprefix(SHARED): qlinear(name, config, weights) for name in names}
    return MLP(linears, config) if linears else None


def _shared_expert_gate(config: ModelConfig, weights: WeightFormat) -> QLinear | None:
    experts = config.experts
    if experts is None or not experts.shared_gate:
        return None
    weight = jnp.zeros((len(experts.layers), 1, config.embed_dim), weights.dtype)
    return QLinear(config.hugging_face_name("model.layers.mlp.shared_expert_gate"), weight, None)
