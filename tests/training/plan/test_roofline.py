"""The roofs of a step on a card: FLOP and bytes against formulas and compiled programs; the output of `plan`."""

import dataclasses
import json
import math

import jax
import pytest

from pallas_kernels.aot.hlo import Instruction, arrays, parse
from pallas_kernels.gpu_specs import CARDS
from pallas_kernels.kernel_report import device_of_card
from pallas_kernels.nf4_matmul.costs import weight_bytes
from qlora_jax.api.plan import make_plan
from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.models.config import WeightFormat
from qlora_jax.sharding import absent_mesh
from qlora_jax.training.cost import memory_use
from qlora_jax.training.cost.flops import flops
from qlora_jax.training.plan import roofline, run_plan, text
from qlora_jax.training.plan.roofline import ADAPTERS, ATTENTION, FROZEN, HEAD_AND_LOSS, OPTIMIZER, PARTS, step_roofs
from qlora_jax.training.step_spec import StepSpec
from tests.io.tiny_models import tiny_config
from tests.marks import EXHAUSTIVE
from tests.training.compiled_text import PASSES_ON, TO_READ
from tests.training.cost.step_cases import CASES, FAMILIES, LAYERS, MIXTURE, MODEL, ON_EXPERTS
from tests.training.plan.steps import real

H100, RTX5090 = CARDS["h100"], CARDS["rtx5090"]
GPU = WeightFormat(platform="gpu")


def toy(**changes) -> StepSpec:
    base = {"model": MODEL, "weights": GPU, "lora": LoraArgs(rank=8), "batch": (2, 3, 512), "remat": "full"}
    return StepSpec(**base | changes)


# FLOP


ALWAYS, IN_CI = ("names", "full", "names, dora"), ("names, oft", "full, houlsby", "names, experts", "names, whole")
OTHERS = [
    pytest.param(name, marks=pytest.mark.slow if name in IN_CI else EXHAUSTIVE)
    for name in CASES | FAMILIES
    if name not in ALWAYS
]


@pytest.mark.parametrize("case", [*ALWAYS, *OTHERS])
def test_parts_have_all_flop_of_the_formulas(case):
    """The formulas equal compiled steps (tests/training/cost/test_flops.py)."""
    sizes = setting_of(case).sizes
    found, every = roofline.part_flops(sizes), flops(sizes)
    assert found.total() == sum(every.values()) and set(found) <= set(PARTS)
    assert found[ATTENTION] == sum(flop for name, flop in every.items() if name.startswith("attention"))
    assert found[HEAD_AND_LOSS] >= every["head forward"] + every["head backward"] > 0


def setting_of(case) -> StepSpec:
    model, remat, batch, lora, *ids = (CASES | FAMILIES)[case]
    weights = WeightFormat(platform="gpu", quant_type=None if lora.method == "full" else "nf4")
    return toy(model=model, weights=weights, remat=remat, batch=batch, lora=lora, new_ids=tuple(*ids))


# Bytes


def products_per_weight(step) -> int:
    """Forward, backward and again, for each projection but the last, whose result is not needed again."""
    again = step.remat == "full"
    return {name: step.model.num_layers * (2 + again * (name != "mlp.down_proj")) for name, _ in step.shapes()}


