"""The formulas for a step's bytes equal those of its arrays, its compiled update, and what its scans fetch."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from pallas_kernels.formats.layouts import LAYOUTS
from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.models.config import STORED, WeightFormat
from qlora_jax.models.partition import host_paths
from qlora_jax.training.cost import memory_use
from qlora_jax.training.step_spec import StepSpec
from tests.training.compiled_text import TO_READ
from tests.training.cost.step_cases import (
    EVERY,
    LAYERS,
    MIXTURE,
    MODEL,
    SPARSE,
    counted_step,
    leaf_bytes,
)
from tests.training.real_models import REAL_MODELS


def test_the_update_reads_and_overwrites_the_formulas_bytes():
    step = StepSpec(model=MODEL, weights=WeightFormat(), lora=EVERY, batch=(1, 1, 128))
    function, args, kwargs = step.update()
    memory = function.lower(*args, **kwargs).compile(TO_READ).memory_analysis()
    counted = counted_step(MODEL, WeightFormat(), step, (1, 1, 128), EVERY)
    lora, state = memory_use.lora_bytes(counted), memory_use.optimizer_bytes(counted)
    assert memory.argument_size_in_bytes == 2 * lora + state
    assert memory.alias_size_in_bytes == lora + state


@pytest.mark.parametrize("name", REAL_MODELS)
def test_kinds_of_frozen_weights_by_hand(name: str):
    """A code has 4 bits, or more by the layout's padding; a block of 64 a byte, 256 blocks and each weight an f32."""
    model, weights = REAL_MODELS[name], WeightFormat(platform="gpu")
    step = StepSpec(model=model, weights=weights, lora=LoraArgs(), batch=(1, 1, 64))
    found = memory_use.frozen_bytes(counted_step(model, weights, step, (1, 1, 64), LoraArgs()))
    shapes = [shape for shape, _ in model.linear_shapes().values()]
    layers, sizes = model.num_layers, [math.prod(shape) for shape in shapes]
    codes = [math.prod(LAYOUTS[weights.layout_for(shape)].codes_shape(shape)) for shape in shapes]
    assert all(size / 2 <= stored < 0.6 * size for stored, size in zip(codes, sizes, strict=True))
    biases = sum(n for (n, _), biased in model.linear_shapes().values() if biased)
    norms = layers * sum(model.norm_widths().values()) + model.embed_dim
    assert found == {
        "codes": layers * sum(codes),
        "constants": layers * sum(size // 64 + 4 * -(-size // 64 // 256) + 4 for size in sizes),
        "tables": (2 - model.tie_embeddings) * model.vocab_size * model.embed_dim * 2,
        "routers": 0,
        "adapters": 0,
        "vectors": 2 * (norms + layers * biases),
    }


def test_kinds_of_a_mixture_by_hand():
    """Biases of experts are vectors; those of the selection are f32, next to the routers and shared experts' gates."""
    experts = dataclasses.replace(SPARSE, layers=(2, 3, 4, 5, 6), router_bias=True, selection_bias=True, bias=True)
    model, weights = dataclasses.replace(MIXTURE, experts=experts), WeightFormat(quant_type=None)
    lora = LoraArgs(method="vera", rank=24, target_modules=["q_proj"])
    step = StepSpec(model=model, weights=weights, lora=lora, batch=(1, 1, 64))
    found = memory_use.frozen_bytes(counted_step(model, weights, step, (1, 1, 64), lora))
    assert found["routers"] == 5 * (2 * 8 * (192 + 1) + 4 * 8 + 2 * 192)
    assert found["adapters"] == 2 * 24 * (192 + 192)
    assert found["vectors"] == 2 * ((2 * 7 + 1) * 192 + 7 * (192 + 2 * 64) + 5 * 8 * (2 * 128 + 192))
    of_attention, of_mlp, of_experts = 192 * (2 * 192 + 2 * 64), 3 * 192 * 320, 3 * 192 * (64 + 8 * 128)
    assert found["codes"] == 2 * (7 * of_attention + 2 * of_mlp + 5 * of_experts)


def test_bytes_of_offloaded_blocks_are_those_in_host_memory():
    """Layers of a projection are as large as its largest one."""
    experts = dataclasses.replace(SPARSE, layers=(2, 3, 4, 5, 6))
    model = dataclasses.replace(MIXTURE, experts=experts)
    stored = {name: ("Q8_0",) * len(model.layers_with(name)) for name in model.linear_shapes()}
    stored |= dict.fromkeys(model.expert_shapes(), ("Q4_0", "Q5_0", "Q4_0", "Q4_0", "Q5_0"))
    weights = WeightFormat(platform="gpu", quant_type=STORED, stored=tuple(stored.items()), experts_on_host=True)
    step = StepSpec(model=model, weights=weights, lora=LoraArgs(rank=8), batch=(1, 1, 64))
    counted = counted_step(model, weights, step, (1, 1, 64), LoraArgs(rank=8))
    base = dict(nnx.to_flat_state(step.arrays.parts.base))
    on_host = jax.tree.leaves([base[path] for path in host_paths(step.arrays.parts)])
    assert sum(map(leaf_bytes, on_host)) == sum(memory_use.offloaded_expert_bytes(counted).values())
    assert sum(map(leaf_bytes, on_host)) == 5 * 8 * 3 * 192 * 128 * 22 // 32  # Q5_0 has 22 bytes per 32 numbers


@pytest.mark.parametrize("name", ["adamw_32bit", "adamw_8bit", "lion_32bit", "lion_8bit"])
def test_bytes_of_every_optimizer_by_hand(name: str):
    """A moment has 4 bytes per number; in 8 bits a byte, and an f32 per 256, if a layer's leaf has 4,096 or more."""
    lora, optim = LoraArgs(rank=8, rank_pattern={"down_proj": 16}), OptimArgs(name=name)
    step = StepSpec(model=MODEL, weights=WeightFormat(), lora=lora, batch=(1, 1, 64), optim=optim)
    counted = counted_step(MODEL, WeightFormat(), step, (1, 1, 64), lora, optimizer=name, new_tokens=5)
    shapes = {inner: shape for inner, (shape, _) in MODEL.linear_shapes().items()}
    ranks = {inner: 16 if inner == "mlp.down_proj" else 8 for inner in shapes}
    leaves = [(LAYERS, ranks[inner] * size) for inner, shape in shapes.items() for size in shape]
    leaves += [(5, MODEL.embed_dim)] * 2  # rows of new tokens, of embedding and head
    is_8bit, moments = name.endswith("_8bit"), 2 if name.startswith("adamw") else 1
    in_bytes = [count * (n + 4 * -(-n // 256)) if is_8bit and n >= 4096 else 4 * count * n for count, n in leaves]
    assert memory_use.optimizer_bytes(counted) == moments * sum(in_bytes) + 4 * (1 if is_8bit else 2)


def test_published_sizes():
    """LLaMA-65B at rank 64: 799.5 M LoRA parameters and 32.1 GiB frozen, as counted elsewhere by hand."""
    lora = LoraArgs(rank=64)
    step = StepSpec(model=REAL_MODELS["llama-65b"], weights=WeightFormat(), lora=lora, batch=(1, 1, 512))
    counted = counted_step(REAL_MODELS["llama-65b"], WeightFormat(), step, (1, 1, 512), lora)
    assert memory_use.lora_bytes(counted) / 4 / 1e6 == pytest.approx(799.5, abs=0.1)
    assert sum(memory_use.frozen_bytes(counted).values()) / 2**30 == pytest.approx(32.095, abs=0.005)


@pytest.mark.parametrize(
    ("lora", "remat"),
    [(EVERY, "names"), (LoraArgs(rank=8, layers_to_transform="5-6"), "full")],
    ids=["all", "last two"],
)
def test_the_scans_fetch_the_formulas_bytes_of_offloaded_experts(lora, remat):
    """Arrays that are moved to the device, times the trips of the scans around them."""
    model = dataclasses.replace(MIXTURE, experts=dataclasses.replace(SPARSE, layers=tuple(range(2, LAYERS))))
    weights, batch = WeightFormat(platform="gpu", experts_on_host=True, double_quant=False), (1, 1, 64)
    step = StepSpec(model=model, weights=weights, lora=lora, batch=batch, remat=remat)
    function, args, kwargs = step.gradients()
    moved = bytes_moved(function.trace(*args, **kwargs).jaxpr.jaxpr)
    counted = counted_step(model, weights, step, batch, lora)
    assert moved == memory_use.fetched_expert_bytes(counted) > 0
    assert memory_use.fetched_expert_bytes(dataclasses.replace(counted, batch=(3, 1, 64))) == 3 * moved


def bytes_moved(jaxpr) -> int:
    """The bytes of all results of device_put."""
    total = 0
    for one in jaxpr.eqns:
        if one.primitive.name == "device_put":
            total += sum(map(leaf_bytes, (variable.aval for variable in one.outvars)))
        inner = jax.tree.leaves(one.params, is_leaf=lambda each: hasattr(each, "eqns") or hasattr(each, "jaxpr"))
        found = [getattr(each, "jaxpr", each) for each in inner if hasattr(each, "eqns") or hasattr(each, "jaxpr")]
        total += (one.params["length"] if one.primitive.name == "scan" else 1) * sum(map(bytes_moved, found))
    return total
