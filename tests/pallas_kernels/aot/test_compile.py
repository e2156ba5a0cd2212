"""compile_for with the extra gpu-compile installed: its arguments, and the numbers that it returns."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from pallas_kernels.aot import on_host
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.gpu_specs import CARDS

F32, BF16 = jnp.float32, jnp.bfloat16
Abstract = jax.ShapeDtypeStruct
MATRIX = Abstract((1024, 1024), BF16)
HOST = "pinned_host"
MATRIX_BYTES = 2 * 1024 * 1024


def product(x, w):
    return jnp.tanh(x @ w)


FIRST = ("h100", "a100")


@pytest.mark.parametrize(
    "card", [*FIRST, *(pytest.param(card, marks=pytest.mark.slow) for card in CARDS if card not in (*FIRST, "t4"))]
)
def test_every_card_gets_its_own_code_with_tensor_core_products(compile_for, card):
    compiled = compile_for(card, product, MATRIX, MATRIX)
    assert compiled.card is CARDS[card]
    assert compiled.tensor_core_instructions > 0
    generation = {9: "HGMMA", 10: "UTCHMMA"}.get(CARDS[card].compute_capability[0], "HMMA")
    opcodes = set().union(*(kernel.opcodes for kernel in compiled.kernels))
    assert opcodes & {generation, "HMMA"}  # a small product may not use the newest instruction
    assert not opcodes & {"HGMMA", "UTCHMMA"} - {generation}


@pytest.mark.slow
def test_a_t4_gets_library_products_because_xla_has_no_kernels_for_its_tensor_cores(compile_for):
    half = Abstract(MATRIX.shape, jnp.float16)
    compiled = compile_for("t4", product, half, half)
    assert compiled.tensor_core_instructions == 0 and compiled.kernels[0].architecture == "sm_75"
    assert re.search(r'f16\[1024,1024\].* custom_call_target="__cublas', compiled.text)
    assert re.search(
        r'f32\[1024,1024\].* custom_call_target="__cublas', compile_for("t4", product, MATRIX, MATRIX).text
    )


def test_kernels_have_registers_shared_memory_and_a_main_loop(compile_for):
    kernels = compile_for("a100", product, MATRIX, MATRIX).kernels
    (gemm,) = [kernel for kernel in kernels if kernel.tensor_core_instructions]
    assert 16 <= gemm.registers <= 255
    assert 1024 <= gemm.shared_bytes <= CARDS["a100"].shared_memory_per_block
    assert gemm.stack_bytes == 0
    (loop,) = gemm.loops
    assert 10 < loop.instructions < sum(gemm.opcodes.values())
    assert loop.opcodes["HMMA"] > 0


@pytest.mark.parametrize(("columns", "spills"), [(64, False), (256, True)])
def test_a_kernel_that_holds_too_much_in_registers_is_told(compile_for, columns, spills):
    def kernel(x_ref, o_ref):  # 128 threads hold 128 rows of f32: one register per column, and as many for exp(x)
        y = jnp.exp(x_ref[...])
        o_ref[...] = y / jnp.sum(y)

    x = Abstract((128, columns), F32)
    compiled = compile_for("a100", lambda value: plgpu.kernel(kernel, out_type=x)(value), x)
    assert bool(compiled.spilled) == spills
    assert [kernel.stack_bytes > 0 for kernel in compiled.kernels] == [spills]


def test_the_same_jitted_function_is_traced_again_for_another_card(compile_for):
    seen = []

    @jax.jit
    def inner(x):
        seen.append(jax.config.jax_default_device.compute_capability)
        return x + 1

    @jax.jit
    def outer(x):
        return inner(x) * 2

    for card in ("h100", "a100", "h100"):
        compile_for(card, outer, MATRIX)
    assert seen == ["9.0", "8.0"]


def test_bytes_by_kind(compile_for):
    used = compile_for("a6000", lambda x, w: (x @ w, x + w), MATRIX, MATRIX).memory
    assert used.device.arguments == 2 * MATRIX_BYTES
    assert 2 * MATRIX_BYTES <= used.device.outputs <= 2 * MATRIX_BYTES + 64  # and a table of pointers
    assert used.device.aliases == 0
    assert used.host_total == 0
    parts = used.device
    assert used.device_total == parts.arguments + parts.outputs - parts.aliases + parts.temporaries


def test_donated_arguments_count_once(compile_for):
    def add(x, w):
        return x + w

    kept = compile_for("a6000", add, MATRIX, MATRIX).memory
    donated = compile_for("a6000", add, MATRIX, MATRIX, donate_argnums=0).memory
    assert donated.device.aliases == MATRIX_BYTES
    assert kept.device_total - donated.device_total == MATRIX_BYTES
    jitted = compile_for("a6000", jax.jit(add, donate_argnums=0), MATRIX, MATRIX).memory
    assert jitted == donated


def test_arguments_are_pytrees_keys_numbers_and_arrays(compile_for):
    weight = QTensor(
        codes=Abstract((256, 128), jnp.uint8),
        absmax=Abstract((256, 4), F32),
        quant_type="nf4",
        block_size=64,
        nested_block_size=256,
        shape=(256, 256),
        dtype="bfloat16",
        layout="bnb",
    )

    def f(tree, weight, key, scale, real):
        noise = jax.random.normal(key, (256,))
        return noise * scale + weight.absmax.sum() + weight.codes.astype(F32).sum() + tree["b"] + real

    key = jax.eval_shape(lambda: jax.random.key(0))
    real = np.ones(256, np.float32)
    used = compile_for("l40s", f, {"b": Abstract((256,), F32)}, weight, key, 2.0, real).memory
    assert used.device.arguments == 1024 + (256 * 128 + 256 * 4 * 4) + 8 + 4 + 1024


@functools.partial(jax.jit, static_argnames="times", static_argnums=1)
def static_both_ways(x, mode, *, times):
    return {"tanh": jnp.tanh, "exp": jnp.exp}[mode](x) * times


def test_static_arguments(compile_for):
    assert "tanh" in compile_for("a100", static_both_ways, MATRIX, "tanh", times=3).text
    assert "exponential" in compile_for("a100", static_both_ways, MATRIX, "exp", times=3).text
    plain = compile_for("a100", lambda n, x: x.reshape(n, -1), 256, MATRIX, static_argnums=0)
    assert "bf16[256,4096]" in plain.text


def test_options_for_a_jitted_function_are_refused(compile_for):
    with pytest.raises(ValueError, match=r"jitted already: donate_argnums=0 and static_argnums=\(\) belong in its own"):
        compile_for("a100", jax.jit(product), MATRIX, MATRIX, donate_argnums=0)


def test_an_unknown_card_is_refused_before_anything_is_compiled(compile_for):
    with pytest.raises(ValueError, match="Did you mean 'a100'"):
        compile_for("A100", product, MATRIX, MATRIX)


def test_the_largest_temporaries_are_named(compile_for):
    def f(x, w):
        return ((x @ w).astype(F32) @ (w @ x).astype(F32)).sum()

    compiled = compile_for("a100", f, MATRIX, MATRIX)
    largest = compiled.largest_temporaries(2)
    assert len(largest) == 2
    assert largest[0].bytes >= largest[1].bytes >= MATRIX_BYTES
    assert largest[0].memory == "device"
    assert "1024,1024" in largest[0].shape
    assert "dot_general" in largest[0].operation or "convert" in largest[0].operation
    assert largest[0].bytes <= compiled.memory.device.temporaries


def test_activations_that_a_policy_offloads_are_temporaries_of_the_host(compile_for):
    def layer(h, w):
        return jnp.tanh(checkpoint_name(h, "h") @ w)

    def gradient(policy, w, x):
        step = jax.checkpoint(layer, policy=policy)
        return jax.grad(lambda w: jax.lax.scan(lambda h, w: (step(h, w), None), x, w)[0].astype(F32).sum())(w)

    policies = jax.checkpoint_policies
    offloaded = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["h"], offload_src="device", offload_dst=HOST
    )
    stack = Abstract((16, 1024, 1024), BF16)
    on_card = compile_for("a6000", functools.partial(gradient, policies.save_only_these_names("h")), stack, MATRIX)
    moved = compile_for("a6000", functools.partial(gradient, offloaded), stack, MATRIX)
    assert on_card.memory.host_total == 0
    assert moved.memory.host.temporaries >= 16 * MATRIX_BYTES
    assert on_card.memory.device.temporaries - moved.memory.device.temporaries > 8 * MATRIX_BYTES
    assert any(temporary.memory == "host" for temporary in moved.largest_temporaries())


def test_arguments_and_results_in_host_memory(compile_for, offload):
    used = compile_for("h100", offload, Abstract((1024, 1024), F32), on_host(Abstract((1024, 1024), F32))).memory
    assert used.host.arguments == used.host.outputs == 4 << 20
    assert used.device.arguments == 4 << 20


def test_out_shardings_of_a_jitted_function_put_a_result_into_host_memory(compile_for):
    anywhere = AbstractMesh((1,), ("device",), (AxisType.Auto,))
    kinds = [NamedSharding(anywhere, PartitionSpec(), memory_kind=kind) for kind in ("device", HOST)]
    jitted = jax.jit(lambda x, w: (x + w, x - w), out_shardings=tuple(kinds))
    used = compile_for("h100", jitted, MATRIX, MATRIX).memory
    assert used.host.outputs == MATRIX_BYTES


def test_a_donated_argument_in_host_memory_is_updated_in_place(compile_for, offload):
    args = (Abstract((1024, 1024), F32), on_host(Abstract((1024, 1024), F32)))
    used = compile_for("h100", offload, *args, donate_argnums=(0, 1)).memory
    assert used.host.aliases == used.host_total == 4 << 20
    assert used.device.aliases == 4 << 20


def test_on_host_takes_pytrees_and_an_unused_one_is_no_error(compile_for, offload):
    tree = on_host({"m": Abstract((8, 128), F32), "unused": Abstract((), jnp.int32), "count": 3})
    assert tree["count"] == 3
    used = compile_for("a100", lambda x, tree: offload(x, tree["m"]), Abstract((8, 128), F32), tree).memory
    assert used.host.arguments == used.host.outputs == 8 * 128 * 4


def test_nothing_on_the_card_is_refused(compile_for):
    with pytest.raises(ValueError, match="all array arguments are on_host"):
        compile_for("a100", lambda m: m, on_host(MATRIX))


def test_compiler_options_reach_the_compiler(compile_for):
    """A product is a library's instead of XLA's own, by the jitted function's option or the caller's."""
    option = {"xla_gpu_enable_triton_gemm": False}
    programs = [
        compile_for("a100", product, MATRIX, MATRIX),
        compile_for("a100", jax.jit(product, compiler_options=option), MATRIX, MATRIX),
        compile_for("a100", product, MATRIX, MATRIX, compiler_options=option),
    ]
    assert ["__cublas" in program.text for program in programs] == [False, True, True]
