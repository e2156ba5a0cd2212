"""The real training step from shapes: equal to a run's step, and compiled for absent cards."""

import math
import re
import time

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot
from pallas_kernels.dispatch import DIRECTIONS, Call
from pallas_kernels.gpu_specs import CARDS
from pallas_kernels.kernel_report import abstract_weight, device_of_card
from pallas_kernels.nf4_matmul.api import IMPLEMENTATIONS, choose_implementation
from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import partition
from qlora_jax.optim import make_optimizer
from qlora_jax.training import step
from qlora_jax.training.cost import flops, memory_use
from qlora_jax.training.cost.memory_use import activation_bytes
from qlora_jax.training.cost.step_shape import StepShape
from qlora_jax.training.step_spec import StepSpec
from tests.io.tiny_models import tiny_config
from tests.marks import some_in_ci
from tests.training.compiled_text import TO_READ, computed, dots, nbytes, shape_of
from tests.training.real_models import REAL_MODELS

FIVE = ("h100", "a100", "a6000", "rtx4090", "l40s")
STEPS = [
    ("smollm2-135m", (2, 4, 512), "names"),
    ("smollm2-135m", (1, 1, 512), "full"),
    ("qwen2-0.5b", (1, 1, 512), "none"),
    ("llama-3-8b", (1, 1, 2048), "names"),
]
needs_compiler = pytest.mark.skipif(aot.problem() is not None, reason=str(aot.problem()))


def _described(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)


@pytest.mark.parametrize("lora", [LoraArgs(rank=4), LoraArgs(rank=2, target_modules=["q_proj"], dropout=0.1)])
@pytest.mark.parametrize("optim", [OptimArgs(), OptimArgs(max_grad_norm=0.0, weight_decay=0.1)])
def test_it_is_what_a_run_holds(lora, optim):
    config, weights = model_config(tiny_config()), WeightFormat(dtype="float32")
    model = CausalLM(config, weights)
    attach_method(model, lora, jax.random.key(0))
    parts = partition(model)
    abstract = StepSpec(model=config, weights=weights, lora=lora, batch=(2, 3, 16), optim=optim)
    assert abstract.arrays.parts.graphdef == parts.graphdef and hash(abstract.arrays.parts.graphdef) == hash(
        parts.graphdef
    )
    assert _described(abstract.arrays.parts.lora) == _described(parts.lora)
    assert _described(abstract.arrays.parts.base) == _described(parts.base)
    assert _described(abstract.arrays.state) == _described(make_optimizer(optim, 10).init(parts.lora))
    assert (abstract.arrays.key is None) == (lora.dropout == 0)
    for made, real in zip(jax.tree.leaves(abstract.arrays.key), jax.tree.leaves(jax.random.key(0)), strict=False):
        assert made.dtype == real.dtype


def test_the_compiled_program_takes_a_runs_arrays():
    config, weights, lora = model_config(tiny_config()), WeightFormat(dtype="float32"), LoraArgs(rank=4)
    function, args, kwargs = StepSpec(model=config, weights=weights, lora=lora, batch=(1, 2, 16)).gradients()
    assert function is step.gradients
    compiled = function.lower(*args, **kwargs).compile()
    model = CausalLM(config, weights)
    attach_method(model, lora, jax.random.key(0))
    parts = partition(model)
    tokens = jnp.ones((1, 2, 16), jnp.int32)
    batch = {"inputs": tokens, "targets": tokens, "weights": jnp.ones((1, 2, 16))}
    grads, told = compiled(parts, batch, None, None)
    assert _described(grads) == _described(parts.lora) and told.count == 32


def test_an_update_on_a_cpu_holds_no_second_set_of_gradients():
    """Gradients are divided by their norm; scratch is a leaf at a time, of fourteen in all."""
    config = model_config(tiny_config())
    abstract = StepSpec(model=config, weights=WeightFormat(dtype="float32"), lora=LoraArgs(rank=32), batch=(1, 2, 16))
    function, args, kwargs = abstract.update()
    temporaries = function.lower(*args, **kwargs).compile(TO_READ).memory_analysis().temp_size_in_bytes
    leaves = [math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(abstract.arrays.parts.lora)]
    assert len(leaves) == 14
    assert temporaries < 2 * max(leaves) < sum(leaves) / 2


def test_65b_takes_no_memory_and_no_time():
    before = time.process_time()
    made = StepSpec(
        model=REAL_MODELS["llama-65b"], weights=WeightFormat(platform="gpu"), lora=LoraArgs(rank=64), batch=(1, 1, 512)
    )
    assert time.process_time() - before < 5
    assert all(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((made.arrays.parts, made.arrays.state))
    )


# Compiled for absent cards


def compile_both(name: str, card: str, batch, remat="names", **lora):
    """(StepShape, gradients and update compiled for the card, the abstract step)."""
    model, weights = REAL_MODELS[name], WeightFormat(platform="gpu")
    adapters = LoraArgs(**lora)
    abstract = StepSpec(model=model, weights=weights, lora=adapters, batch=batch, remat=remat)
    compiled = [
        aot.compile_for(card, p.function, *p.args, **p.kwargs) for p in (abstract.gradients(), abstract.update())
    ]
    counted = StepShape(model=model, weights=weights, lora=adapters, batch=batch, remat=remat)
    return counted, *compiled, abstract


