"""The formulas for a step's operations and bytes equal what the compiled step does, counted from its text."""

import dataclasses
from collections import Counter

import jax
import pytest

from pallas_kernels.attention import cpu as attention_cpu
from pallas_kernels.dense_matmul import dot
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.nf4_matmul import cpu as nf4_cpu
from pallas_kernels.nf4_matmul.shapes import SHAPES
from qlora_jax.config import LoraArgs
from qlora_jax.models.config import WeightFormat
from qlora_jax.training.cost import flops, memory_use
from qlora_jax.training.cost.memory_use import activation_bytes
from qlora_jax.training.cost.step_shape import F32, StepShape
from qlora_jax.training.metrics.mfu import utilization
from qlora_jax.training.step_spec import StepSpec
from tests.marks import EXHAUSTIVE
from tests.training.compiled_text import TO_READ, dots, loops, nbytes
from tests.training.cost.step_cases import (
    CASES,
    EVERY,
    FAMILIES,
    IN_HANDLERS,
    LAYERS,
    MIXTURE,
    MODEL,
    ON_EXPERTS,
    SPARSE,
    counted_step,
    leaf_bytes,
)
from tests.training.real_models import REAL_MODELS

# The scopes of parts; the name of an operation may have several, of which the first counts.
SCOPES = (
    "cayley",
    "rotation",
    "new_tokens",
    "whole_head",
    "whole_linear",
    "dora",
    "bottleneck",
    "merge",
    "lora",
    "router",
    "frozen",
    "attention",
    "head",
)
LARGE = ("full, experts", "none, experts")
PARAMS = [
    *CASES,
    *(pytest.param(name, marks=EXHAUSTIVE if name in LARGE else pytest.mark.slow) for name in FAMILIES),
]


