"""The features of a mixture of experts, a part of ModelConfig."""

import dataclasses

from qlora_jax.nn.router import RoutingRule

# Modules of a layer's MLP, by the layers that have them.
OF_SPARSE = ("gate", "experts", "shared_experts", "shared_expert_gate")
OF_DENSE = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
MAX_EXPERTS = 1 << 12  # per layer; a multiple of the largest published models'
# transformers' parameters that have all experts of a layer: the projections that each of them fuses, in order.
FUSED_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig(RoutingRule):
    """The experts of the sparse layers, and the rule that chooses among them.

    Attributes:
      count: E, the experts of a layer.
      mlp_dim: F, inner width of one expert.
      layers: numbers of the sparse layers, ascending; the MLP of every other layer is dense.
      selection_bias: True if a bias is added to the scores only for the choice.
      router_bias: True if the router adds a bias to its logits.
      bias: True if the projections of experts add a bias.
      interleaved: True if transformers' parameter `gate_up_proj` has alternating outputs of gate and up. Here
        they are two weights.
      shared_mlp_dim: inner width of the expert that every token uses; 0: no such expert.
      shared_gate: True if the shared expert's result is multiplied by the sigmoid of a linear layer with one output.
    """

    count: int
    mlp_dim: int
    layers: tuple[int, ...]
    selection_bias: bool = False
    router_bias: bool = False
    bias: bool = False
    interleaved: bool = False
    shared_mlp_dim: int = 0
    shared_gate: bool = False

    def layers_with(self, module: str, num_layers: int) -> tuple[int, ...]:
        """Returns the layers whose MLP has a module, such as `gate_proj` or `experts`."""
        if module in OF_SPARSE:
            return self.layers
        every = range(num_layers)
        return tuple(layer for layer in every if layer not in self.layers) if module in OF_DENSE else tuple(every)

    def shapes(self, width: int) -> dict[str, tuple[int, int]]:
        """Returns {name within a layer: (N, K) of one expert} for a residual stream of `width`."""
        inner = {f"mlp.experts.{name}": (self.mlp_dim, width) for name in ("gate_proj", "up_proj")}
        return inner | {"mlp.experts.down_proj": (width, self.mlp_dim)}

    def other_parameters(self, width: int) -> int:
        """Returns the parameters of a sparse layer's router and of the gate of its shared expert."""
        return self.count * (width + self.router_bias) + self.shared_gate * width