def check_counts(counted, gradients, update, abstract):
    """Operations and bytes of the compiled programs are the formulas'."""
    products = dots(gradients.text)
    expected = sum(flops.flops(counted).values()) - fused_flops(counted, gradients.card)
    excess = sum(dot.flops * dot.times for dot in products) - expected
    assert 0 <= excess <= sum(dot.flops * dot.times for dot in products if is_split(dot)) / 2
    device = gradients.memory.device
    assert device.arguments == memory_use.argument_bytes(counted)
    pointers = 8 * (len(jax.tree.leaves(abstract.arrays.parts.lora)) + 3)  # the table of a tuple's members
    assert device.outputs == memory_use.gradient_output_bytes(counted) + pointers
    lora, state = memory_use.lora_bytes(counted), memory_use.optimizer_bytes(counted)
    assert update.memory.device.arguments == 2 * lora + state
    assert update.memory.device.aliases == lora + state
    saved = sum(activation_bytes(counted).values())
    assert saved < device.temporaries < saved + working_set(counted)


def fused_flops(counted, card) -> int:
    """Operations of products that run in kernels of their own: all of the frozen ones, or none."""
    device, rows, runs = device_of_card(card.name)[0], math.prod(counted.batch[1:]), set()
    for _, shape in counted.shapes():
        weight = abstract_weight(shape, counted.weights.layout_for(shape))
        calls = [Call.of(way, rows, jnp.dtype(counted.weights.dtype), weight) for way in DIRECTIONS]
        runs |= {IMPLEMENTATIONS[str(choose_implementation(device, call).name)].fused for call in calls}
    (fused,) = runs
    parts = (*("frozen",) * fused, *("attention",) * (flops.attention_runs(counted) == "mma"))
    return sum(flops for part, flops in flops.flops(counted).items() if part.startswith(parts))


def is_split(dot) -> bool:
    """True if XLA splits the contracted length among blocks, as a batch dimension, padded with zeros to whole
    parts: as much as half of the product may be padding. In the model itself attention alone has batch dimensions."""
    return dot.batched and "attention" not in dot.op_name


def working_set(counted) -> int:
    """Bytes that may be live beside saved activations: one tile of logits (twice: split products are summed in f32),
    the gradients of one micro-batch, and of one layer eight arrays of each width and two dequantized MLP weights."""
    model = counted.model
    widths = 2 * model.mlp_dim + 4 * model.embed_dim + 2 * model.num_heads * model.head_dim
    layer = 8 * counted.rows * widths * counted.itemsize + 4 * 2 * model.mlp_dim * model.embed_dim
    return 2 * memory_use.logits_bytes(counted) + memory_use.lora_bytes(counted) + layer


def check_nothing_is_whole(counted, text):
    """No copy of a stack's codes, no stack of dequantized weights, and no logits beyond one chunk of tokens."""
    model, layers = counted.model, counted.model.num_layers
    smallest = layers * min(n * k for _, (n, k) in counted.shapes())
    kept = set(activation_bytes(counted))
    for kind in computed(text):
        sizes = shape_of(kind)
        if sizes[:1] == [layers]:
            assert not kind.startswith("u8") or math.prod(sizes) < smallest // 2, kind
            assert sizes[1:] not in [[n, k] for _, (n, k) in counted.shapes()], (kind, kept)
        chunk = flops.head_tile(counted).tokens
        if re.match(r"f32|bf16", kind) and model.vocab_size in sizes and model.embed_dim not in sizes:
            assert nbytes(kind) <= 4 * chunk * model.vocab_size, kind


@pytest.mark.slow
@needs_compiler
def test_the_step_of_smollm2_compiles_for_an_h100():
    counted, gradients, update, abstract = compile_both("smollm2-135m", "h100", (1, 1, 128))
    check_counts(counted, gradients, update, abstract)
    check_nothing_is_whole(counted, gradients.text)
    assert gradients.fits


@needs_compiler
@pytest.mark.slow
@pytest.mark.exhaustive
def test_products_run_on_tensor_cores_without_spilling_much():
    gradients = compile_both("smollm2-135m", "h100", (1, 1, 128))[1]  # reading all machine code takes a minute
    assert gradients.tensor_core_instructions > 0
    assert len(gradients.spilled) < len(gradients.kernels) / 10


@needs_compiler
@pytest.mark.parametrize(
    ("card", "name", "batch", "remat"),
    some_in_ci(
        [(card, *step) for step in STEPS for card in FIVE],
        lambda i: i % len(FIVE) == i // len(FIVE) + 1 < 3,  # the H100 has a separate test
    ),
)
def test_steps_of_real_models_compile_for_every_card(card, name, batch, remat):
    counted, gradients, update, abstract = compile_both(name, card, batch, remat)
    check_counts(counted, gradients, update, abstract)
    check_nothing_is_whole(counted, gradients.text)
    assert gradients.fits and update.fits


@needs_compiler
@pytest.mark.slow
@pytest.mark.exhaustive
def test_65b_is_larger_than_a_4090_and_that_is_told():
    assert CARDS["rtx4090"].memory_bytes < 32 * 2**30
    gradients = compile_both("llama-65b", "rtx4090", (1, 1, 512), "full", rank=64)[1]
    assert not gradients.fits
    with pytest.raises(ValueError, match=r"NVIDIA GeForce RTX 4090 has 23.55 GiB"):
        gradients.check_fits()