@pytest.fixture(scope="module", params=PARAMS)
def case(request):
    """(StepShape, abstract step, compiled gradients, its text)."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param not in IN_HANDLERS:
            patch.setattr(attention_cpu, "problem", lambda: "left out")
        elif problem := attention_cpu.problem():
            pytest.skip(problem)
        jax.clear_caches()  # a step that was traced the other way
        yield _compiled(*(CASES | FAMILIES)[request.param])
    jax.clear_caches()


def _compiled(model, remat, batch, lora, new_ids=()):
    weights = WeightFormat(platform="cpu", quant_type=None if lora.method == "full" else "nf4")
    step = StepSpec(model=model, weights=weights, lora=lora, batch=batch, remat=remat, new_ids=new_ids)
    function, args, kwargs = step.gradients()
    compiled = function.lower(*args, **kwargs).compile(TO_READ)
    counted = counted_step(model, weights, step, batch, lora, new_tokens=len(new_ids))
    return counted, step, compiled, compiled.as_text()


def test_products_are_exactly_those_of_the_compiled_step(case):
    counted, _, _, text = case
    assert sum(_in_dots(counted).values()) == sum(dot.flops * dot.times for dot in _dots(text))


# Parts that a compiled text does not tell: routed experts run in loops whose trips depend on the routing, and products
# with a single column lose their names.
NOT_IN_TEXT = ("experts", "shared_gate")


def _dots(text):
    """The products of the other parts."""
    return [dot for dot in dots(text) if dot.op_name and "experts" not in dot.op_name]


def _in_dots(counted):
    """Operations by part, without those of NOT_IN_TEXT and of C++ handlers."""
    left_out = (*NOT_IN_TEXT, "attention") if flops.attention_runs(counted) == "cpu" else NOT_IN_TEXT
    return {name: n for name, n in flops.flops(counted).items() if not name.startswith(left_out)}


def test_each_part_is_its_share_of_the_compiled_step(case):
    """Parts by the scopes that nn and models name; recomputation runs in the backward loop."""
    counted, _, _, text = case
    expected, found = Counter(), Counter()
    for name, operations in _in_dots(counted).items():
        part, direction = name.split()
        expected[part, direction != "forward" and part != "head"] += operations
    for product in _dots(text):
        part = next(part for part in SCOPES if part in product.op_name)
        found[part, "transpose(" in product.op_name] += product.flops * product.times
    assert found == expected
    frozen = expected["frozen", False] + expected["frozen", True]
    if not counted.adapter.rereads:
        assert memory_use.dequantized_traffic(counted) == 2 * frozen // counted.rows  # 4 N K for each 2 M N K


def test_arguments_and_results_are_the_formulas_bytes(case):
    counted, step, compiled, _ = case
    memory = compiled.memory_analysis()
    key = 0 if step.arrays.key is None else 8
    assert memory.argument_size_in_bytes == memory_use.argument_bytes(counted) + key
    results = len(jax.tree.leaves(step.arrays.parts.trained)) + 3 + 5 * (counted.experts is not None)
    pointers = 8 * results  # XLA on CPUs counts the table of a tuple's members
    assert memory.output_size_in_bytes == memory_use.gradient_output_bytes(counted) + pointers


def _is_weight(leaf) -> bool:
    return isinstance(leaf, QTensor)


def test_stacks_between_forward_and_backward_are_the_saved_activations(case):
    counted, step, _, text = case
    (forward,) = (loop for loop in loops(text) if loop.trips == LAYERS and "transpose(" not in loop.op_name)
    carried = sum(nbytes(kind) for kind in forward.carried if kind.split("[")[1].startswith(f"{LAYERS},"))
    given = sum(
        leaf_bytes(leaf)
        for leaf in jax.tree.leaves((step.arrays.parts.base, step.arrays.parts.lora))
        if leaf.shape[:1] == (LAYERS,)
    )
    given -= sum(
        leaf_bytes(leaf) for leaf in jax.tree.leaves(step.arrays.parts.base) if leaf.shape == (LAYERS,)
    )  # nested_offset
    of_experts = [
        weight for weight in jax.tree.leaves(step.arrays.parts.base, is_leaf=_is_weight) if _is_weight(weight)
    ]
    given -= sum(weight.nbytes for weight in of_experts if len(weight.stack_shape) == 2)  # carried as one axis
    expected = sum(activation_bytes(counted).values())
    if counted.experts is not None:  # results: the sums of routing
        given += F32 * LAYERS * counted.batch[1] * (2 * counted.experts.count + 1)
    stacked = [leaf for kind, leaf in counted.trees.frozen(None) if kind == "adapters" and leaf.shape[0] == LAYERS]
    vectors = memory_use.lora_bytes(counted) + memory_use.frozen_bytes(counted)["vectors"]
    vectors += sum(leaf.nbytes for leaf in stacked)
    slices = vectors if counted.remat == "none" else 0
    assert expected <= carried - given <= expected + slices


def _dequantized_product(a, weights, layer, *, transposed):
    return dot(a, nf4_cpu.dequantize_layer(weights, layer, a.dtype), (1, 0 if transposed else 1), a.dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "lora"),
    [
        ("names", LoraArgs(rank=8, layers_to_transform="5-6")),
        ("full", LoraArgs(rank=8, target_modules=r".*layers\.[12]\.mlp\.(up|down)_proj|.*layers\.[3-6]\..*q_proj")),
    ],
)
def test_layers_before_the_first_adapter_have_no_backward_pass(remat, lora, monkeypatch):
    monkeypatch.setattr(attention_cpu, "problem", lambda: "left out")
    monkeypatch.setattr(nf4_cpu, "_product", _dequantized_product)  # packs no rows, which would be temporaries, too
    jax.clear_caches()
    counted, _, compiled, _ = case = _compiled(MODEL, remat, (1, 2, 320), lora)
    test_products_are_exactly_those_of_the_compiled_step(case)
    test_arguments_and_results_are_the_formulas_bytes(case)
    first = 5 if remat == "names" else 1
    assert counted.first_backward == first
    saved = _compiled(MODEL, remat, (1, 2, 320), dataclasses.replace(EVERY, rank_pattern={}))
    less = saved[2].memory_analysis().temp_size_in_bytes - compiled.memory_analysis().temp_size_in_bytes
    formula = sum(activation_bytes(saved[0]).values()) - sum(activation_bytes(counted).values())
    assert formula > 0 and less == pytest.approx(formula, rel=0.2)


@pytest.mark.parametrize("name", REAL_MODELS)
def test_the_named_shapes_are_those_of_the_models(name):
    model = REAL_MODELS[name]
    named = Counter()
    for shape in SHAPES.values():
        if shape.model == name:
            assert shape.layers == model.num_layers
            named[shape.nk] += shape.in_layer
    assert named == Counter(shape for shape, _ in model.linear_shapes().values())


def test_routed_experts_multiply_the_active_parameters():
    """Half of the experts' and other matrices' forward FLOP is the parameters that one token uses."""
    for first in (0, 2):
        sparse = dataclasses.replace(SPARSE, layers=tuple(range(first, LAYERS)), router_bias=False)
        model = dataclasses.replace(MIXTURE, experts=sparse, qkv_bias=False)
        counted = StepShape(model=model, weights=WeightFormat(), lora=EVERY, batch=(1, 1, 1), remat="full")
        parts = flops.flops(counted)
        matrices = model.active_parameters() - 2 * model.vocab_size * model.embed_dim
        norms = sum(model.norm_widths().values()) * LAYERS + model.embed_dim
        assert sum(parts[f"{name} forward"] for name in ("frozen", "experts", "router", "shared_gate")) == 2 * (
            matrices - norms
        )


def test_padding_of_tiles_is_not_model_flop():
    """GPUs have tiles of at least 8 rows, and a token is the same work on every device."""
    counted = {"model": MIXTURE, "lora": ON_EXPERTS, "batch": (1, 2, 320), "remat": "full"}
    cpu, gpu = (StepShape(weights=WeightFormat(platform=name), **counted) for name in ("cpu", "gpu"))
    assert utilization(cpu, None).token == utilization(gpu, None).token
    assert flops.flops(gpu)["lora forward"] > flops.flops(cpu)["lora forward"]


def test_only_whole_chunks_of_supervised_tokens_reach_the_head():
    some = {"model": MODEL, "weights": WeightFormat(), "lora": LoraArgs(), "batch": (1, 4, 256), "remat": "names"}
    heads = [flops.head_flops(StepShape(**some, supervised=tokens)) for tokens in (None, 1024, 257, 256, 0)]
    one = 2 * 256 * MODEL.embed_dim * MODEL.vocab_size
    assert heads == [4 * one, 4 * one, 2 * one, one, 0]


def test_twice_the_layers_need_twice_the_flop():
    some = {"weights": WeightFormat(), "lora": LoraArgs(), "batch": (1, 2, 256), "remat": "full"}
    deeper = dataclasses.replace(MODEL, num_layers=2 * MODEL.num_layers)
    counts, doubled = (flops.flops(StepShape(**some, model=model)) for model in (MODEL, deeper))
    forward = [name for name in counts if name.endswith("forward") and name not in flops.HEAD_FLOPS and counts[name]]
    assert {"lora forward", "attention forward", "frozen forward"} <= {*forward}
    assert {name: doubled[name] for name in forward} == {name: 2 * counts[name] for name in forward}
