"""The formulas for a step's operations and bytes equal what the compiled step does, counted from its text."""

import dataclasses
import math
from collections import Counter

import jax
import pytest

from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.nf4_matmul.shapes import SHAPES
from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.experts_config import ExpertsConfig
from qlora_jax.nn.attention import cpu as attention_cpu
from qlora_jax.nn.rope import QueryPositionScale, Rope
from qlora_jax.training.abstract_step import abstract_step
from qlora_jax.training.cost import flops, memory_use
from qlora_jax.training.cost.activations import activation_bytes
from qlora_jax.training.cost.step_shape import F32, StepShape
from qlora_jax.training.metrics.mfu import utilization
from tests.marks import EXHAUSTIVE
from tests.training.compiled_text import TO_READ, dots, loops, nbytes
from tests.training.real_models import REAL_MODELS

LAYERS = 7  # no other loop runs as often
MODEL = ModelConfig(
    vocab_size=1000,
    embed_dim=192,
    num_layers=LAYERS,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=320,
    norm_eps=1e-5,
    rope=Rope(theta=1e4, dim=32, max_positions=2048),
    tie_embeddings=False,
    qkv_bias=True,
    max_positions=2048,
)
EVERY = LoraArgs(rank=8, rank_pattern={"down_proj": 16})
FIXED_A = LoraArgs(method="lora_fa", rank=8)
SOME = LoraArgs(rank=8, target_modules=["q_proj", "v_proj"], dropout=0.1)
# Of ranks for whose norms no C++ handler multiplies from the codes, which a compiled text would not tell.
DORA = LoraArgs(method="dora", rank=16, rank_pattern={"down_proj": 12})
SOME_DORA = dataclasses.replace(SOME, method="dora", rank=16)
IA3 = LoraArgs(method="ia3")
OFT = LoraArgs(method="oft", oft_block_size=32)
SOME_OFT = LoraArgs(method="oft", oft_blocks=16, block_share=True, target_modules=["q_proj", "o_proj", "down_proj"])
EXACT_OFT = dataclasses.replace(OFT, use_cayley_neumann=False, dtype="bfloat16")
VERA = LoraArgs(method="vera", rank=24)
SOME_VERA = LoraArgs(method="vera", rank=24, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"], dropout=0.1)
WHOLE = LoraArgs(method="full")
LN_TUNING, BITFIT = LoraArgs(method="ln_tuning"), LoraArgs(method="bitfit")
HOULSBY, PFEIFFER = LoraArgs(method="houlsby", rank=8), LoraArgs(method="pfeiffer", rank=8)
EVERY_IA3 = LoraArgs(method="ia3", target_modules="all-linear", feedforward_modules=["up_proj", "gate_proj", "o_proj"])
# Features of other families, between them all that change what is multiplied, held or kept.
LIKE_GEMMA3 = dataclasses.replace(
    MODEL,
    layout="both",
    qk_norm="head",
    norm_offset=1.0,
    windows=(40, None) * 3 + (40,),
    ropes=(Rope(theta=5e3, dim=32, max_positions=2048), MODEL.rope) * 3 + (MODEL.rope,),
    attention_softcap=5.0,
    head_softcap=3.0,
    activation="gelu_tanh",
)
SPARSE = ExpertsConfig(
    count=8, per_token=2, mlp_dim=128, layers=tuple(range(LAYERS)), shared_mlp_dim=64, shared_gate=True
)
MIXTURE = dataclasses.replace(MODEL, experts=SPARSE)
ON_EXPERTS = LoraArgs(rank=8, target_parameters=["gate_up_proj", "mlp.experts.down_proj", "mlp.gate"])
LIKE_OLMO2 = dataclasses.replace(MODEL, layout="post", qk_norm="width")
LIKE_PHI3 = dataclasses.replace(MODEL, fused_qkv="parts", fused_gate_up=True)
PLAIN_MLP = dict(norm="layer", gated=False, o_bias=True, mlp_bias=True, activation="gelu")
LIKE_PHI = dataclasses.replace(MODEL, layout="parallel, one norm", head_bias=True, **PLAIN_MLP)
LIKE_NEOX = dataclasses.replace(MODEL, layout="parallel", num_kv_heads=6, fused_qkv="heads", **PLAIN_MLP)
LIKE_COHERE2 = dataclasses.replace(
    MODEL,
    layout="parallel, one norm",
    norm="layer without bias",
    rope_interleaved=True,
    query_position_scale=QueryPositionScale(beta=0.1, period=64),
    residual_scale=0.3,
    logit_scale=0.25,
)
# Lengths: one chunk of attention, 3 with padding in the last, and 9.
CASES = {
    "none": (MODEL, "none", (1, 2, 320), EVERY),
    "names": (MODEL, "names", (2, 2, 320), EVERY),
    "full": (MODEL, "full", (1, 2, 320), EVERY),
    "names, two adapters": (MODEL, "names", (1, 1, 320), SOME),
    "none, two adapters": (MODEL, "none", (1, 1, 320), SOME),
    "names, bf16 adapters": (MODEL, "names", (2, 2, 320), dataclasses.replace(EVERY, dtype="bfloat16")),
    "names, dora": (MODEL, "names", (2, 2, 320), DORA),
    "names, ia3": (MODEL, "names", (1, 2, 320), IA3),
    "names, long": (MODEL, "names", (1, 1, 1152), EVERY),
    "full, short": (MODEL, "full", (1, 2, 100), EVERY),
    "full, not unrolled": (MODEL, "full", (1, 3, 200), EVERY),
}
FAMILIES = {
    f"{name}, {remat}": (model, remat, (1, 2, 320), EVERY)
    for name, model in {"gemma3": LIKE_GEMMA3, "olmo2": LIKE_OLMO2, "phi3": LIKE_PHI3, "phi": LIKE_PHI}.items()
    for remat in ("none", "names")
} | {
    "neox, none": (LIKE_NEOX, "none", (1, 2, 320), EVERY),
    "gemma3, full": (LIKE_GEMMA3, "full", (1, 2, 320), EVERY),
    "cohere2, names": (LIKE_COHERE2, "names", (1, 2, 320), EVERY),
}
NEW_IDS = (1000, 1001, 1002, 7, 998)
NEW_TOKENS = {
    "names, new tokens": (MODEL, "names", (2, 2, 320), EVERY, NEW_IDS),
    "names, new tokens, tied": (
        *(dataclasses.replace(MODEL, tie_embeddings=True), "names", (1, 2, 320)),
        *(dataclasses.replace(EVERY, dtype="bfloat16"), NEW_IDS),
    ),
}
BOTH = ["embed_tokens", "lm_head"]
NEW_TOKENS |= {
    "names, whole tables": (MODEL, "names", (2, 2, 320), dataclasses.replace(EVERY, modules_to_save=BOTH)),
    "names, whole head": (
        *(MODEL, "names", (1, 2, 320)),
        *(dataclasses.replace(EVERY, modules_to_save=BOTH[1:], dtype="bfloat16"), (1000, 1001, 1002)),
    ),
    "names, tied and whole": (
        *(dataclasses.replace(MODEL, tie_embeddings=True), "names", (1, 2, 320)),
        *(dataclasses.replace(EVERY, modules_to_save=BOTH[:1]), (1000, 1001)),
    ),
}
IN_HANDLERS = ("names, C++ attention", "full, C++ attention")
CASES |= {IN_HANDLERS[0]: (MODEL, "names", (2, 2, 320), EVERY), IN_HANDLERS[1]: (MODEL, "full", (1, 2, 100), EVERY)}
METHODS = {
    "names, lora_fa": (MODEL, "names", (1, 2, 320), FIXED_A),
    "none, lora_fa": (MODEL, "none", (1, 2, 320), FIXED_A),
    "none, dora": (MODEL, "none", (1, 2, 320), DORA),
    "full, dora": (MODEL, "full", (1, 2, 320), DORA),
    "names, dora and dropout": (MODEL, "names", (1, 2, 320), SOME_DORA),
    "full, dora and dropout": (MODEL, "full", (1, 2, 320), SOME_DORA),
    "names, dora in bf16": (MODEL, "names", (1, 2, 320), dataclasses.replace(DORA, dtype="bfloat16")),
    "names, oft": (MODEL, "names", (2, 2, 320), OFT),
    "full, vera": (MODEL, "full", (1, 2, 320), VERA),
    "none, oft": (MODEL, "none", (1, 2, 320), OFT),
    "full, oft": (MODEL, "full", (1, 2, 320), OFT),
    "none, oft, shared": (MODEL, "none", (1, 2, 320), SOME_OFT),
    "names, oft, exact": (MODEL, "names", (1, 2, 320), EXACT_OFT),
    "none, vera": (MODEL, "none", (1, 2, 320), VERA),
    "names, vera": (MODEL, "names", (2, 2, 320), VERA),
    "names, vera and dropout": (MODEL, "names", (1, 2, 320), SOME_VERA),
    "none, ia3": (MODEL, "none", (1, 2, 320), IA3),
    "full, ia3": (MODEL, "full", (1, 2, 320), IA3),
    "names, ln_tuning": (LIKE_GEMMA3, "names", (1, 2, 320), LN_TUNING),
    "full, bitfit": (LIKE_NEOX, "full", (1, 2, 320), BITFIT),
    "none, bitfit": (MODEL, "none", (1, 2, 320), BITFIT),
    "names, houlsby": (MODEL, "names", (2, 2, 320), HOULSBY),
    "none, houlsby": (LIKE_OLMO2, "none", (1, 2, 320), HOULSBY),
    "full, houlsby": (MODEL, "full", (1, 2, 320), HOULSBY),
    "full, pfeiffer in bf16": (LIKE_GEMMA3, "full", (1, 2, 320), dataclasses.replace(PFEIFFER, dtype="bfloat16")),
    "none, ia3 everywhere": (MODEL, "none", (1, 2, 320), EVERY_IA3),
    "names, ia3 everywhere": (MODEL, "names", (1, 2, 320), EVERY_IA3),
    "full, ia3 everywhere": (MODEL, "full", (1, 2, 320), EVERY_IA3),
}
# With dense weights: the product of a frozen one is XLA's, and so is that of one that trains.
NOT_QUANTIZED = {
    "names, whole": (MODEL, "names", (2, 2, 320), WHOLE),
    "none, whole": (MODEL, "none", (1, 2, 320), WHOLE),
    "full, whole in bf16": (MODEL, "full", (1, 2, 320), dataclasses.replace(WHOLE, dtype="bfloat16")),
    "names, whole, neox": (LIKE_NEOX, "names", (1, 2, 320), WHOLE),
}
MIXTURES = {
    "names, experts": (MIXTURE, "names", (2, 2, 320), ON_EXPERTS),
    "full, experts": (MIXTURE, "full", (1, 2, 320), ON_EXPERTS),
    "none, experts": (MIXTURE, "none", (1, 2, 320), EVERY),
}
FAMILIES |= METHODS | NEW_TOKENS | NOT_QUANTIZED | MIXTURES
# The scopes of parts; the name of an operation may have several, of which the first counts.
SCOPES = (
    "cayley",
    "rotation",
    "new_tokens",
    "whole_head",
    "whole_linear",
    "dora",
    "bottleneck",
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
            patch.setattr(attention_cpu, "attention_problem", lambda: "left out")
        elif problem := attention_cpu.attention_problem():
            pytest.skip(problem)
        jax.clear_caches()  # a step that was traced the other way
        yield _compiled(*(CASES | FAMILIES)[request.param])
    jax.clear_caches()


def _compiled(model, remat, batch, lora, new_ids=()):
    weights = WeightFormat(platform="cpu", quant_type=None if lora.method == "full" else "nf4")
    step = abstract_step(model, weights, lora, batch=batch, remat=remat, new_ids=new_ids)
    function, args, kwargs = step.gradients()
    compiled = function.lower(*args, **kwargs).compile(TO_READ)
    counted = dataclasses.replace(_counted(model, weights, step, batch, lora), new_tokens=len(new_ids))
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
    left_out = (*NOT_IN_TEXT, "attention") if flops.uses_cpu_handlers(counted) else NOT_IN_TEXT
    return {name: n for name, n in flops.flops(counted).items() if not name.startswith(left_out)}


def test_each_part_is_its_share_of_the_compiled_step(case):
    """Parts by the scopes that nn and models name; recomputation runs in the backward loop."""
    counted, _, _, text = case
    expected, found = Counter(), Counter()
    for name, operations in _in_dots(counted).items():
        part, direction = name.split()
        expected[part, direction != "forward" and part != "head"] += operations
    for dot in _dots(text):
        part = next(part for part in SCOPES if part in dot.op_name)
        found[part, "transpose(" in dot.op_name] += dot.flops * dot.times
    assert found == expected
    frozen = expected["frozen", False] + expected["frozen", True]
    if not counted.dora:
        assert memory_use.dequantized_traffic(counted) == 2 * frozen // counted.rows  # 4 N K for each 2 M N K


def test_arguments_and_results_are_the_formulas_bytes(case):
    counted, step, compiled, _ = case
    memory = compiled.memory_analysis()
    key = 0 if step.key is None else 8
    assert memory.argument_size_in_bytes == memory_use.argument_bytes(counted) + key
    results = len(jax.tree.leaves(step.parts.trained)) + 3 + 5 * (counted.experts is not None)
    pointers = 8 * results  # XLA on CPUs counts the table of a tuple's members
    assert memory.output_size_in_bytes == memory_use.gradient_output_bytes(counted) + pointers


def _is_weight(leaf) -> bool:
    return isinstance(leaf, QTensor)


def test_stacks_between_forward_and_backward_are_the_saved_activations(case):
    counted, step, _, text = case
    (forward,) = (loop for loop in loops(text) if loop.trips == LAYERS and "transpose(" not in loop.op_name)
    carried = sum(nbytes(kind) for kind in forward.carried if kind.split("[")[1].startswith(f"{LAYERS},"))
    given = sum(
        _bytes(leaf) for leaf in jax.tree.leaves((step.parts.base, step.parts.lora)) if leaf.shape[:1] == (LAYERS,)
    )
    given -= sum(_bytes(leaf) for leaf in jax.tree.leaves(step.parts.base) if leaf.shape == (LAYERS,))  # nested_offset
    of_experts = [weight for weight in jax.tree.leaves(step.parts.base, is_leaf=_is_weight) if _is_weight(weight)]
    given -= sum(weight.nbytes for weight in of_experts if len(weight.stack_shape) == 2)  # carried as one axis
    expected = sum(activation_bytes(counted).values())
    if counted.experts is not None:  # results: the sums of routing
        given += F32 * LAYERS * counted.batch[1] * (2 * counted.experts.count + 1)
    vectors = memory_use.lora_bytes(counted) + memory_use.frozen_bytes(counted)["vectors"]
    slices = vectors if counted.remat == "none" else 0
    assert expected <= carried - given <= expected + slices


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "lora"),
    [
        ("names", LoraArgs(rank=8, layers_to_transform="5-6")),
        ("full", LoraArgs(rank=8, target_modules=r".*layers\.[12]\.mlp\.(up|down)_proj|.*layers\.[3-6]\..*q_proj")),
    ],
)
def test_layers_before_the_first_adapter_have_no_backward_pass(remat, lora, monkeypatch):
    monkeypatch.setattr(attention_cpu, "attention_problem", lambda: "left out")
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


