"""Selects projections by `target_modules` and adds adapters to them."""

import functools
import operator
import re
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qlora_jax.config import LoraArgs
from qlora_jax.methods.bitfit import make_bias_trainable
from qlora_jax.methods.bottleneck import Bottleneck
from qlora_jax.methods.dora import DoRA, InferenceDoRA
from qlora_jax.methods.expert_adapters import add_expert_adapters
from qlora_jax.methods.full import make_trainable
from qlora_jax.methods.ia3 import IA3
from qlora_jax.methods.lora_fa import LoRAFA
from qlora_jax.methods.oft import OFT, InferenceOFT
from qlora_jax.methods.targets import (
    AUTO,
    ROUTER,
    Layers,
    projection_layers,
    ranks_and_scalings,
    target_layers,
    target_layers_of,
    whole_stacks,
)
from qlora_jax.methods.vera import Projections, VeRA, draw_projections
from qlora_jax.models.config import NORM_PLACEMENTS, ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import ModelParts, combine, partition
from qlora_jax.nn.linear import Adapter, QLinear, named_key
from qlora_jax.nn.lora import LoRA, initial_factors
from qlora_jax.nn.norm import LayerNorm, RMSNorm
from qlora_jax.nn.variables import Frozen
from qlora_jax.regex import matches_end
from qlora_jax.sharding import born_cut, mesh_of

# The defaults of (IA)^3: keys, values (or the fused projection), and the MLP's last projection.
LAST = "mlp.down_proj"
IA3_TARGETS = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj", LAST)
FINAL_NORM = "model.norm"
# The modules of a layer whose results go through bottleneck adapters.
BOTTLENECKS = {"houlsby": ("self_attn", "mlp"), "pfeiffer": ("mlp",)}

Linears = Mapping[str, QLinear]
Factors = Mapping[str, Mapping[str, jax.Array | np.ndarray]]


def our_names(config: ModelConfig) -> dict[str, str]:
    """Returns {Hugging Face name: our name} of each projection; ours are like `model.layers.self_attn.q_proj`."""
    names = (f"model.layers.{name}" for name in config.linear_shapes())
    return {config.hugging_face_name(name): name for name in names}


def linears(model: CausalLM) -> Iterator[tuple[str, QLinear]]:
    """Yields (Hugging Face name without the layer's index, projection) of each projection."""
    for name in model.config.linear_shapes():
        linear: QLinear = operator.attrgetter(name)(model.model.layers)
        yield linear.name, linear


def norms(model: CausalLM) -> Iterator[tuple[str, RMSNorm | LayerNorm]]:
    """Yields (Hugging Face name without the layer's index, norm) of each norm."""
    for name in model.config.norm_widths():
        norm: RMSNorm | LayerNorm = operator.attrgetter(name)(model.model.layers)
        yield model.config.hugging_face_name(f"model.layers.{name}"), norm
    yield model.config.hugging_face_name(FINAL_NORM), model.model.norm


def add_lora(
    model: CausalLM,
    spec: LoraArgs,
    key: jax.Array,
    initial: Factors | None = None,
    mesh: Mesh | None = None,
    projections: Projections | None = None,
) -> None:
    """Adds adapters to the targeted projections and parameters of `model`, in place; they change nothing until trained.

    With the methods `full`, `ln_tuning` and `bitfit`, weights of the model become trainable instead. The initial values
    of an adapter depend on `key` and its name only, not on the other targets or on the mesh.

    Args:
      spec: the `lora` section of a config.
      key: draws A.
      initial: initial A and B in place of drawn ones (`lora.init`), in the form of `ModelParts.lora`.
      mesh: devices that the weights, A and B are cut over; each draws its part of A and B. None for the
        default device.
      projections: frozen A and B of the method `vera`; None: those of `vera_projections`.

    Raises:
      ValueError: a pattern that matches nothing, some layers of a stack with a method that requires all, a rank below
        1, blocks that do not divide a projection's inputs, 4-bit weights or experts with the method `full`, or a model
        without a bias with `bitfit`.
    """
    if spec.method in NOT_ON_PROJECTIONS:
        NOT_ON_PROJECTIONS[spec.method](model, spec, key)
        return
    known = dict(linears(model))
    if spec.method == "ia3":
        made = _ia3s(model, known, spec)
    elif spec.method == "oft":
        made = _ofts(model, spec)
    elif spec.method == "vera":
        made = _veras(model, spec, projections)
    else:
        made = _low_rank(model, known, spec, key, initial, mesh)
    for name, adapter in made.items():
        known[name].adapter = adapter
    add_expert_adapters(model, spec, key, mesh)


