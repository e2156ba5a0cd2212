"""Adds LoRA to the parameters that lora.target_parameters names: of routed experts, and of routers."""

import functools

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qlora_jax.config import LoraArgs
from qlora_jax.methods.expert_lora import ExpertLoRA
from qlora_jax.methods.targets import Layers, parameter_ranks_and_scalings, target_parameters
from qlora_jax.models.config import ROUTER, ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.mlp import MixtureMLP
from qlora_jax.nn.linear import named_key
from qlora_jax.nn.lora import LoRA, initial_factors
from qlora_jax.sharding import born_cut


def add_expert_adapters(model: CausalLM, spec: LoraArgs, key: jax.Array, mesh: Mesh | None = None) -> None:
    """Adds an adapter to each targeted parameter, in place; it changes nothing until trained.

    Raises:
      ValueError: a name that matches nothing, or a rank below 1.
    """
    config = model.config
    layers_of = target_parameters(config, spec)
    if not layers_of:
        return
    mlp = model.model.layers.mlp
    assert isinstance(mlp, MixtureMLP)
    shapes = parameter_shapes(config)
    for name, (rank, scaling) in parameter_ranks_and_scalings(config, spec).items():
        inner, shape = shapes[name]
        draw = functools.partial(
            initial_parameter_factors, config=config, spec=spec, inner=inner, shape=shape, rank=rank, dtype=spec.dtype
        )
        a, b = born_cut(functools.partial(draw, layers=layers_of[name]), named_key(key, name), mesh)
        if inner == ROUTER:
            mlp.gate.adapter = LoRA(a, b, scaling, 0.0, layers_of[name])
        else:
            getattr(mlp.experts, inner.rpartition(".")[2]).adapter = ExpertLoRA(a, b, scaling, layers_of[name])


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[str, tuple[int, int]]]:
    """Returns {Hugging Face name: (name within a layer, (N out, K in))} of what target_parameters can name."""
    if config.experts is None:
        return {}
    shapes = config.expert_targets() | {ROUTER: (config.experts.count, config.embed_dim)}
    return {config.hugging_face_name(f"model.layers.{name}"): (name, shape) for name, shape in shapes.items()}


def initial_parameter_factors(
    key: jax.Array,
    *,
    config: ModelConfig,
    spec: LoraArgs,
    inner: str,
    shape: tuple[int, int],
    rank: int,
    dtype: DTypeLike,
    layers: Layers,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns A [S, E, K, R] and B [S, E, R, N], or [S, K, R] and [S, R, N] for a router, as `initial_factors`.

    Each layer gets the A that it gets among all sparse layers. E is 1 if experts share an adapter.
    """
    assert config.experts is not None
    sparse = config.experts.layers
    rows = tuple(sparse.index(layer) for layer in layers)
    if inner == ROUTER:
        return initial_factors(key, len(sparse), shape, rank, dtype, rows)
    experts = 1 if spec.share_experts else config.experts.count
    rows_of_experts = tuple(row * experts + expert for row in rows for expert in range(experts))
    a, b = initial_factors(key, len(sparse) * experts, shape, rank, dtype, rows_of_experts)
    return a.reshape(len(rows), experts, *a.shape[1:]), b.reshape(len(rows), experts, *b.shape[1:])
