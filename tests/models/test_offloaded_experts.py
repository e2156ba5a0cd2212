"""Routed experts in host memory: the same numbers as on the device, and an H100's program that holds few of them."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import aot
from pallas_kernels.formats.ggml_tensor import GgmlTensor
from qlora_jax.config import LoraArgs, ModelArgs
from qlora_jax.models.config import DENSE, STORED, WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import (
    ModelParts,
    host_paths,
    prepare_for_decoding,
    with_experts_on_host,
    with_memory_of,
)
from qlora_jax.models.precision import weight_format
from qlora_jax.nn.frozen_weight import MixedStack, PaddedStack
from qlora_jax.objectives.router_losses import FILLED
from qlora_jax.training.compiled_programs import CompiledGradients
from qlora_jax.training.step_spec import StepSpec
from tests.ggml_codes import padded_stack, random_ggml
from tests.io.tiny_models import tiny_config
from tests.marks import EXHAUSTIVE
from tests.models.mixtures import EXPERT_TARGETS, NARROW, random_mixture
from tests.training.mesh_models import mesh_batch

SPARSE = dict(model_type="glm4_moe", n_routed_experts=8, first_k_dense_replace=1, moe_intermediate_size=64)
CONFIG: dict[str, Any] = {**NARROW, **SPARSE}
LORA = LoraArgs(rank=16, target_parameters=EXPERT_TARGETS)
EXPERTS = 8
OFFLOADED = WeightFormat(dtype="float32", experts_on_host=True)
ON_CARD = WeightFormat(platform="gpu")
SHAPE = (2, 4, 16)
TYPES = {"gate_proj": ("Q4_0", "Q8_0"), "up_proj": ("Q5_0", "Q5_0"), "down_proj": ("Q8_0", "Q4_0")}
EXPERT_PATHS = [("model", "layers", "mlp", "experts", f"{name}_proj", "weight") for name in ("down", "gate", "up")]
# A mixture whose products have fused kernels on an H100.
LARGER: dict[str, Any] = dict(
    model_type="qwen3_moe",
    vocab_size=1024,
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=128,
    max_position_embeddings=2048,
    num_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=512,
)


def mixed_format(config: dict[str, Any], types: dict[str, tuple[str, ...]]) -> WeightFormat:
    """Returns the format of a file that has types of blocks for its experts, and 16 bits elsewhere."""
    model = model_config(config)
    stored = {name: (DENSE,) * len(model.layers_with(name)) for name in model.linear_shapes()}
    stored |= {name: types[name.rpartition(".")[2]] for name in model.expert_shapes()}
    return WeightFormat(quant_type=STORED, stored=tuple(stored.items()))


MIXED = mixed_format(CONFIG, TYPES)
Q4_K_M = {"gate_proj": ("Q4_K",) * 8, "up_proj": ("Q4_K",) * 8, "down_proj": ("Q6_K", "Q4_K") * 4}
MIXED_ON_CARD = dataclasses.replace(mixed_format(LARGER, Q4_K_M), platform="gpu")


def on_host(parts: ModelParts) -> ModelParts:
    """Moves the arrays of experts to host memory."""
    shapes = with_experts_on_host(jax.eval_shape(lambda: parts), OFFLOADED)

    def moved(leaf: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
        return leaf if shape.sharding is None else jax.device_put(leaf, shape.sharding)

    return dataclasses.replace(parts, base=jax.tree.map(moved, parts.base, shapes.base))


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param(OFFLOADED, marks=EXHAUSTIVE),
        pytest.param(dataclasses.replace(OFFLOADED, quant_type=None), marks=EXHAUSTIVE),
    ],
)
def test_losses_and_gradients_equal_those_of_experts_on_the_device(weights):
    """Both programs are compiled from shapes, as those of a run."""
    here = dataclasses.replace(weights, experts_on_host=False)
    parts, batch = random_mixture(CONFIG, LORA, here), mesh_batch(CONFIG, SHAPE)
    batch[FILLED] = jnp.full((*SHAPE[:2], 1), SHAPE[2] - 1, jnp.int32)
    away = on_host(parts)
    assert host_paths(away) == EXPERT_PATHS and not host_paths(parts)
    steps = [
        CompiledGradients(StepSpec(model=model_config(CONFIG), weights=each, lora=LORA, batch=SHAPE))
        for each in (weights, here)
    ]
    found, expected = (step(each, batch, None) for step, each in zip(steps, (away, parts), strict=True))
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


@pytest.mark.slow
def test_losses_and_gradients_equal_those_on_the_device_if_types_of_blocks_differ():
    """The types are those of a file's layers; of one projection they are all the same."""
    away, here = (dataclasses.replace(MIXED, dtype="float32", experts_on_host=each) for each in (True, False))
    parts, batch = random_blocks(random_mixture(CONFIG, LORA, here)), mesh_batch(CONFIG, SHAPE)
    batch[FILLED] = jnp.full((*SHAPE[:2], 1), SHAPE[2] - 1, jnp.int32)
    away_parts = on_host(with_padded_stacks(parts))
    kinds = [type(dict(nnx.to_flat_state(away_parts.base))[path].get_value()) for path in EXPERT_PATHS]
    assert kinds == [PaddedStack, PaddedStack, GgmlTensor]
    steps = [
        CompiledGradients(StepSpec(model=model_config(CONFIG), weights=each, lora=LORA, batch=SHAPE))
        for each in (away, here)
    ]
    found, expected = (step(each, batch, None) for step, each in zip(steps, (away_parts, parts), strict=True))
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert np.isfinite(theirs).all()
        np.testing.assert_array_equal(ours, theirs, strict=True)


