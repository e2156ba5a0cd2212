"""The contract of attention for the interpreted kernels, with the race detector; broken copies must be detected."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # has the race detector's result
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import causal_attention, gpu
from pallas_kernels.attention.bounds import Bounds, Visible, mma_blocks
from pallas_kernels.attention.mosaic import backward, forward, mask
from pallas_kernels.attention.mosaic.instructions import Interpreted, Tma, Wgmma
from pallas_kernels.attention.tiles import ScoreScaling
from tests.marks import EXHAUSTIVE, some_in_ci
from tests.nn.trees import random_trees, visible_keys
from tests.pallas_kernels.attention import test_sinks as sinks
from tests.pallas_kernels.attention.loops import DETECTING, TWINS, using
from tests.pallas_kernels.attention.test_branching import branching_errors, rows_of_trees, spans_of
from tests.pallas_kernels.attention.test_contract import (
    ROUNDINGS,
    SCALE,
    _errors,
    _inputs,
    _largest_errors,
    _plain_value_and_gradients,
    _segments,
    _value_and_gradients,
    _visible,
)

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
EXACT = 5e-6  # in f32, which only the twin takes
TOLERANCES = {F32: EXACT, BF16: ROUNDINGS, F16: ROUNDINGS / 8}
IDS = ((40, 2, 60), (66, 1, 30))


MMA, WGMMA = TWINS


@pytest.fixture(autouse=True, scope="module", params=[MMA, pytest.param(WGMMA, marks=EXHAUSTIVE)])
def _twin(request):
    yield from using(request.param)


@pytest.fixture
def no_race():
    yield
    races = interpret_pallas_call.get_races().races_found
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    assert not races


# Whole and ragged lengths, head dims of each swizzle, grouped heads.
CASES = [
    (130, 4, 2, BF16, 64, {"window": 70}),
    (64, 3, 1, F32, 64, {}),
    (150, 2, 2, F16, 80, {"softcap": 0.7}),
    (100, 2, 1, BF16, 256, {"softcap": 0.7, "window": 33}),
    (1, 2, 1, BF16, 96, {}),
    (193, 2, 1, F32, 128, {"window": 1}),
    (130, 6, 2, F32, 64, {"window": 65, "softcap": 0.7}),
]


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "dtype", "head_dim", "features"),
    [CASES[0], *some_in_ci(CASES[1:], lambda i: i == 1)],
)
def test_equals_the_plain_softmax(no_race, length, heads, kv_heads, dtype, head_dim, features):
    errors = _errors(length, heads, kv_heads, dtype, 1, head_dim, **features)
    assert max(errors) < (2 if head_dim > 64 else 1) * TOLERANCES[dtype]


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 70])
def test_segments(no_race, window):
    assert max(_errors(150, 2, 1, head_dim=16, window=window, segments_BT=_segments(150, *IDS))) < EXACT


@pytest.mark.exhaustive
@pytest.mark.slow
def test_segments_in_any_order(no_race):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 150)), jnp.int32)
    assert max(_errors(150, 2, 2, head_dim=16, segments_BT=ids)) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize(("window", "softcap"), some_in_ci([(30, 0.7), (None, None)], lambda i: i == 0))
def test_branches(no_race, window, softcap):
    rows_B4T = rows_of_trees(3, 2, 150)
    assert max(branching_errors(_inputs(150, 2, 1), rows_B4T, window, softcap, is_traced=window is not None)) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("dtype", some_in_ci([(F32,), (BF16,)], lambda i: False))
def test_sinks(no_race, dtype):
    ids = _segments(130, (40, 2, 60), (66, 1, 30))
    errors = sinks._errors(sinks._drawn(130, 4, dtype, 64), _visible(130, 70, ids), window=70, segments_BT=ids)
    assert max(errors) < (EXACT if dtype == F32 else 2 * sinks.ROUNDINGS)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_sinks_far_above_and_below_the_scores(no_race):
    sinks.test_sinks_far_above_and_below_the_scores()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_large_scores_neither_overflow_nor_vanish(no_race):
    q, k, v, cotangent = _inputs(130, 2, 2, 1)
    found = _value_and_gradients(lambda *qkv: causal_attention(*qkv, SCALE), 100 * q, k, v, cotangent)
    right = _plain_value_and_gradients(100 * q, k, v, cotangent, _visible(130), softcap=None)
    assert max(_largest_errors(found, right)) < 5e-4


def test_a_remat_policy_that_saves_the_named_residuals_computes_attention_once(monkeypatch):
    monkeypatch.setattr(gpu, "instructions", lambda dtype, kernels: {"mma": Tma, "wgmma": Wgmma}[kernels](dtype))
    q, k, v, _ = _inputs(70, 2, 1, head_dim=64, dtype=BF16)
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    loss = jax.checkpoint(lambda *qkv: jnp.sum(causal_attention(*qkv, SCALE).astype(F32)), policy=policy)
    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(q, k, v))
    assert jaxpr.count("name=attention_forward") == jaxpr.count("name=attention_dq") == 1


LENGTH = 150


@st.composite
def cases(draw):
    """Draws (rows of trees or None, segment ids or None, window)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    window = draw(st.integers(1, LENGTH + 10))
    kind = draw(st.sampled_from(["segments", "any order", "trees"]))
    if kind == "trees":
        return random_trees(rng, LENGTH)[None], None, window
    ids = rng.integers(0, draw(st.integers(1, 8)), (1, LENGTH))
    return None, jnp.asarray(np.sort(ids, axis=1) if kind == "segments" else ids, jnp.int32), window