def _bytes(leaf) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def test_the_update_reads_and_overwrites_the_formulas_bytes():
    step = abstract_step(MODEL, WeightFormat(), EVERY, batch=(1, 1, 128))
    function, args, kwargs = step.update()
    memory = function.lower(*args, **kwargs).compile(TO_READ).memory_analysis()
    counted = _counted(MODEL, WeightFormat(), step, (1, 1, 128), EVERY)
    lora, state = memory_use.lora_bytes(counted), memory_use.optimizer_bytes(counted)
    assert memory.argument_size_in_bytes == 2 * lora + state
    assert memory.alias_size_in_bytes == lora + state


def _counted(model, weights, step, batch, lora):
    return StepShape(model=model, weights=weights, lora=lora, batch=batch, remat=step.remat)


@pytest.mark.parametrize("name", REAL_MODELS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"double_quant": False}, {"block_size": 32, "nested_block_size": 128}, {"quant_type": None}],
    ids=["nf4", "f32 constants", "small blocks", "dense"],
)
def test_bytes_of_real_models_are_those_of_their_leaves(name, settings):
    model, weights, batch = REAL_MODELS[name], WeightFormat(platform="gpu", **settings), (2, 3, 64)
    lora = LoraArgs(rank=64)
    step = abstract_step(model, weights, lora, batch=batch)
    counted = _counted(model, weights, step, batch, lora)
    assert sum(memory_use.frozen_bytes(counted).values()) == sum(map(_bytes, jax.tree.leaves(step.parts.base)))
    assert memory_use.lora_bytes(counted) == sum(map(_bytes, jax.tree.leaves(step.parts.lora)))
    assert memory_use.optimizer_bytes(counted) == sum(map(_bytes, jax.tree.leaves(step.state)))
    assert memory_use.batch_bytes(counted) == sum(map(_bytes, jax.tree.leaves(step.batch)))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("settings", [{}, {"quant_type": None}, {"double_quant": False, "platform": "gpu"}])