def _train_all(model: CausalLM, spec: LoraArgs, key: jax.Array) -> None:
    if model.config.experts is not None:
        raise ValueError(
            "lora.method=full: the model is a mixture of experts, whose experts cannot train in full (found "
            f"{model.config.experts.count} experts per layer). Set lora.method=lora, with lora.target_parameters for "
            "adapters on experts."
        )
    for _, linear in linears(model):
        make_trainable(linear, spec.dtype)
    for _, norm in norms(model):
        norm.make_trainable()


def _train_norms(model: CausalLM, spec: LoraArgs, key: jax.Array) -> None:
    chosen = norm_targets(model.config, spec)
    for name, norm in norms(model):
        if name in chosen:
            norm.make_trainable()


def _train_biases(model: CausalLM, spec: LoraArgs, key: jax.Array) -> None:
    chosen = bias_targets(model.config, spec)
    for name, linear in linears(model):
        if name in chosen:
            make_bias_trainable(linear)
    for name, norm in norms(model):
        if name in chosen and isinstance(norm, LayerNorm) and norm.bias is not None:
            norm.make_bias_trainable()


def _add_bottlenecks(model: CausalLM, spec: LoraArgs, key: jax.Array) -> None:
    config, layers = model.config, model.model.layers
    for group in BOTTLENECKS[spec.method]:
        getattr(layers, group).adapter = Bottleneck.init(
            named_key(key, f"model.layers.{group}"),
            config.num_layers,
            config.embed_dim,
            rank=spec.rank,
            activation=spec.bottleneck_activation,
            dtype=spec.dtype,
        )


NOT_ON_PROJECTIONS: Mapping[str, Callable[[CausalLM, LoraArgs, jax.Array], None]] = {
    "full": _train_all,
    "ln_tuning": _train_norms,
    "bitfit": _train_biases,
    **dict.fromkeys(BOTTLENECKS, _add_bottlenecks),
}


def norm_widths(config: ModelConfig) -> dict[str, int]:
    """Returns {Hugging Face name without the layer's index: width} of each norm, as `norms` yields them."""
    widths = {f"model.layers.{name}": width for name, width in config.norm_widths().items()}
    return {config.hugging_face_name(name): width for name, width in (widths | {FINAL_NORM: config.embed_dim}).items()}


def norm_targets(config: ModelConfig, spec: LoraArgs) -> list[str]:
    """Returns the norms that train with the method `ln_tuning`, by their Hugging Face names.

    The defaults are all norms of the residual stream: those before and after attention and MLP, and the final one.
    Norms of queries and keys train if `target_modules` names them, as in PEFT.

    Raises:
      ValueError: a pattern that matches nothing, or only some layers of a stack.
    """
    if spec.target_modules != AUTO:
        every = dict.fromkeys(norm_widths(config), tuple(range(config.num_layers)))
        return list(target_layers_of(every, spec, config.num_layers, "norms"))
    residual = (*(f"model.layers.{name}" for name in NORM_PLACEMENTS[config.layout].norms), FINAL_NORM)
    return [config.hugging_face_name(name) for name in residual]


def bias_widths(config: ModelConfig) -> dict[str, int]:
    """Returns {Hugging Face name without the layer's index: width} of each linear layer and norm that has a bias."""
    shapes = {f"model.layers.{name}": each for name, each in config.linear_shapes().items()}
    biased = {config.hugging_face_name(name): n for name, ((n, _), has_bias) in shapes.items() if has_bias}
    return biased | (norm_widths(config) if config.norm == "layer" else {})


