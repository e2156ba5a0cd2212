"""The methods `lora`, and what it shares with LoRA-FA and DoRA: ranks, scalings and the values at the start."""

import functools
from collections.abc import Collection, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.config import LoraArgs
from qlora_jax.methods.expert_adapters import add_expert_adapters
from qlora_jax.methods.method import Given, Method, linears, our_names
from qlora_jax.methods.targets import Layers, ranks_and_scalings, target_layers
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.linear import LinearAdapter, QLinear, named_key
from qlora_jax.nn.lora import LoRA, initial_factors
from qlora_jax.sharding import born_cut


class LowRankStart(NamedTuple):
    """A targeted projection, and what its low-rank adapter starts with; `layers` None: all of them."""

    linear: QLinear
    lora_a: jax.Array
    lora_b: jax.Array
    scaling: float
    layers: Layers | None


class LowRankMethod(Method):
    """A method that adds scaling * A B to projections."""

    def targets(self, config: ModelConfig, spec: LoraArgs) -> Collection[str]:
        """Returns the targeted projections; raises ValueError as `ranks_and_scalings`."""
        return ranks_and_scalings(config, spec)

    def attach(self, model: CausalLM, spec: LoraArgs, given: Given) -> None:
        """Adds an adapter to each targeted projection."""
        for start in [*_starts(model, spec, given)]:
            start.linear.adapter = self.adapter(start, spec, given)

    def adapter(self, start: LowRankStart, spec: LoraArgs, given: Given) -> LinearAdapter:
        """Returns the adapter of one projection."""
        return LoRA(start.lora_a, start.lora_b, start.scaling, spec.dropout, start.layers)


def _starts(model: CausalLM, spec: LoraArgs, given: Given) -> Iterator[LowRankStart]:
    known, ours, num_layers = dict(linears(model)), our_names(model.config), model.config.num_layers
    layers_of = target_layers(model.config, spec)
    for name, (rank, scaling) in ranks_and_scalings(model.config, spec).items():
        linear, layers = known[name], layers_of[name]
        if given.initial is None:
            draw = functools.partial(
                initial_factors, stack=num_layers, shape=linear.shape, rank=rank, dtype=spec.dtype, layers=layers
            )
            a, b = born_cut(draw, named_key(given.key, name), given.mesh)
        else:
            a, b = (jnp.asarray(given.initial[ours[name]][leaf], spec.dtype) for leaf in ("lora_a", "lora_b"))
        yield LowRankStart(linear, a, b, scaling, None if len(layers) == num_layers else layers)


class LoRAMethod(LowRankMethod):
    """LoRA on projections, and on parameters of experts and routers."""

    def attach(self, model: CausalLM, spec: LoraArgs, given: Given) -> None:
        """Adds an adapter to each targeted projection and parameter."""
        super().attach(model, spec, given)
        add_expert_adapters(model, spec, given.key, given.mesh)


METHOD = LoRAMethod()