def test_bytes_of_mixtures_are_those_of_their_leaves(settings, shared):
    experts = dataclasses.replace(SPARSE, layers=(2, 3, 4, 5, 6), router_bias=True, selection_bias=True, bias=True)
    model, weights = dataclasses.replace(MIXTURE, experts=experts), WeightFormat(**settings)
    lora, optim = dataclasses.replace(ON_EXPERTS, share_experts=shared), OptimArgs(name="adamw_8bit")
    step = abstract_step(model, weights, lora, batch=(1, 1, 64), optim=optim)
    counted = dataclasses.replace(_counted(model, weights, step, (1, 1, 64), lora), optimizer=optim.name)
    assert sum(memory_use.frozen_bytes(counted).values()) == sum(map(_bytes, jax.tree.leaves(step.parts.base)))
    assert memory_use.lora_bytes(counted) == sum(map(_bytes, jax.tree.leaves(step.parts.lora)))
    assert memory_use.optimizer_bytes(counted) == sum(map(_bytes, jax.tree.leaves(step.state)))


@pytest.mark.parametrize("model", [MODEL, LIKE_PHI, dataclasses.replace(MODEL, embed_dim=4096, tie_embeddings=True)])
def test_bytes_of_new_tokens_are_those_of_their_leaves(model):
    """In 8 bits, where a row is as long as that; a head's biases are frozen."""
    optim = OptimArgs(name="adamw_8bit")
    step = abstract_step(model, WeightFormat(), EVERY, batch=(1, 1, 64), optim=optim, new_ids=NEW_IDS)
    counted = _counted(model, WeightFormat(), step, (1, 1, 64), EVERY)
    counted = dataclasses.replace(counted, optimizer=optim.name, new_tokens=len(NEW_IDS))
    assert memory_use.lora_bytes(counted) == sum(map(_bytes, jax.tree.leaves(step.parts.lora)))
    assert memory_use.optimizer_bytes(counted) == sum(map(_bytes, jax.tree.leaves(step.state)))
    assert sum(memory_use.frozen_bytes(counted).values()) == sum(map(_bytes, jax.tree.leaves(step.parts.base)))