def bias_targets(config: ModelConfig, spec: LoraArgs) -> list[str]:
    """Returns the linear layers and norms whose biases train with the method `bitfit`, by their Hugging Face names.

    Raises:
      ValueError: the model has no bias, or a pattern matches nothing, or only some layers of a stack.
    """
    every = tuple(range(config.num_layers))
    layers_of = {name: projection_layers(config).get(name, every) for name in bias_widths(config)}
    if not layers_of:
        raise ValueError(
            "lora.method=bitfit: the model has no bias that can train (found linear layers and norms without biases). "
            "Set lora.method=ln_tuning, which trains the weights of the norms, or lora"
        )
    return list(target_layers_of(layers_of, spec, config.num_layers, "modules with a bias"))


def _ia3s(model: CausalLM, known: Linears, spec: LoraArgs) -> dict[str, Adapter]:
    scaled, on_inputs = ia3_targets(model.config, spec)
    stacks = projection_layers(model.config)
    return {name: IA3.init(len(stacks[name]), known[name].shape, on_input=name in on_inputs) for name in scaled}


def ia3_targets(config: ModelConfig, spec: LoraArgs) -> tuple[list[str], list[str]]:
    """Returns (projections that get a vector, those of them whose inputs are scaled).

    The defaults are keys, values, and the inputs of the MLP's last projection.

    Raises:
      ValueError: a pattern that matches nothing, or only some layers of a stack.
    """
    names = {name: config.hugging_face_name(f"model.layers.{name}") for name in config.linear_shapes()}
    usual = [names[name] for name in IA3_TARGETS if name in names]
    scaled = usual if spec.target_modules == AUTO else list(target_layers(config, spec))
    if spec.feedforward_modules is None:
        return scaled, [name for name in scaled if name == names.get(LAST)]
    layers_of: dict[str, Layers] = {name: projection_layers(config)[name] for name in scaled}
    found = [
        name
        for entry in spec.feedforward_modules
        for name in whole_stacks("feedforward_modules", re.escape(entry), matches_end, layers_of)
    ]
    return scaled, found


def _ofts(model: CausalLM, spec: LoraArgs) -> dict[str, Adapter]:
    terms = spec.num_cayley_neumann_terms if spec.use_cayley_neumann else None
    stacks = projection_layers(model.config)
    return {
        name: OFT.init(len(stacks[name]), *blocks, neumann_terms=terms, dtype=spec.dtype)
        for name, blocks in oft_blocks(model.config, spec).items()
    }


