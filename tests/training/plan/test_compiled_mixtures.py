"""Compiled steps of mixtures: no array of all dequantized experts, and the planned bytes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot
from pallas_kernels.formats.dequantize import dequantize
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.config import LoraArgs, ModelArgs
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.nn import frozen_weight
from qlora_jax.training.cost import memory_use
from qlora_jax.training.cost.step_shape import StepShape
from qlora_jax.training.plan.step_memory import Temporaries, compiled_requirements, estimated_requirements
from qlora_jax.training.plan.target import planned_weights
from qlora_jax.training.step_spec import StepSpec
from tests.marks import EXHAUSTIVE
from tests.models.mixtures import NARROW
from tests.training.compiled_text import TO_READ, computed, shape_of
from tests.training.plan.steps import GIB, real

needs_compiler = pytest.mark.skipif(aot.problem() is not None, reason=str(aot.problem()))
# No size of rows, such as the number of tokens, is one of weights.
SMALL: dict[str, Any] = NARROW | dict(model_type="qwen3_moe", num_experts=16, num_hidden_layers=2, head_dim=16)
BATCH = (1, 1, 40)


def of_all_experts(text: str, step: StepShape) -> list[str]:
    """Returns the computed arrays of floats that are as large as a layer's dequantized experts, and not of rows."""
    assert step.experts is not None
    least = step.experts.count * min(map(math.prod, step.model.expert_shapes().values()))
    rows = {step.rows, step.pairs, step.slots, step.batch[2], step.model.vocab_size}
    return [
        kind
        for kind in computed(text)
        if kind.startswith(("bf16[", "f16[", "f32["))
        and math.prod(shape_of(kind)) >= least
        and not rows & {*shape_of(kind)}
    ]


def compiled_here() -> tuple[str, StepShape]:
    """Returns the text of SMALL's compiled gradients on a CPU, and the step."""
    model, weights, lora = model_config(SMALL), WeightFormat(dtype="float32"), LoraArgs(rank=4)
    program = StepSpec(model=model, weights=weights, lora=lora, batch=BATCH, remat="names").gradients()
    text = program.function.lower(*program.args, **program.kwargs).compile(TO_READ).as_text()
    assert text is not None
    return text, StepShape(model=model, weights=weights, lora=lora, batch=BATCH, remat="names")


def dequantize_all(x_PK, weight, groups, row):
    """Computes the grouped product from the dequantized weights of all experts of a layer."""
    dense_ENK = jax.vmap(lambda expert: dequantize(expert, x_PK.dtype))(weight.layer(row))
    x_ICK = x_PK.reshape(-1, groups.tile, x_PK.shape[1])
    y_ICN = jnp.einsum("ick,ink->icn", x_ICK, dense_ENK[groups.expert_of_tile_I])
    return y_ICN.reshape(len(x_PK), -1)


@pytest.mark.slow
def test_no_array_of_all_experts_is_dequantized(monkeypatch):
    assert not of_all_experts(*compiled_here())
    monkeypatch.setitem(frozen_weight.OPS, QTensor, frozen_weight.OPS[QTensor]._replace(grouped=dequantize_all))
    jax.clear_caches()
    assert of_all_experts(*compiled_here())


def compiled_for(card: str, name: str, where: str) -> tuple[aot.CompiledFor, Any]:
    """Returns the gradients of one micro-batch of 1,024 tokens, compiled for a card, and their requirements."""
    config = real(name, (1, 1, 1024), rank=16, remat="names")
    settings = ModelArgs(path=name, **SETTINGS[where])
    config = config.replace(weights=planned_weights(settings, config.model, "gpu"))
    program, options = config.gradients(), config.compiler_options
    compiled = aot.compile_for(card, program.function, *program.args, **program.kwargs, compiler_options=options)
    device, host = compiled.memory.device, compiled.memory.host
    temporaries = Temporaries(device.temporaries, 0, host.temporaries, host.arguments)
    return compiled, compiled_requirements(config, lambda step: temporaries)


SETTINGS: dict[str, Any] = {"device": {}, "offload": {"experts": "offload"}, "stored": {"quant_type": "stored"}}
# GiB on the card and in host memory; the compiled step may exceed the first by at most 1 %.
PROMISED = {
    ("rtx4090", "qwen3-30b-a3b", "device"): (18.56, 0),
    ("rtx4090", "qwen3-30b-a3b", "offload"): (5.17, 13.93),
    ("h100", "qwen3-30b-a3b", "offload"): (5.17, 13.93),
    ("rtx4090", "gpt-oss-20b", "device"): (14.31, 0),
    ("rtx4090", "gpt-oss-20b", "stored"): (15.84, 0),
}


@needs_compiler
@pytest.mark.parametrize("case", [pytest.param(case, marks=EXHAUSTIVE) for case in PROMISED], ids="-".join)
def test_a_card_takes_the_planned_bytes_and_dequantizes_no_layer(case):
    compiled, need = compiled_for(*case)
    on_card, in_host = PROMISED[case]
    assert not of_all_experts(compiled.text, need.config.sizes)
    assert need.total / GIB <= 1.01 * on_card
    assert estimated_requirements(need.config).total == pytest.approx(need.total, rel=0.03)
    offloaded = sum(memory_use.offloaded_expert_bytes(need.config.sizes).values())
    assert compiled.memory.host.arguments == offloaded == pytest.approx(in_host * GIB, rel=0.001)
