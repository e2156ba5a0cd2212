"""Requirements of a step: kinds that add up to what the compiler says, estimates near it, and promised bytes."""

import dataclasses
import re
from typing import Any

import jax
import pytest
from flax import nnx

from pallas_kernels import aot
from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import host_paths
from qlora_jax.training.cost import memory_use
from qlora_jax.training.cost.memory_use import activation_bytes, offloaded_activation_bytes
from qlora_jax.training.plan.fit_search import make_plan
from qlora_jax.training.plan.records import ACTIVATIONS, KINDS, PROGRAMS, REFERENCE, STATE
from qlora_jax.training.plan.step_memory import (
    Temporaries,
    compile_here,
    compile_on_card,
    compiled_requirements,
    estimated_requirements,
    fitted_requirements,
    working_set,
)
from qlora_jax.training.step_spec import StepSpec
from tests.marks import EXHAUSTIVE, some_in_ci
from tests.training.compiled_text import TO_READ
from tests.training.plan.steps import GIB, TINY, Compiler, real

needs_compiler = pytest.mark.skipif(aot.problem() is not None, reason=str(aot.problem()))


def test_kinds_add_up_to_the_bytes_of_the_compiled_step():
    step = TINY
    program = step.gradients()
    compiled = program.function.lower(*program.args, **program.kwargs).compile(TO_READ)
    memory = aot.read_memory(compiled.memory_analysis()).device
    need = compiled_requirements(TINY, compile_here)
    assert need.device.keys() == set(KINDS) == need.host.keys() and not any(need.host.values())
    pointers = 8 * (len(step.arrays.parts.lora) * 2 + 3)  # the table of a tuple's members
    program_bytes = memory.arguments + memory.outputs + memory.temporaries - pointers
    few = memory_use.gradient_output_bytes(TINY.sizes) - memory_use.lora_bytes(TINY.sizes)  # losses of rows
    assert need.total - need.device[PROGRAMS] == program_bytes - few + memory_use.optimizer_bytes(TINY.sizes)
    assert need.device[PROGRAMS] > 0 == estimated_requirements(on_gpu(TINY)).device[PROGRAMS]


def test_paged_state_is_counted_where_it_is():
    need, paged = compiled_requirements(TINY, Compiler()), compiled_requirements(TINY.replace(paged=True), Compiler())
    assert paged.host[STATE] == need.device[STATE] == memory_use.optimizer_bytes(TINY.sizes)
    assert paged.device[STATE] <= need.device[STATE]
    big = real("llama-65b", (1, 1, 512))
    assert estimated_requirements(big.replace(paged=True)).total < estimated_requirements(big).total - 5.5e9


def test_the_reference_is_counted_where_it_is():
    """On a CPU it takes the planned memory."""
    adapter = memory_use.lora_bytes(TINY.sizes)
    for of, places in ((TINY, (adapter, 0)), (on_gpu(TINY), (0, adapter))):
        alone, compared = (estimated_requirements(of.replace(compared=compared)) for compared in (False, True))
        assert (compared.total - alone.total, sum(compared.host.values())) == places
        assert (compared.device[REFERENCE], compared.host[REFERENCE]) == places


def on_gpu(setting: StepSpec, **changes) -> StepSpec:
    return dataclasses.replace(setting, weights=WeightFormat(dtype="float32", platform="gpu"), **changes)


def test_offloaded_activations_are_counted_where_they_are():
    full, away = (estimated_requirements(on_gpu(TINY, remat=remat)) for remat in ("full", "offload"))
    assert away.host[ACTIVATIONS] == full.device[ACTIVATIONS] > away.device[ACTIVATIONS] == 0
    assert full.host[ACTIVATIONS] == 0
    assert full.total - away.total == full.device[ACTIVATIONS]


