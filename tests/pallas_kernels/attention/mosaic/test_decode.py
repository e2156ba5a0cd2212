"""Attention of one token per row over pages: the interpreted twin, the registers of 128 threads, and broken copies."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # has the race detector's result

from pallas_kernels.attention import gpu
from pallas_kernels.attention.mosaic import decode, decode_registers
from pallas_kernels.attention.mosaic.capabilities import HEAD_DIMS
from pallas_kernels.attention.mosaic.decode_instructions import Interpreted
from pallas_kernels.attention.mosaic.decode_registers import COLUMNS, OF_SCORES, ROWS, WARPS, Alu, Layouts, Tile
from pallas_kernels.attention.pages import PAGE
from pallas_kernels.attention.tiles import ScoreScaling
from tests.marks import some_in_ci
from tests.pallas_kernels.attention.loops import DETECTING
from tests.pallas_kernels.attention.paged import LAYER, SCALE, call
from tests.pallas_kernels.mosaic.registers import threads
from tests.pallas_kernels.nf4_matmul import ptx

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
EXACT = 2e-6  # in f32, which only the twin takes
TOLERANCES = {F32: EXACT, BF16: 2 * 2**-8, F16: 2 * 2**-11}  # weights and the result are rounded


@pytest.fixture(autouse=True)
def _twin(monkeypatch):
    monkeypatch.setattr(gpu, "decoding_instructions", lambda: lambda tile: Interpreted(tile, DETECTING))


@pytest.fixture
def no_race():
    yield
    races = interpret_pallas_call.get_races().races_found
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    assert not races


def attend(one, rows=None, window=None, softcap=None, sinks_N=None):
    rows = jnp.arange(len(one.positions)) if rows is None else rows
    positions, scores = jnp.asarray(one.positions), ScoreScaling(SCALE, softcap)
    run = functools.partial(gpu.paged_attention, window=window, scores=scores, sinks_N=sinks_N)
    found = jax.jit(run)(one.q[:, None], one.pages, LAYER, rows[:, None], positions[:, None])
    return np.asarray(found[:, 0], np.float64)


def error(one, **how):
    right = one.plain(**how)
    return np.abs(attend(one, **how) - right).max() / np.abs(right).max()


# Two splits and empty rows; more heads than a program has; every head dim.
CASES = [
    ((33, 0, -1), 4, 2, F32, 64, False, {"window": 20, "softcap": 0.7}),
    ((570,), 1, 1, F32, 80, True, {"sinks": True}),
    ((100, 7), 20, 1, BF16, 128, False, {"window": 70}),
    ((100,), 10, 1, BF16, 256, True, {}),
    ((70,), 12, 1, F16, 96, True, {"sinks": True, "window": 65}),
    ((600, 1100), 2, 1, F32, 64, False, {"window": 550, "sinks": True}),
]


@pytest.mark.parametrize(
    ("positions", "heads", "kv_heads", "dtype", "head_dim", "coded", "how"),
    [CASES[0], *some_in_ci(CASES[1:], lambda i: i in (0, 1))],
)
def test_equals_the_definition(no_race, positions, heads, kv_heads, dtype, head_dim, coded, how):
    how = dict(how)
    if how.pop("sinks", False):
        how["sinks_N"] = jnp.linspace(0, 3, heads)
    one = call(positions, heads, kv_heads, head_dim, dtype, coded=coded)
    assert error(one, **how) < TOLERANCES[dtype]


@pytest.mark.slow
def test_codes_of_small_numbers_do_not_vanish_in_float16():
    """Scales of 1e-5 times weights below one are beyond float16; the twin rounds as the kernel does."""
    one = call((40,), 1, 1, 64, F16, coded=True, size=1e-3)
    assert error(one) < TOLERANCES[F16]


@pytest.mark.slow
def test_a_window_that_is_traced():
    one = call((70,), 1, 1, 64)
    for window in (3, 200):
        np.testing.assert_allclose(attend(one, window=jnp.int32(window)), one.plain(window=window), atol=EXACT)


def test_a_row_depends_on_nothing_else_to_the_bit():
    """Alone, in another row of another table, with other numbers of pages: same bits."""
    together = call((40, 520), 1, 1, 64)
    found = attend(together)
    table = np.asarray(together.pages.pages_LRI)
    moved = np.random.default_rng(1).permutation(len(together.pages.k))  # page p moves to moved[p]
    back = np.argsort(moved)
    pages = dataclasses.replace(
        together.pages,
        k=together.pages.k[back],
        v=together.pages.v[back],
        pages_LRI=jnp.asarray(moved[table][:, [1, 0]], jnp.int32),
    )
    alone = together._replace(q=together.q[1:2], pages=pages, positions=(520,))
    np.testing.assert_array_equal(attend(alone, rows=jnp.asarray([0])), found[1:2])
    longer = together._replace(
        pages=dataclasses.replace(
            together.pages, pages_LRI=jnp.pad(together.pages.pages_LRI, ((0, 0), (0, 0), (0, 20)))
        )
    )
    np.testing.assert_array_equal(attend(longer), found)


# Broken copies


def caught(twin=Interpreted):
    """True if a broken kernel is detected: by its values, by a race, or by an unfinished operation."""
    one = call((540, 100), 2, 1, 64, coded=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "decoding_instructions", lambda: lambda tile: twin(tile, DETECTING))
        try:
            return not error(one, window=520) < 20 * EXACT or interpret_pallas_call.get_races().races_found
        except jax.errors.JaxRuntimeError as failed:
            assert re.search("RACE DETECTED|before kernel finished|no threads observed phase", str(failed))
            return True
        finally:
            interpret_pallas_call.reset_gpu_interpret_mode_state()


def _one_step_behind(right):
    return lambda pages, step: right(pages, jnp.maximum(step - 1, 0))


def _of_one_split(right):
    def splits(seen, row):
        start, count = right(seen, row)
        return start, jnp.minimum(count, 1)

    return splits


def _one_position_more(right):
    def interval(seen, row):
        first, last = right(seen, row)
        return jnp.maximum(first - 1, 0), last

    return interval


BROKEN = [
    (decode._Pages, "numbers", _one_step_behind),
    (Interpreted, "scaled", lambda right: lambda self, tile, scales: tile),
    (decode.Seen, "splits", _of_one_split),
    (decode.Seen, "interval", _one_position_more),
    (decode, "_is_seen", lambda right: lambda do, *place: do.indices(0) >= 0),
    (decode._Part, "plus", lambda right: lambda part, other: other),
]


@pytest.mark.slow
def test_the_unbroken_kernel_is_not_caught():
    assert not caught()


@pytest.mark.parametrize(("owner", "name", "broken"), some_in_ci(BROKEN, lambda i: i in (0, 2, 5)))
def test_a_wrong_page_scale_split_window_mask_and_sum_are_caught(monkeypatch, owner, name, broken):
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    assert caught()


# Registers: the products of a step on arrays over 128 threads, with mma.sync as the manual defines it


def multiply(first, second, sums):
    """mma.sync.m16n8k16 of four warps; words are [128, 2], sums four of [128]."""
    g, t = np.arange(32) // 4, np.arange(32) % 4
    result = [one + np.zeros(128, np.int64) for one in sums]
    for warp in range(WARPS):
        lanes = slice(32 * warp, 32 * warp + 32)
        a, b = np.zeros((16, 16), np.int64), np.zeros((16, 8), np.int64)
        for half in range(2):
            for word, (row, column) in zip(first, [(0, 0), (8, 0), (0, 8), (8, 8)], strict=True):
                a[g + row, 2 * t + column + half] = word[lanes, half]
            for word, row in zip(second, (0, 8), strict=True):
                b[2 * t + row + half, g] = word[lanes, half]
        for at in range(4):
            result[at][lanes] += (a @ b)[g + 8 * (at // 2), 2 * t + at % 2]
    return result


def _of_columns(of_row):
    lanes = np.arange(128) // 32 * 32 + np.arange(128) % 4 * 8
    return [of_row[lanes], of_row[lanes + 4]]


ALU = Alu(
    words=lambda register: np.split(register, register.shape[1] // 2, axis=1),
    no_word=np.zeros((128, 2), np.int64),
    no_number=np.int64(0),
    multiply=multiply,
    number=lambda register, at: register[:, at],
    pair=lambda numbers: np.stack(list(numbers), axis=1),
    times=np.multiply,
    transposed=lambda even, odd: [np.stack([even[:, at], odd[:, at]], axis=1) for at in range(2)],
    mask=lambda even, odd: np.stack([even, odd], axis=1),
    hide=np.bitwise_and,
    of_columns=_of_columns,
)
CROSSED = ALU._replace(transposed=lambda *words: ALU.transposed(*words)[::-1])
SWAPPED = ALU._replace(of_columns=lambda of_row: _of_columns(of_row)[::-1])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("heads", "stored"), [(8, "bfloat16"), (16, "bfloat16"), (8, "int8")])
@pytest.mark.parametrize("alu", [ALU, CROSSED, SWAPPED], ids=["right", "crossed", "swapped"])
def test_threads_compute_what_the_twin_computes(head_dim, heads, stored, alu):
    tile = Tile(head_dim, heads, np.dtype(F32), jnp.dtype(stored))
    of, rng, twin = Layouts.of(tile), np.random.default_rng(0), Interpreted(tile, DETECTING)
    q, k, v = (rng.integers(-9, 9, shape) for shape in ((heads, head_dim), (2, PAGE, head_dim), (2, PAGE, head_dim)))
    fade, weights = rng.integers(0, 9, (WARPS, 16)), rng.integers(0, 9, (ROWS, COLUMNS))
    fade[:, heads:] = 0
    seen = np.repeat(-rng.integers(0, 2, (WARPS, 1, COLUMNS)), 16, axis=1).reshape(ROWS, COLUMNS)
    sums = rng.integers(-9, 9, (WARPS * head_dim, heads))
    loads = head_dim // (4 * tile.vector(4))
    scores = decode_registers.scores_of(
        threads(q, of.queries).reshape(heads // 8, loads), [threads(page, of.keys).reshape(loads) for page in k], alu
    )
    found = decode_registers.sums_of(
        threads(sums, of.sums).reshape(heads // 8, -1, tile.vector(8)),
        threads(fade.reshape(ROWS, 1), OF_SCORES_OF_ROWS).reshape(2),
        *(threads(one, OF_SCORES).reshape(2, 2) for one in (weights, seen)),
        [threads(page, of.values).reshape(-1, 2) for page in v],
        alu,
    )
    floats = functools.partial(jnp.asarray, dtype=F32)
    right = np.asarray(twin.scores(floats(q), list(floats(k))), np.int64)
    assert same(scores, threads(right, OF_SCORES))
    new = twin.add(floats(sums), floats(fade.reshape(ROWS)), floats(weights), list(floats(v)), jnp.asarray(seen))
    assert same(found, threads(np.asarray(new, np.int64), of.sums)) == (alu is ALU)


class OF_SCORES_OF_ROWS:
    """The layout of one number per row of scores, [64, 1]: registers (block of eight heads)."""

    tiling = decode_registers.Tiling(((ROWS, 1), (16, 1), (8, 1), (1, 1)))
    warp_dims, vector_dim = (-8,), -1
    lane_dims = (-4, decode_registers.Replicated(4))


def same(mine, theirs):
    pairs = zip(mine.reshape(-1), theirs.reshape(-1), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


def _fma(dtype):
    def of_halves(a, b, c):
        a, b, c = (x.view(np.uint16).view(jnp.dtype(dtype)).astype(np.float64) for x in (a, b, c))
        return (a * b + c).astype(jnp.dtype(dtype)).view(np.uint32)

    return of_halves


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_assembly_makes_numbers_of_every_pair_of_bytes(monkeypatch, dtype):
    ones = {"float16": 0x3C003C00}
    more = {
        "mov.b32": lambda a: a,
        "xor.b32": np.bitwise_xor,
        "fma.rn.bf16x2": _fma("bfloat16"),
        "sub.f16x2": lambda a, b: _fma("float16")(a, np.full_like(a, ones["float16"]), b ^ np.uint32(0x80008000)),
    }
    monkeypatch.setattr(ptx, "INSTRUCTIONS", ptx.INSTRUCTIONS | more)
    halves = np.arange(65536, dtype=np.uint32)
    words = np.concatenate([halves | halves[::-1] << 16, halves << 16 | 0xA5C3])
    codes = words.view(np.int8).reshape(-1, 4)
    for half in range(2):
        (found,) = ptx.run(decode_registers.from_bytes_ptx(jnp.dtype(dtype), half), [words], 1)
        numbers = found.view(np.uint16).view(jnp.dtype(dtype)).astype(np.float64).reshape(-1, 2)
        np.testing.assert_array_equal(numbers, codes[:, 2 * half : 2 * half + 2])
