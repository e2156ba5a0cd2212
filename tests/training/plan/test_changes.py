"""Changes that a plan suggests: their order, and what they cost."""

import dataclasses

import pytest

from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.models.config import DENSE, STORED
from qlora_jax.objectives.dpo import DPO
from qlora_jax.training.plan.fit_search import MAX_COMPILES, can_offload_experts, changes, make_plan
from qlora_jax.training.plan.step_memory import (
    compiled_requirements,
    estimated_requirements,
    fitted_requirements,
)
from qlora_jax.training.plan.text import as_json, verdict
from tests.training.plan.steps import GIB, TINY, Compiler, real, total

MIXTURE = real("qwen3-30b-a3b", (16, 1, 1024), rank=16)


def with_weights(**settings):
    """MIXTURE with other weights."""
    return MIXTURE.replace(weights=dataclasses.replace(MIXTURE.weights, **settings))


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"optim": OptimArgs(name="adamw_8bit")}, {"optim.name": "adamw_8bit"}),
        ({"lora": LoraArgs(rank=128, dtype="bfloat16")}, {"lora.dtype": "bfloat16"}),
    ],
    ids=["state in 8 bits", "adapters in bf16"],
)
def test_coarser_numbers_come_before_shorter_rows(change, options):
    """Paging frees nothing if the state is smaller than the pages in flight."""
    asked = dataclasses.replace(TINY, lora=LoraArgs(rank=128), batch=(8, 1, 512), remat="full")
    if "lora" in change:  # state in 8 bits would free more, where it is not
        asked = asked.replace(optim=OptimArgs(name="adamw_8bit"))
    replace = asked.replace(**change)
    assert total(replace) < total(asked)
    compiler = Compiler()
    plan = make_plan(asked, total(replace), compiler)
    assert plan.change.options == options and plan.change.requirements.source == "compiled"
    assert len(compiler.asked) <= MAX_COMPILES and total(replace) == plan.change.requirements.total


def test_shorter_rows_are_a_limit_of_each_of_their_texts():
    optim, lora = OptimArgs(name="adamw_8bit"), LoraArgs(rank=4, dtype="bfloat16")
    asked = TINY.replace(objective=DPO(), branching=True, paged=True, remat="full", batch=(8, 1, 512))
    asked = asked.replace(optim=optim, lora=lora)
    plan = make_plan(asked, total(asked.resized(1, 256)), Compiler())
    assert plan.change.options == {"data.max_length": 128} and plan.change.requirements.config.batch[2] == 256


def test_a_mixture_that_does_not_fit_may_keep_its_experts_in_host_memory():
    compiler = Compiler(MIXTURE)
    plan = make_plan(MIXTURE, 12 * GIB, compiler)
    need = plan.change.requirements
    assert (
        plan.change.options == {"model.experts": "offload"} and need.source == "compiled" and len(compiler.asked) == 1
    )
    stored = need.host["weights"] + need.host["constants"]
    assert need.total <= 12 * GIB < estimated_requirements(MIXTURE).total and stored > 13 * GIB
    one_layer = stored // 48  # each scan fetches one more
    assert need.fetched == 2 * 16 * (stored + one_layer) and as_json(plan)["change"]["need"]["fetched"] == need.fetched
    (line,) = [line for line in verdict(plan) if "nearest change" in line]
    assert "--model.experts offload (" in line and "13.93 GiB in host memory, 455.00 GiB fetched per optimizer" in line


def test_shorter_rows_are_interpolated_from_the_step_with_experts_in_the_same_place():
    asked = MIXTURE.replace(paged=True, remat="offload")

    def compile_step(step):
        found = Compiler(asked)(step)
        return found._replace(gradients=found.gradients + GIB)  # as much scratch as the estimate

    limit = compiled_requirements(asked, compile_step).total - 1
    plan = make_plan(asked, limit, compile_step)
    assert plan.change.options == {"model.experts": "offload"} and plan.requested.source == "compiled"
    assert [need.total for need in plan.shorter] == [
        fitted_requirements(need.config, [plan.requested]).total for need in plan.shorter
    ]


def test_experts_in_host_memory_come_after_changes_without_traffic_and_before_coarser_numbers():
    found = [change.options for change in changes(MIXTURE.resized(4, 1024), 12 * GIB, estimated_requirements)]
    offload = found.index({"model.experts": "offload"})
    assert found.index({"optim.paging": "auto"}) < offload < found.index({"optim.name": "adamw_8bit"})
    assert found[-1] == {"train.remat": "offload", "model.experts": "offload"}


def test_a_policy_that_would_keep_fetched_experts_changes_too():
    found = [change.options for change in changes(MIXTURE.replace(remat="none"), 0, estimated_requirements)]
    assert {"model.experts": "offload", "train.remat": "names"} in found


def test_only_experts_of_one_format_on_one_card_are_offloaded():
    names = [*MIXTURE.model.linear_shapes(), *MIXTURE.model.expert_shapes()]
    mixed = tuple((name, ("MXFP4",) * 47 + (DENSE,)) for name in names)
    assert can_offload_experts(MIXTURE)
    assert not can_offload_experts(real("llama-3-8b", (1, 1, 512)))
    assert not can_offload_experts(with_weights(experts_on_host=True))
    assert not can_offload_experts(with_weights(platform="cpu"))
    assert not can_offload_experts(with_weights(quant_type=STORED, stored=mixed))


def test_a_plan_with_offloaded_experts_says_what_crosses():
    away = with_weights(experts_on_host=True)
    plan = make_plan(away, 24 * GIB, None)
    (line,) = [line for line in verdict(plan) if "routed experts" in line]
    assert line.endswith("13.93 GiB in host memory, 455.00 GiB fetched per optimizer step")
    assert as_json(plan)["asked"]["fetched"] == plan.requested.fetched
    assert not [line for line in verdict(make_plan(MIXTURE, 24 * GIB, None)) if "routed experts" in line]