@pytest.mark.parametrize("remat", ["names", "full"])
@pytest.mark.parametrize(("card", "rows", "fused"), [("h100", 4, True), ("rtx5090", 4, False), ("rtx5090", 1, True)])
def test_each_product_reads_its_codes_and_constants(remat, card, rows, fused):
    """An RTX 5090 dequantizes first for more than 2048 rows."""
    sizes = real("llama-3-8b", (1, rows, 1024), remat=remat).sizes
    expected = 0
    for name, (n, k) in sizes.shapes():
        stored = weight_bytes((n, k), "split_k")
        through = 2 * n * (k // 64) if fused else 2 * n * k
        expected += products_per_weight(sizes)[name] * (stored.codes + stored.constants + 2 * through)
    assert roofline.frozen_weight_bytes(sizes, device_of_card(card)[0]) == expected


def test_a_card_without_fused_kernels_dequantizes_every_weight():
    sizes = real("llama-3-8b", (3, 1, 1024)).sizes
    stored = sum(
        count * sum(dataclasses.astuple(weight_bytes(dict(sizes.shapes())[name], "split_k")))
        for name, count in products_per_weight(sizes).items()
    )
    found = roofline.frozen_weight_bytes(sizes, device_of_card("t4")[0])
    assert 3 * found == 3 * stored + memory_use.dequantized_traffic(sizes)


def test_every_expert_is_read_in_every_product():
    sizes = toy(model=MIXTURE, lora=ON_EXPERTS, remat="names").sizes
    expected = 0
    for name, (n, k) in sizes.matrices():
        experts = sizes.experts.count if name.startswith("mlp.experts.") else 1
        stored = sum(dataclasses.astuple(weight_bytes((n, k), "split_k")))
        expected += 2 * LAYERS * experts * (stored + 2 * 2 * n * 2 * math.ceil(k / 128))
    assert roofline.frozen_weight_bytes(sizes, device_of_card("a100")[0]) == expected


def test_the_head_reads_its_table_once():
    model = real("llama-3-8b", (1, 1, 512)).model
    assert roofline.head_weight_bytes(toy().sizes) == 2 * MODEL.vocab_size * MODEL.embed_dim
    tied = dataclasses.replace(model, tie_embeddings=True)
    assert roofline.head_weight_bytes(real("llama-3-8b", (1, 1, 512), model=tied).sizes) == 2 * 128256 * 4096


@pytest.mark.parametrize("optimizer", ["adamw_32bit", pytest.param("adamw_8bit", marks=pytest.mark.slow)])
def test_the_optimizer_reads_and_writes_what_the_compiled_update_does(optimizer):
    setting = toy(weights=WeightFormat(), optim=OptimArgs(name=optimizer))
    program = setting.update()
    memory = program.function.lower(*program.args, **program.kwargs).compile(TO_READ).memory_analysis()
    found = roofline.part_bytes(setting, H100)[OPTIMIZER]
    results = len(jax.tree.leaves((program.args[1], program.args[2])))
    compiled = memory.argument_size_in_bytes + memory.output_size_in_bytes - 8 * results  # XLA's table of results
    assert compiled == pytest.approx(found, abs=256)  # and the norm of the gradients


def bytes_of_kernels(text: str) -> int:
    """Returns the bytes that the instructions of a compiled program read and write; of stacks over layers, one layer.

    A fusion is one instruction; loops and branches run their instructions.
    """
    computations, entry = parse(text)

    def of_type(kind: str) -> int:
        return sum(one.nbytes // (LAYERS if one.shape[:1] == (LAYERS,) else 1) for one in arrays(kind))

    def moved(one: Instruction, names: dict[str, Instruction]) -> int:
        operands = (operand.split("%")[-1] for operand in one.operands)
        return of_type(one.type) + sum(of_type(names[name].type) for name in operands if name in names)

    def of(name: str, times: int) -> int:
        total = 0
        for one in computations[name].values():
            if one.op in ("while", "conditional", "call"):
                trips = (one.trips or 1) if one.op == "while" else 1
                total += sum(of(called, times * trips) for called in one.called if called in computations)
            elif one.op not in PASSES_ON:
                total += times * moved(one, computations[name])
        return total

    return of(entry, 1)


@pytest.mark.parametrize(
    "remat", [pytest.param("names", marks=pytest.mark.slow), pytest.param("full", marks=EXHAUSTIVE)]
)
def test_a_compiled_step_moves_at_least_as_many_bytes(remat):
    """The program is that of a CPU, which XLA fuses less: it moves more, but not by orders of magnitude."""
    setting = toy(weights=WeightFormat(), batch=(1, 3, 512), remat=remat)
    function, args, kwargs = setting.gradients()
    compiled = bytes_of_kernels(function.lower(*args, **kwargs).compile().as_text())
    least = roofline.activation_traffic(setting).total()
    assert least <= compiled <= 8 * least


# The roofs


def test_a_part_takes_the_longer_of_its_times_at_the_roofs():
    setting = real("llama-3-8b", (1, 1, 2048), rank=16, remat="names")
    found = step_roofs(setting, RTX5090)
    assert set(found.parts) == set(PARTS) and found.tokens == 2048 and found.peak == 209.5e12
    for part in found.parts.values():
        times = {"tensor cores": part.flops / 209.5e12, "bandwidth": part.moved / 1792e9}
        assert part.roofline.seconds == max(times.values()) == times[part.bound]
    assert found.seconds == sum(part.roofline.seconds for part in found.parts.values())
    assert found.tokens_per_second == 2048 / found.seconds
    # 2 x 2 x 7.0e9 weights x 2048 tokens of products at 209.5 TFLOP/s.
    assert found.parts[FROZEN].bound == "tensor cores"
    assert found.parts[FROZEN].roofline.seconds == pytest.approx(4 * 6.98e9 * 2048 / 209.5e12, rel=0.01)
    assert found.parts[ADAPTERS].bound == found.parts[OPTIMIZER].bound == "bandwidth"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "peak", "unit"), [("bfloat16", 8.1e12, "f32 units"), ("float16", 65e12, "tensor cores")]
)
def test_a_t4_multiplies_bfloat16_in_f32_and_float16_on_tensor_cores(dtype, peak, unit):
    found = step_roofs(
        real("llama-3.2-1b", (1, 1, 512), weights=WeightFormat(platform="gpu", dtype=dtype)), CARDS["t4"]
    )
    assert found.peak == peak and found.parts[HEAD_AND_LOSS].bound == unit