def oft_blocks(config: ModelConfig, spec: LoraArgs) -> dict[str, tuple[int, int]]:
    """Returns {Hugging Face name: (trained blocks, block size)} of each projection whose inputs OFT rotates.

    One block trains if all share it.

    Raises:
      ValueError: the inputs of a projection are not a multiple of the blocks, or a pattern that matches nothing or only
        some layers of a stack.
    """
    setting, value = ("oft_blocks", spec.oft_blocks) if spec.oft_blocks else ("oft_block_size", spec.oft_block_size)
    inputs = {name: k for name, (_, k) in _target_shapes(config, spec).items()}
    if single := [name for name, k in inputs.items() if k == spec.oft_blocks]:
        raise ValueError(
            f"lora.oft_blocks: found {value}, which makes blocks of 1 input in {', '.join(single)}, and these do not "
            "rotate. Set a smaller number of blocks."
        )
    if wrong := [f"{name} has {k} inputs" for name, k in inputs.items() if k % value]:
        raise ValueError(f"lora.{setting}: found {value}, but {'; '.join(wrong)}. Set it to a divisor of all of these.")
    counts = {name: (value, k // value) if spec.oft_blocks else (k // value, value) for name, k in inputs.items()}
    return {name: (1 if spec.block_share else count, size) for name, (count, size) in counts.items()}


def _target_shapes(config: ModelConfig, spec: LoraArgs) -> dict[str, tuple[int, int]]:
    """Returns {Hugging Face name: (N, K)} of each targeted projection."""
    shapes = {config.hugging_face_name(f"model.layers.{n}"): shape for n, (shape, _) in config.linear_shapes().items()}
    return {name: shapes[name] for name in target_layers(config, spec)}


def _veras(model: CausalLM, spec: LoraArgs, projections: Projections | None) -> dict[str, Adapter]:
    shapes = _target_shapes(model.config, spec)
    a, b = projections or vera_projections(model.config, spec)
    dtype = model.model.embed_tokens.weight.get_value().dtype
    shared = Frozen(jnp.asarray(a.T, dtype)), Frozen(jnp.asarray(b, dtype))
    settings = {"d_initial": spec.d_initial, "dropout": spec.dropout}
    stacks = projection_layers(model.config)
    return {name: VeRA.init(len(stacks[name]), n, *shared, **settings) for name, (n, _) in shapes.items()}


def vera_projections(config: ModelConfig, spec: LoraArgs) -> Projections:
    """Returns the frozen A and B of VeRA, which all targeted projections share."""
    return draw_projections(spec.projection_prng_key, spec.rank, largest_shape(config, spec))


def largest_shape(config: ModelConfig, spec: LoraArgs) -> tuple[int, int]:
    """Returns the largest N and the largest K of the targeted projections."""
    shapes = _target_shapes(config, spec).values()
    return max(n for n, _ in shapes), max(k for _, k in shapes)


# The function that resolves the layers of each method. The other methods train the same layers of every model.
TARGETS: Mapping[str, Callable[[ModelConfig, LoraArgs], object]] = {
    **dict.fromkeys(("lora", "lora_fa", "dora"), ranks_and_scalings),
    "ia3": ia3_targets,
    "oft": oft_blocks,
    "vera": target_layers,
    "ln_tuning": norm_targets,
    "bitfit": bias_targets,
}


def check_targets(config: ModelConfig, spec: LoraArgs) -> None:
    """Raises ValueError, as `add_lora` would, if the settings name layers that a model does not have."""
    if spec.method in TARGETS:
        TARGETS[spec.method](config, spec)


def _low_rank(
    model: CausalLM, known: Linears, spec: LoraArgs, key: jax.Array, initial: Factors | None, mesh: Mesh | None
) -> dict[str, Adapter]:
    made: dict[str, Adapter] = {}
    ours, num_layers = our_names(model.config), model.config.num_layers
    layers_of = target_layers(model.config, spec)
    for name, (rank, scaling) in ranks_and_scalings(model.config, spec).items():
        linear, layers = known[name], layers_of[name]
        if initial is None:
            draw = functools.partial(
                initial_factors, stack=num_layers, shape=linear.shape, rank=rank, dtype=spec.dtype, layers=layers
            )
            a, b = born_cut(draw, named_key(key, name), mesh)
        else:
            a, b = (jnp.asarray(initial[ours[name]][leaf], spec.dtype) for leaf in ("lora_a", "lora_b"))
        if spec.method == "dora":
            made[name] = DoRA.init(a, b, linear.weight.get_value(), scaling, spec.dropout, mesh)
        else:
            kind = LoRAFA if spec.method == "lora_fa" else LoRA
            made[name] = kind(a, b, scaling, spec.dropout, None if len(layers) == num_layers else layers)
    return made


VECTORS = (
    "magnitude",
    "scale",
    "vector",
    "gain",
    "bias",
    *("down_bias", "up_bias", "lambda_b", "lambda_d"),
)  # trainable vectors, which stay in f32


def prepare_for_decoding(parts: ModelParts) -> ModelParts:
    """Returns the model for many calls of few tokens, with the shared parts computed once.

    These are the norms of DoRA, the rotations of OFT, and the cast of matrices to the compute dtype. Those of routers,
    which compute in f32, are not cast.
    """
    model, mesh = combine(parts), mesh_of(parts)
    for _, linear in linears(model):
        if isinstance(linear.adapter, DoRA) and not isinstance(linear.adapter, InferenceDoRA):
            linear.adapter = InferenceDoRA(linear.adapter, linear.weight.get_value(), mesh)
        elif isinstance(linear.adapter, OFT) and not isinstance(linear.adapter, InferenceOFT):
            linear.adapter = InferenceOFT(linear.adapter)
    dtype = model.model.embed_tokens.weight[...].dtype
    settled = partition(model)
    cast = {
        name: {leaf: values if leaf in VECTORS else values.astype(dtype) for leaf, values in leaves.items()}
        for name, leaves in settled.lora.items()
        if not name.endswith(ROUTER)
    }
    return settled.with_lora({**settled.lora, **cast})
