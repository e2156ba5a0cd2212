"""The machine code of the kernel for few rows: instructions per weight, vector loads, and bytes in flight."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.formats.tables import CODE_TABLES
from pallas_kernels.gpu_specs import CARDS
from pallas_kernels.nf4_matmul.mosaic import skinny_instructions
from pallas_kernels.nf4_matmul.mosaic.operands import Operands
from pallas_kernels.nf4_matmul.mosaic.skinny import BLOCK, Machine, product
from tests.marks import EXHAUSTIVE

Abstract = jax.ShapeDtypeStruct
BF16, F16 = jnp.bfloat16, jnp.float16
SLOW = pytest.mark.slow
OF_CI, OTHERS = ("a6000", "rtx4090", "rtx5090"), ("l40s", "gb10", "b200")  # an L40S runs what an RTX 4090 does
CARDS_HERE = (
    "h100",
    "a100",
    *(pytest.param(card, marks=SLOW) for card in OF_CI),
    *(pytest.param(card, marks=EXHAUSTIVE) for card in OTHERS),
)
WEIGHTS_OF_A_THREAD = BLOCK * 512 // 128  # in one step of the loop
REGISTERS = 65536


@functools.cache
def compile_product(compile_for, card, rows, shape, dtype):
    n, k = shape
    groups = -(-k // 128)
    table = CODE_TABLES["nf4"]

    def run(x, codes, layer, scales):
        return product(Machine(dtype, table), x, Operands(codes, layer, scales, table, shape))

    codes, layer = Abstract((4, n, 64 * groups), jnp.uint8), Abstract((1,), jnp.int32)
    compiled = compile_for(card, run, Abstract((rows, k), dtype), codes, layer, Abstract((2 * groups, n), dtype))
    assert not compiled.spilled and not compiled.exceeding_shared_memory
    (kernel,) = (kernel for kernel in compiled.kernels if kernel.tensor_core_instructions)
    return kernel, compiled


@pytest.mark.parametrize("card", CARDS_HERE)
@pytest.mark.parametrize(
    ("rows", "most"), [(1, 3.5), pytest.param(2, 3.5, marks=SLOW), pytest.param(7, 3.5, marks=SLOW), (16, 4.0)]
)
@pytest.mark.parametrize("dtype", [BF16, pytest.param(F16, marks=SLOW)])
def test_instructions_for_a_weight_are_few(compile_for, card, rows, most, dtype):
    kernel, _ = compile_product(compile_for, card, rows, (4096, 14336), dtype)
    (loop,) = kernel.loops
    assert loop.instructions / WEIGHTS_OF_A_THREAD <= most
    tiles = 2 if rows > 8 else 1
    # Products of 16 x 8 x 16: two pairs of rows, two runs, four steps of K.
    assert loop.opcodes["HMMA"] == 16 * tiles
    # 16 bytes of codes of each of four rows, two for the values of a run, one for its scales.
    assert loop.opcodes["LDG"] + loop.opcodes["LD"] == 4 + 2 * (2 * tiles + 1)


@pytest.mark.parametrize("card", CARDS_HERE)
@pytest.mark.parametrize("rows", [1, 16])
def test_bytes_in_flight_cover_latency_times_bandwidth(compile_for, card, rows):
    """A thread has 64 bytes in flight, the codes of its next step; registers and shared memory limit threads per SM."""
    kernel, _ = compile_product(compile_for, card, rows, (4096, 14336), BF16)
    spec = CARDS[card]
    blocks = min(REGISTERS // (128 * kernel.registers), spec.shared_memory_per_sm // (kernel.shared_bytes + 1024))
    in_flight = blocks * 128 * 64 * spec.sm_count
    # A B200 holds too few threads for its bandwidth: 0.79 and 0.53 of it, if latency is that of an H100.
    share = {("b200", 1): 0.79, ("b200", 16): 0.52}.get((card, rows), 1)
    assert in_flight >= share * spec.bandwidth * 0.6e-6


@pytest.mark.parametrize("shape", [(64, 64), pytest.param((192, 320), marks=SLOW)])
def test_weights_of_less_than_a_step_compile(compile_for, shape):
    compile_product(compile_for, "h100", 3, shape, BF16)


@pytest.mark.parametrize("card", ["h100", pytest.param("a100", marks=SLOW)])
def test_nothing_but_sums_is_written(compile_for, card):
    _, compiled = compile_product(compile_for, card, 8, (4096, 4096), BF16)
    parts = 4
    assert compiled.memory.device.temporaries <= parts * 8 * 4096 * 4 + 2 * 8 * 4096 + 4096


def test_warps_wait_before_they_read_each_others_sums(compile_for, monkeypatch):
    """The kernel's only wait is not in the twin, where a warpgroup is one thread.

    Without it, Mosaic's own barriers follow the reads.
    """

    def barriers():
        kernel, _ = compile_product.__wrapped__(compile_for, "a100", 16, (64, 512), BF16)
        return kernel.opcodes["BAR"]

    def show_and_go_on(ctx, sums, target):
        sums.store_untiled(target, optimized=False)

    right = barriers()
    monkeypatch.setattr(skinny_instructions, "_show", show_and_go_on)
    assert right - barriers() == 2  # tiles of eight rows