@pytest.mark.slow
def test_plan_says_why_there_are_no_roofs_of_float32(monkeypatch):
    monkeypatch.setattr(run_plan, "compiler_for", lambda target: (None, "left out"))
    plan = make_plan("llama-3.2-1b", card="h100", config={"data.max_length": 64, "model.compute_dtype": "float32"})
    assert plan.roofs is None and "roofs" not in str(plan)
    assert "no tokens per second: the peak of float32 products depends on the use of TF32" in plan.notes


@pytest.mark.slow
def test_devices_of_a_mesh_share_the_rows_and_the_optimizers_state():
    alone = step_roofs(toy(batch=(2, 1, 512)), H100)
    shared = step_roofs(toy(batch=(2, 3, 512), mesh=absent_mesh(1, 3)), H100)
    assert shared.tokens == 3 * alone.tokens
    assert shared.parts[FROZEN] == alone.parts[FROZEN] and shared.parts[ATTENTION] == alone.parts[ATTENTION]
    assert shared.parts[OPTIMIZER].moved < alone.parts[OPTIMIZER].moved


@pytest.mark.parametrize("case", OTHERS)
def test_every_method_and_family_has_roofs(case):
    setting = setting_of(case)
    found = step_roofs(setting, H100)
    assert set(found.parts) >= {ATTENTION, HEAD_AND_LOSS, OPTIMIZER}
    adapted = {name for name, scope in roofline.scopes_of(setting.sizes).items() if scope == ADAPTERS}
    has_products = any(name.split()[0] in adapted and flop for name, flop in flops(setting.sizes).items())
    assert (ADAPTERS in found.parts) >= has_products
    assert (FROZEN in found.parts) == (setting.lora.method != "full")


# The command


def test_plan_prints_the_parts_and_says_that_no_card_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(run_plan, "compiler_for", lambda target: (None, "left out"))
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    plan = make_plan(str(tmp_path), card="rtx5090", config={"data.max_length": 64})
    printed = " ".join(str(plan).split())
    assert "at the roofs of NVIDIA GeForce RTX 5090 (209.5 TFLOP/s in bfloat16, 1,792 GB/s)" in printed
    assert all(f"{name} │" in printed for name in PARTS)  # all bound by bandwidth in so small a step
    assert f"at most {plan.roofs.tokens_per_second:,.0f} tokens per second" in printed
    assert "no step was measured on this card, so its share of that speed is not known" in printed
    found = plan.to_dict()["roofs"]
    assert found["card"] == "rtx5090" and found["measured_share"] is None
    assert found["seconds"] == pytest.approx(sum(part["seconds"] for part in found["parts"].values()))
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"])
    assert printed.count("bandwidth │") == len(PARTS) == len(found["parts"])
    assert {part["bound"] for part in found["parts"].values()} == {"bandwidth"}
    monkeypatch.setitem(roofline.MEASURED_SHARES, "rtx5090", 0.5)
    assert text.roofs_verdict(plan.roofs)[1] == (
        f"{plan.roofs.tokens_per_second / 2:,.0f} tokens per second at 50% of that speed, as measured on this card"
    )