def test_offloaded_experts_are_counted_where_they_are():
    here = real("qwen3-30b-a3b", (1, 1, 8192))  # so long that a layer takes more than a tile of logits
    away = here.replace(weights=dataclasses.replace(here.weights, experts_on_host=True))
    base = dict(nnx.to_flat_state(away.arrays.parts.base))
    leaves = jax.tree.leaves([base[path] for path in host_paths(away.arrays.parts)])
    in_host = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    full, offloaded = estimated_requirements(here), estimated_requirements(away)
    kinds = ("weights", "constants")
    assert sum(offloaded.host[kind] for kind in kinds) == in_host > 13 * GIB
    assert all(full.device[kind] - offloaded.device[kind] == offloaded.host[kind] > 0 for kind in kinds)
    assert offloaded.device["scratch"] - full.device["scratch"] == 2 * (in_host // here.model.num_layers)
    cpu = away.replace(weights=dataclasses.replace(away.weights, platform="cpu"))
    assert not sum(estimated_requirements(cpu).host.values())


def test_activations_that_stay_on_the_device_are_told():
    """JAX silently drops the memory kind on some backends."""
    stays = on_gpu(TINY, remat="offload")
    with pytest.raises(RuntimeError, match=r"does not offload all activations to host memory \(found 0 B, expected"):
        compiled_requirements(stays, lambda step: Temporaries(gradients=10**9, update=0))
    host = sum(offloaded_activation_bytes(stays.sizes).values())
    assert compiled_requirements(stays, lambda step: Temporaries(10**9, 0, host)).host[ACTIVATIONS] == host


def test_experts_that_stay_on_the_device_are_told():
    away = real("qwen3-30b-a3b", (1, 1, 512))
    away = away.replace(weights=dataclasses.replace(away.weights, experts_on_host=True))
    host = sum(memory_use.offloaded_expert_bytes(away.sizes).values())
    with pytest.raises(RuntimeError, match=r"model.experts=offload: .* not offload all experts .*found 0 B.*=device"):
        compiled_requirements(away, lambda step: Temporaries(gradients=10**9, update=0))
    found = compiled_requirements(away, lambda step: Temporaries(10**9, 0, host_arguments=host))
    assert found.host["weights"] + found.host["constants"] == host


def test_a_cpu_is_not_told_to_offload():
    with pytest.raises(ValueError, match="a CPU's arrays are in host memory already"):
        compiled_requirements(dataclasses.replace(TINY, remat="offload"), lambda step: pytest.fail("it is compiled"))
    plan = make_plan(TINY, 1000, Compiler())
    assert plan.change is None


def test_a_fit_is_exact_on_a_line():
    known = [compiled_requirements(TINY.resized(4, length), Compiler()) for length in (256, 512)]
    between = TINY.resized(4, 448)
    assert fitted_requirements(between, known).total == compiled_requirements(between, Compiler()).total


def test_the_estimate_is_near_what_the_compiler_of_a_cpu_says():
    setting = dataclasses.replace(
        real("smollm2-135m", (1, 1, 512), rank=16), weights=WeightFormat(dtype="bfloat16"), remat="names"
    )
    compiled = compiled_requirements(setting, compile_here)
    assert estimated_requirements(setting).total == pytest.approx(compiled.total, rel=0.15)


def on_cpu(experts: int, per_token: int, inner: int, remat: str = "names", **lora: Any) -> StepSpec:
    """A mixture of four layers in bfloat16."""
    counts = dict(num_local_experts=experts, num_experts_per_tok=per_token, intermediate_size=inner)
    return StepSpec(
        model=model_config(SMALL_MIXTURE | counts),
        weights=WeightFormat(),
        lora=LoraArgs(rank=8, **lora),
        optim=OptimArgs(),
        batch=(1, 2, 512),
        remat=remat,
    )


SMALL_MIXTURE: dict[str, Any] = dict(
    model_type="mixtral",
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
)
MIXTURES = {
    "few large experts": on_cpu(8, 2, 512),
    "many small experts": on_cpu(32, 8, 128),
    "full": on_cpu(8, 2, 512, "full"),
    "adapters on experts": on_cpu(8, 2, 512, target_parameters=["gate_up_proj", "down_proj"]),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=EXHAUSTIVE) for case in MIXTURES])
def test_the_estimated_scratch_of_a_mixture_is_near_the_compiled(case):
    """The formula was 3 to 4 times too large when it added what is not live together."""
    compiled = compiled_requirements(MIXTURES[case], compile_here)
    estimated = estimated_requirements(MIXTURES[case])
    assert 1 < estimated.device["scratch"] / compiled.device["scratch"] < 1.7
    assert estimated.total == pytest.approx(compiled.total, rel=0.08)


# Compiled for cards