@jax.jit
def _of_texts(inputs, texts, window, sinks_N):
    by_kind = {"spans" if isinstance(texts, tuple) else "segments_BT": texts}
    attention = functools.partial(causal_attention, scale=SCALE, window=window, softcap=2.0, **by_kind)
    value, vjp = jax.vjp(lambda q, k, v, sinks_N: attention(q, k, v, sinks_N=sinks_N), *inputs[:3], sinks_N)
    return value, *vjp(inputs[3])


@pytest.mark.slow
@pytest.mark.usefixtures("no_race")
@hypothesis.settings(
    max_examples=8,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    deadline=None,
    derandomize=True,
    database=None,
)
@hypothesis.given(cases())
def test_random_segments_trees_and_windows(case):
    trees, ids, window = case
    inputs = _inputs(LENGTH, 2, 1, 1)
    sinks_N = jnp.asarray([0.5, 3.0])
    texts = ids if trees is None else spans_of(trees)
    visible = _visible(LENGTH, window, ids) if trees is None else visible_keys(trees, window)
    found = _of_texts(inputs, texts, jnp.int32(window), sinks_N)
    right = sinks._plain_results(*inputs[:3], sinks_N, inputs[3], visible, softcap=2.0)
    assert max(_largest_errors(found, right)) < EXACT


# Broken copies: each changes one line of a kernel or of its twin


class WithoutWait(Interpreted):
    def wait(self, barrier):
        plgpu.commit_smem()


class WithoutFence(Interpreted):
    def wait(self, barrier):
        plgpu.barrier_wait(barrier)


class WithoutSync(Interpreted):
    def sync(self):
        pass


def _errors_of(kernel, do):
    """Returns the largest relative error of one kernel's results; of 192 positions, each query sees at most 100."""
    q, k, v, cotangent = inputs = _inputs(192, 2, 1, 1)
    blocks = mma_blocks(q.shape[3], capped=False)
    bounds = Bounds.of(Visible.of(1, 192, None, 100), blocks)
    scores = ScoreScaling(SCALE, None)
    value, *gradients = _plain_value_and_gradients(*inputs, _visible(192, 100)[:1], softcap=None)
    products = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, 2, axis=2)) * SCALE
    lse_BNT = jax.scipy.special.logsumexp(products, axis=-1, where=_visible(192, 100)) / np.log(2)
    mean_BNT = jnp.swapaxes(jnp.sum(value * cotangent, axis=3), 1, 2)
    of_dq = q, k, v, value, cotangent, lse_BNT, bounds, scores, do, blocks.dq
    of_dkv = q, k, v, cotangent, lse_BNT, mean_BNT, bounds, scores, do, blocks.dkv
    runs = {
        "forward": lambda: (forward.forward(q, k, v, bounds, None, scores, do, blocks.forward)[:1], [value]),
        "dq": lambda: (backward.dq(*of_dq)[:1], gradients[:1]),
        "dkv": lambda: (backward.dkv(*of_dkv), gradients[1:]),
    }
    return _largest_errors(*runs[kernel]())


def caught(kernel, twin=Interpreted):
    """True if a broken kernel is detected: by its values, by a race, or by an unfinished operation."""
    try:
        errors = _errors_of(kernel, twin(F32, DETECTING))
        return not max(errors) < 100 * EXACT or interpret_pallas_call.get_races().races_found
    except jax.errors.JaxRuntimeError as failed:
        assert re.search("RACE DETECTED|before kernel finished|no threads observed phase", str(failed))
        return True
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()


KERNELS = ("forward", "dq", "dkv")


@pytest.mark.parametrize("kernel", some_in_ci([(kernel,) for kernel in KERNELS], lambda i: i == 1))
def test_the_unbroken_kernel_is_not_caught(kernel):
    assert not caught(kernel)


BROKEN = [(kernel, WithoutWait) for kernel in KERNELS]
BROKEN += [("forward", WithoutFence), ("dq", WithoutSync), ("dkv", WithoutSync)]


@pytest.mark.parametrize(("kernel", "twin"), some_in_ci(BROKEN, lambda i: i in (0, 3, 4)))
def test_a_missing_wait_fence_and_barrier_are_caught(kernel, twin):
    assert caught(kernel, twin)


@pytest.mark.parametrize("kernel", some_in_ci([(kernel,) for kernel in KERNELS], lambda i: i == 2))
def test_a_visit_too_few_is_caught(monkeypatch, kernel):
    right = mask.Visits.load
    monkeypatch.setattr(mask.Visits, "load", lambda row_g, *more: right(row_g, *more)._replace(count=row_g[0] - 1))
    assert caught(kernel)


@pytest.mark.parametrize("kernel", some_in_ci([(kernel,) for kernel in KERNELS], lambda i: i == 0))
def test_a_wrong_block_is_caught(monkeypatch, kernel):
    right = mask.Visits.block
    monkeypatch.setattr(mask.Visits, "block", lambda visits, n: right(visits, jnp.maximum(n - 1, 0)))
    assert caught(kernel)


@pytest.mark.parametrize("kernel", some_in_ci([(kernel,) for kernel in KERNELS], lambda i: False))
def test_a_tile_that_is_taken_for_whole_is_caught(monkeypatch, kernel):
    monkeypatch.setattr(mask, "is_whole", lambda *tile: jnp.bool_(True))
    assert caught(kernel)