@pytest.mark.parametrize("name", memory_use.OPTIMIZER_STATES)
def test_bytes_of_every_optimizer_are_those_of_its_leaves(name):
    lora, optim = LoraArgs(rank=8, rank_pattern={"down_proj": 16}), OptimArgs(name=name)  # some of 4,096 and more
    step = abstract_step(MODEL, WeightFormat(), lora, batch=(1, 1, 64), optim=optim)
    counted = dataclasses.replace(_counted(MODEL, WeightFormat(), step, (1, 1, 64), lora), optimizer=name)
    assert memory_use.optimizer_bytes(counted) == sum(map(_bytes, jax.tree.leaves(step.state)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(step.state) if leaf.ndim} == (
        {"uint8", "float32"} if name.endswith("_8bit") else {"float32"}
    )


def test_published_sizes():
    """LLaMA-65B at rank 64: 799.5 M LoRA parameters and 32.1 GiB frozen, as counted elsewhere by hand."""
    lora = LoraArgs(rank=64)
    step = abstract_step(REAL_MODELS["llama-65b"], WeightFormat(), lora, batch=(1, 1, 512))
    counted = _counted(REAL_MODELS["llama-65b"], WeightFormat(), step, (1, 1, 512), lora)
    assert memory_use.lora_bytes(counted) / 4 / 1e6 == pytest.approx(799.5, abs=0.1)
    assert sum(memory_use.frozen_bytes(counted).values()) / 2**30 == pytest.approx(32.095, abs=0.005)


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
    forward = [name for name in flops.LAYER_FLOPS if name.endswith("forward") and counts[name]]
    assert {"lora forward", "attention forward", "frozen forward"} <= {*forward}
    assert {name: doubled[name] for name in forward} == {name: 2 * counts[name] for name in forward}
