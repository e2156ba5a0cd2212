"""The machine code of the decoding kernel: registers, spills, loads, products, and why memory bounds it."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import paged_attention
from pallas_kernels.attention.mosaic import decode_instructions
from pallas_kernels.attention.mosaic.decode import STEP, tile_of
from pallas_kernels.attention.mosaic.decode_registers import EIGHT
from pallas_kernels.attention.pages import PAGE, KVPages
from pallas_kernels.gpu_specs import CARDS
from tests.marks import some_in_ci

Abstract = jax.ShapeDtypeStruct
BF16, F16, INT8 = jnp.bfloat16, jnp.float16, jnp.int8
EIGHT_CARDS = ("a100", "rtx4090", "h100", "rtx5090", "a6000", "rtx3090", "l40s", "b200")
ROWS, KV_HEADS, LAYERS, BLOCKS = 8, 8, 2, 64
REGISTERS = 65536  # one SM has so many


@functools.cache
def compile_decoding(compile_for, card, group, head_dim, dtype, stored):
    """Compiles a call with a traced window, a soft cap at wide heads, and sinks; returns its kernels by name."""
    heads, count = group * KV_HEADS, 1 + ROWS * BLOCKS
    numbers, scales = (
        Abstract((count, KV_HEADS, PAGE, head_dim), stored),
        Abstract((count, KV_HEADS, PAGE), jnp.float32),
    )
    scales = scales if stored == INT8 else None
    table = Abstract((LAYERS, ROWS, BLOCKS), jnp.int32)
    pages = KVPages(k=numbers, v=numbers, k_scale=scales, v_scale=scales, pages_LRI=table)
    softcap = 30.0 if head_dim == 256 else None

    def run(q, pages, layer, rows, positions, window, sinks_N):
        how = {"window": window, "softcap": softcap, "sinks_N": sinks_N}
        return paged_attention(q, pages, layer, rows, positions, head_dim**-0.5, **how)

    one, of_rows = Abstract((), jnp.int32), Abstract((ROWS, 1), jnp.int32)
    q, sinks_N = Abstract((ROWS, 1, heads, head_dim), dtype), Abstract((heads,), dtype)
    compiled = compile_for(card, run, q, pages, one, of_rows, of_rows, one, sinks_N)
    assert not compiled.exceeding_shared_memory
    found = {kernel.name.removesuffix("_mosaic_gpu_kernel"): kernel for kernel in compiled.kernels}
    return {name: kernel for name, kernel in found.items() if name.startswith("attention_")}


CASES = [
    *((card, 4, 128, BF16, stored) for card in EIGHT_CARDS for stored in (INT8, BF16)),
    *((card, 4, 256, BF16, stored) for card in EIGHT_CARDS for stored in (BF16, INT8)),
    *((card, 16, 128, F16, stored) for card in ("a100", "h100", "rtx5090", "b200") for stored in (F16, INT8)),
    *((card, 7, dim, F16, stored) for card in ("a100", "rtx5090") for dim in (64, 80, 96) for stored in (F16, INT8)),
    *((card, 1, dim, BF16, INT8) for card in ("rtx4090", "h100") for dim in (64, 80, 96)),
]


def numbers_in_a_step(head_dim, dtype, stored, group):
    """Returns (products of 16 x 8 x 16, loads of a thread) of two pages, for each warp."""
    tile = tile_of(group, head_dim, dtype, stored)
    blocks = tile.heads // EIGHT
    products = 2 * head_dim // 16 + blocks * head_dim // 16
    loads = 2 * head_dim // (4 * tile.vector(4)) + 4 * head_dim // (EIGHT * tile.vector(EIGHT))
    return products, loads + (4 if stored == INT8 else 0)


@pytest.mark.parametrize(("card", "group", "head_dim", "dtype", "stored"), some_in_ci(CASES, lambda i: i in (0, 16)))
def test_the_kernels_are_lean_machine_code(compile_for, card, group, head_dim, dtype, stored):
    kernels = compile_decoding(compile_for, card, group, head_dim, dtype, stored)
    assert kernels.keys() == {"attention_decode", "attention_decode_merge"}
    assert all(kernel.registers <= 255 and kernel.stack_bytes == 0 for kernel in kernels.values())
    loop = kernels["attention_decode"].loops[0]
    products, loads = numbers_in_a_step(head_dim, dtype, stored, group)
    assert loop.opcodes["HMMA"] == products
    assert loads <= loop.opcodes["LDG"] + loop.opcodes["LD"] <= loads + 2  # and two pages' numbers


@pytest.mark.parametrize(
    ("card", "stored"), some_in_ci([(c, s) for c in EIGHT_CARDS for s in (INT8, BF16)], lambda i: i < 2)
)
def test_memory_bounds_the_kernel(compile_for, card, stored):
    """An SM issues a step's instructions before its bytes arrive, and enough bytes are in flight."""
    kernel = compile_decoding(compile_for, card, 4, 128, BF16, stored)["attention_decode"]
    spec, bytes_of_step = CARDS[card], 2 * STEP * 128 * jnp.dtype(stored).itemsize
    cycles = bytes_of_step / (spec.bandwidth / spec.sm_count / spec.clock_ghz / 1e9)
    # Four warps on four schedulers. With codes, those of a B200 are 2 % slower than its memory.
    assert kernel.loops[0].instructions < cycles * (1.03 if (card, stored) == ("b200", INT8) else 1)
    blocks = REGISTERS // (128 * kernel.registers)
    assert blocks * bytes_of_step >= spec.bandwidth / spec.sm_count * 0.6e-6  # keys and values of one step per block


@pytest.mark.slow
def test_warps_wait_before_they_read_each_others_sums_and_before_they_overwrite_them(compile_for, monkeypatch):
    """The twin sees a warpgroup as one thread, so the race detector does not check these barriers."""

    def barriers():
        kernels = compile_decoding.__wrapped__(compile_for, "a100", 4, 64, BF16, BF16)
        return kernels["attention_decode"].opcodes["BAR"]

    right = barriers()
    monkeypatch.setattr(decode_instructions.Machine, "sync", lambda self: None)
    assert right - barriers() == 2
