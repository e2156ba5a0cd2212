"""The formulas for a step's bytes equal those of its arrays, its compiled update, and what its scans fetch."""

import dataclasses

import jax
import pytest
from flax import nnx

from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.models.config import STORED, WeightFormat
from qlora_jax.models.offloaded_experts import host_paths
from qlora_jax.training.abstract_step import AbstractStep, abstract_step
from qlora_jax.training.cost import memory_use
from qlora_jax.training.cost.step_shape import StepShape
from tests.training.compiled_text import TO_READ
from tests.training.cost.step_cases import (
    EVERY,
    LAYERS,
    LIKE_PHI,
    MIXTURE,
    MODEL,
    NEW_IDS,
    ON_EXPERTS,
    SPARSE,
    counted_step,
    leaf_bytes,
)
from tests.training.real_models import REAL_MODELS


def all_bytes(tree) -> int:
    return sum(map(leaf_bytes, jax.tree.leaves(tree)))


def check_bytes(counted: StepShape, step: AbstractStep) -> None:
    """The formulas' bytes are those of the step's arrays."""
    assert sum(memory_use.frozen_bytes(counted).values()) == all_bytes(step.parts.base)
    assert memory_use.lora_bytes(counted) == all_bytes(step.parts.lora)
    assert memory_use.optimizer_bytes(counted) == all_bytes(step.state)
    assert memory_use.batch_bytes(counted) == all_bytes(step.batch)


def test_the_update_reads_and_overwrites_the_formulas_bytes():
    step = abstract_step(MODEL, WeightFormat(), EVERY, batch=(1, 1, 128))
    function, args, kwargs = step.update()
    memory = function.lower(*args, **kwargs).compile(TO_READ).memory_analysis()
    counted = counted_step(MODEL, WeightFormat(), step, (1, 1, 128), EVERY)
    lora, state = memory_use.lora_bytes(counted), memory_use.optimizer_bytes(counted)
    assert memory.argument_size_in_bytes == 2 * lora + state
    assert memory.alias_size_in_bytes == lora + state


@pytest.mark.parametrize("name", REAL_MODELS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"double_quant": False}, {"block_size": 32, "nested_block_size": 128}, {"quant_type": None}],
    ids=["nf4", "f32 constants", "small blocks", "dense"],
)
def test_bytes_of_real_models_are_those_of_their_leaves(name, settings):
    model, weights, batch, lora = (
        REAL_MODELS[name],
        WeightFormat(platform="gpu", **settings),
        (2, 3, 64),
        LoraArgs(rank=64),
    )
    step = abstract_step(model, weights, lora, batch=batch)
    check_bytes(counted_step(model, weights, step, batch, lora), step)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("settings", [{}, {"quant_type": None}, {"double_quant": False, "platform": "gpu"}])
def test_bytes_of_mixtures_are_those_of_their_leaves(settings, shared):
    experts = dataclasses.replace(SPARSE, layers=(2, 3, 4, 5, 6), router_bias=True, selection_bias=True, bias=True)
    model, weights = dataclasses.replace(MIXTURE, experts=experts), WeightFormat(**settings)
    lora, optim = dataclasses.replace(ON_EXPERTS, share_experts=shared), OptimArgs(name="adamw_8bit")
    step = abstract_step(model, weights, lora, batch=(1, 1, 64), optim=optim)
    check_bytes(counted_step(model, weights, step, (1, 1, 64), lora, optimizer=optim.name), step)


def test_bytes_of_offloaded_blocks_are_those_of_their_leaves():
    """Layers of a projection are as large as its largest one."""
    experts = dataclasses.replace(SPARSE, layers=(2, 3, 4, 5, 6))
    model = dataclasses.replace(MIXTURE, experts=experts)
    stored = {name: ("Q8_0",) * len(model.layers_with(name)) for name in model.linear_shapes()}
    stored |= dict.fromkeys(model.expert_shapes(), ("Q4_0", "Q5_0", "Q4_0", "Q4_0", "Q5_0"))
    weights = WeightFormat(platform="gpu", quant_type=STORED, stored=tuple(stored.items()), experts_on_host=True)
    step = abstract_step(model, weights, LoraArgs(rank=8), batch=(1, 1, 64))
    counted = counted_step(model, weights, step, (1, 1, 64), LoraArgs(rank=8))
    check_bytes(counted, step)
    base = dict(nnx.to_flat_state(step.parts.base))
    on_host = jax.tree.leaves([base[path] for path in host_paths(step.parts)])
    assert sum(map(leaf_bytes, on_host)) == sum(memory_use.offloaded_expert_bytes(counted).values())


@pytest.mark.parametrize("model", [MODEL, LIKE_PHI, dataclasses.replace(MODEL, embed_dim=4096, tie_embeddings=True)])
def test_bytes_of_new_tokens_are_those_of_their_leaves(model):
    """In 8 bits, where a row is as long as that; a head's biases are frozen."""
    weights, optim = WeightFormat(), OptimArgs(name="adamw_8bit")
    step = abstract_step(model, weights, EVERY, batch=(1, 1, 64), optim=optim, new_ids=NEW_IDS)
    settings = {"optimizer": optim.name, "new_tokens": len(NEW_IDS)}
    check_bytes(counted_step(model, weights, step, (1, 1, 64), EVERY, **settings), step)


@pytest.mark.parametrize("name", memory_use.OPTIMIZER_STATES)
def test_bytes_of_every_optimizer_are_those_of_its_leaves(name):
    lora, optim = LoraArgs(rank=8, rank_pattern={"down_proj": 16}), OptimArgs(name=name)  # some of 4,096 and more
    step = abstract_step(MODEL, WeightFormat(), lora, batch=(1, 1, 64), optim=optim)
    check_bytes(counted_step(MODEL, WeightFormat(), step, (1, 1, 64), lora, optimizer=name), step)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(step.state) if leaf.ndim} == (
        {"uint8", "float32"} if name.endswith("_8bit") else {"float32"}
    )


def test_published_sizes():
    """LLaMA-65B at rank 64: 799.5 M LoRA parameters and 32.1 GiB frozen, as counted elsewhere by hand."""
    lora = LoraArgs(rank=64)
    step = abstract_step(REAL_MODELS["llama-65b"], WeightFormat(), lora, batch=(1, 1, 512))
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
    step = abstract_step(model, weights, lora, batch=batch, remat=remat)
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