@needs_compiler
@pytest.mark.parametrize(
    ("name", "card", "batch", "remat"),
    some_in_ci(
        [
            ("smollm2-135m", "rtx4090", (1, 4, 512), "names"),
            ("qwen2-0.5b", "rtx4090", (1, 1, 1024), "names"),
            ("llama-3-8b", "a100", (1, 1, 2048), "full"),
            ("llama-7b", "a6000", (1, 1, 512), "full"),
            ("llama-65b", "h100", (1, 1, 512), "full"),
        ],
        lambda i: i == 0,
    ),
)
def test_the_estimate_is_near_what_is_compiled_for_a_card(name, card, batch, remat):
    compiled = compiled_requirements(real(name, batch, remat=remat), compile_on_card(card))
    assert estimated_requirements(compiled.config).total == pytest.approx(compiled.total, rel=0.15)
    assert 0.3 < compiled.device["scratch"] / working_set(compiled.config.sizes) < 3


@needs_compiler
@pytest.mark.slow
@pytest.mark.exhaustive
def test_accumulation_has_no_second_set_of_gradients():
    once, often = (compiled_requirements(real("llama-7b", (a, 1, 512)), compile_on_card("a6000")) for a in (1, 4))
    assert often.total - once.total < 0.05 * once.device["gradients"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.exhaustive
def test_offloaded_activations_are_host_memory_in_the_compiled_step():
    setting = real("smollm2-135m", (1, 2, 512), rank=16)
    on, away = (setting.replace(remat=remat) for remat in ("full", "offload"))
    kept = sum(activation_bytes(on.sizes).values())
    programs = [aot.compile_for("a6000", p.function, *p.args, **p.kwargs) for p in (s.gradients() for s in (on, away))]
    memory = [program.memory for program in programs]
    assert memory[0].host.temporaries == 0 and "S(5)" not in programs[0].text
    assert memory[1].host.temporaries >= kept
    stack = f"bf16[{setting.model.num_layers},{setting.rows},{setting.model.embed_dim}]"
    assert re.search(re.escape(stack) + r"\{[\d,]*:S\(5\)\}", programs[1].text)
    assert not re.search(re.escape(stack) + r"\{[\d,]*\}", programs[1].text)  # no such stack on the device
    assert memory[0].device.temporaries - memory[1].device.temporaries > 0.7 * kept


@needs_compiler
@pytest.mark.parametrize(
    ("name", "card", "batch", "rank", "remat", "whole", "paged"),
    some_in_ci(
        [
            ("llama-65b", "a6000", (1, 1, 512), 64, "full", 45.51, 39.68),
            ("llama-65b", "a6000", (1, 1, 512), 64, "offload", 45.18, 39.34),
            ("llama-33b", "rtx4090", (1, 1, 512), 64, "full", 24.43, 20.92),
            ("llama-13b", "rtx4090", (1, 1, 512), 64, "full", 10.96, 9.22),
            ("llama-7b", "rtx4090", (1, 1, 512), 64, "full", 6.33, 5.26),
            ("llama-3-8b", "rtx4090", (1, 2, 2048), 16, "full", 7.94, 7.75),
            ("llama-3-8b", "rtx4090", (1, 2, 2048), 16, "offload", 6.98, 6.79),
        ],
        lambda i: i == 6,
    ),
)
def test_the_step_takes_no_more_than_it_did(name, card, batch, rank, remat, whole, paged):
    setting = real(name, batch, rank=rank, remat=remat)
    need = compiled_requirements(setting, compile_on_card(card))
    assert need.total / GIB <= 1.01 * whole
    assert fitted_requirements(setting.replace(paged=True), [need]).total / GIB <= 1.01 * paged


@needs_compiler
@pytest.mark.slow
@pytest.mark.exhaustive
def test_65b_with_adapters_in_bf16_takes_no_more_than_it_did():
    """Half of the adapters and of their gradients; 37.3 GiB with the state paged is what was promised."""
    setting = real("llama-65b", (1, 1, 512), lora=LoraArgs(rank=64, dtype="bfloat16"))
    need = compiled_requirements(setting, compile_on_card("a6000"))
    assert need.total / GIB <= 1.01 * 42.17
    assert fitted_requirements(setting.replace(paged=True), [need]).total / GIB <= 1.01 * 36.34


@needs_compiler
@pytest.mark.slow
def test_the_update_of_65b_in_8_bits_takes_no_more_scratch_than_it_did():
    """Whole leaves' moments in f32, two times 3.0 GiB, would take more than the 8 bits save."""
    setting = real("llama-65b", (1, 1, 512), optim=OptimArgs(name="adamw_8bit"))
    update = setting.update()
    scratch = aot.compile_for("a6000", update.function, *update.args, **update.kwargs).memory.device.temporaries
    assert scratch <= 1.01 * 462_285_128