def random_blocks(parts: ModelParts) -> ModelParts:
    """Returns parts whose blocks have scales of weights, where random bytes are scales that overflow."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, GgmlTensor):
            return leaf
        return random_ggml(leaf.ggml_type, leaf.stack_shape, leaf.shape, seed=leaf.codes.size)

    is_leaf = lambda leaf: isinstance(leaf, GgmlTensor)  # noqa: E731
    return dataclasses.replace(parts, base=jax.tree.map(one, parts.base, is_leaf=is_leaf))


def with_padded_stacks(parts: ModelParts) -> ModelParts:
    """Returns parts in which each MixedStack of experts is a PaddedStack of the same blocks."""

    def one(leaf: Any) -> Any:
        return padded_stack(leaf) if isinstance(leaf, MixedStack) else leaf

    is_leaf = lambda leaf: isinstance(leaf, MixedStack)  # noqa: E731
    return dataclasses.replace(parts, base=jax.tree.map(one, parts.base, is_leaf=is_leaf))


def test_the_scan_fetches_one_layer_and_no_stack():
    """No array of all layers is moved: every array that is moved has the leading axis of experts."""
    program = StepSpec(model=model_config(CONFIG), weights=OFFLOADED, lora=LORA, batch=SHAPE).gradients()
    jaxpr = program.function.trace(*program.args, **program.kwargs).jaxpr
    fetched = [variable.aval.shape for moved in equations(jaxpr, "device_put") for variable in moved.outvars]
    assert len(fetched) >= 12 and {shape[0] for shape in fetched} == {EXPERTS}


def equations(jaxpr, name: str):
    """Yields the equations of a primitive, those of called programs included."""
    for one in jaxpr.eqns:
        if one.primitive.name == name:
            yield one
        for inner in jax.tree.leaves(one.params, is_leaf=lambda each: hasattr(each, "eqns") or hasattr(each, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(getattr(inner, "jaxpr", inner), name)


@pytest.mark.parametrize(
    ("on_card", "layers"),
    [pytest.param(ON_CARD, 2.2, marks=EXHAUSTIVE), pytest.param(MIXED_ON_CARD, 2.3, marks=EXHAUSTIVE)],
)
def test_a_card_holds_the_codes_of_few_layers(on_card, layers):
    """The stacks are arguments in host memory, and two layers of them are on the card."""
    if problem := aot.problem():
        pytest.skip(f"no compiling for absent cards: {problem}")
    used, offloaded = {}, dataclasses.replace(on_card, experts_on_host=True)
    on_device, stack = map(_bytes_of_experts, (on_card, offloaded))
    for weights in (on_card, offloaded):
        lowered = StepSpec(model=model_config(LARGER), weights=weights, lora=LoraArgs(rank=16), batch=(1, 1, 512))
        program, options = lowered.gradients(), lowered.compiler_options or None
        used[weights.experts_on_host] = aot.compile_for(
            "h100", program.function, *program.args, **program.kwargs, compiler_options=options
        )
    here, away = used[False].memory, used[True].memory
    assert (here.host.arguments, away.host.arguments) == (0, stack)
    assert here.device.arguments - away.device.arguments == on_device
    assert away.device.temporaries - here.device.temporaries <= layers * stack / LARGER["num_hidden_layers"]
    wide = LARGER["num_experts"], LARGER["moe_intermediate_size"], LARGER["hidden_size"]
    made = re.findall(r"(?:bf16|f32)\[([\d,]+)\]", used[True].text)
    assert not [sizes for sizes in made if sorted(map(int, sizes.split(",")))[-3:] == sorted(wide)]


def _bytes_of_experts(weights: WeightFormat) -> int:
    parts = StepSpec(
        model=model_config(LARGER), weights=weights, lora=LoraArgs(rank=16), batch=(1, 1, 512)
    ).arrays.parts
    flat = dict(nnx.to_flat_state(parts.base))
    return sum(leaf.size * leaf.dtype.itemsize for path in EXPERT_PATHS for leaf in jax.tree.leaves(flat[path]))


def test_decoding_is_lowered_with_experts_in_host_memory():
    parts = StepSpec(model=model_config(CONFIG), weights=OFFLOADED, lora=LORA, batch=SHAPE).arrays.parts
    assert host_paths(parts) == EXPERT_PATHS
    shapes = with_memory_of(jax.eval_shape(prepare_for_decoding, parts), parts)
    assert host_paths(shapes) == EXPERT_PATHS


def test_experts_that_are_partly_in_16_bits_are_refused():
    stored = dict.fromkeys(model_config(CONFIG).expert_shapes(), ("Q4_K", "dense"))
    weights = dataclasses.replace(OFFLOADED, quant_type=STORED, stored=tuple(stored.items()))
    with pytest.raises(
        ValueError, match=r"model.experts: offload needs codes in all .*mlp.experts.down_proj: Q4_K, dense"
    ):
        StepSpec(model=model_config(CONFIG), weights=weights, lora=LORA, batch=SHAPE).gradients()


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match=r"model.experts: found 'offload', but the model has no routed experts"):
        weight_format(ModelArgs(path="", experts="offload"), model_config(tiny_config()))
