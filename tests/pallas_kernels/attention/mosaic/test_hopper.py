"""The forward pass of Hopper, interpreted with the race detector; broken copies must be detected.

`test_twin` holds it to the whole contract, with a backward pass.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # has the race detector's result
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.bounds import Bounds, Visible, wgmma_blocks
from pallas_kernels.attention.mosaic import hopper, mask
from pallas_kernels.attention.mosaic.instructions import InterpretedWgmma
from pallas_kernels.attention.tiles import ScoreScaling
from tests.marks import some_in_ci
from tests.nn.trees import random_trees, visible_keys
from tests.pallas_kernels.attention.loops import DETECTING
from tests.pallas_kernels.attention.test_branching import spans_of
from tests.pallas_kernels.attention.test_contract import ROUNDINGS, SCALE, _inputs, _largest_errors, _segments, _visible

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
EXACT = 5e-6
TOLERANCES = {F32: EXACT, BF16: ROUNDINGS, F16: ROUNDINGS / 8}
NO_SINKS = -np.inf


def _plain(q, k, v, visible_BTS, softcap, sinks_N):
    """Returns (out, log2-sum-exp2) by definition, in f64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    s = np.einsum("btnh,bsnh->bnts", q, k) * SCALE
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    weights = np.exp(np.where(visible_BTS[:, None], s, -np.inf))
    total = weights.sum(axis=3) + np.exp(np.broadcast_to(NO_SINKS if sinks_N is None else sinks_N, s.shape[1]))[:, None]
    return np.einsum("bnts,bsnh->btnh", weights / total[..., None], v), np.log2(total)


def errors(length, heads, kv_heads, dtype, head_dim, texts=None, window=None, softcap=None, sinks_N=None, **how):
    """Returns the largest relative errors of the result and of its log-sum-exp; `length` is whole blocks."""
    q, k, v, _ = _inputs(length, heads, kv_heads, 1, head_dim, dtype)
    blocks = wgmma_blocks(head_dim, capped=softcap is not None)
    assert length % blocks.longest == 0
    bounds = Bounds.of(Visible.of(1, length, texts, window), blocks)
    scores, do = ScoreScaling(SCALE, softcap), InterpretedWgmma(dtype, DETECTING)
    found = hopper.forward(q, k, v, bounds, sinks_N, scores, do, blocks.forward)
    visible_BTS = how.get("visible_BTS", _visible(length, window, texts))
    return _largest_errors(found, _plain(q, k, v, visible_BTS, softcap, sinks_N))


@pytest.fixture(autouse=True)
def _forget_races():
    yield
    interpret_pallas_call.reset_gpu_interpret_mode_state()


PACKED = _segments(256, (40, 2, 150))
SINKS_4 = jnp.asarray([0.5, 3.0, -30.0, 20.0])
# Blocks that one warpgroup sees and the other does not, grouped heads, each swizzle, both dtypes, sinks, soft caps.
CASES = [
    (256, 1, 1, F32, 64, {"window": 100}),
    (256, 4, 2, BF16, 128, {"texts": PACKED, "window": 70, "sinks_N": SINKS_4, "softcap": 0.7}),
    (128, 3, 3, F16, 80, {"softcap": 0.7}),
    (384, 2, 2, BF16, 96, {}),
    (256, 2, 1, BF16, 256, {"texts": PACKED}),
]


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "dtype", "head_dim", "features"),
    [CASES[0], *some_in_ci(CASES[1:], lambda i: i in (0, 1))],
)
def test_equals_the_plain_softmax(length, heads, kv_heads, dtype, head_dim, features):
    value, lse = errors(length, heads, kv_heads, dtype, head_dim, **features)
    assert value < (2 if head_dim > 64 else 1) * TOLERANCES[dtype] and lse < EXACT
    assert not interpret_pallas_call.get_races().races_found


@pytest.mark.slow
@pytest.mark.parametrize("window", some_in_ci([(90,), (None,)], lambda i: i == 0))
def test_branches(window):
    trees = random_trees(np.random.default_rng(3), 256)[None]
    how = {"window": window, "softcap": 2.0, "visible_BTS": visible_keys(trees, window)}
    assert max(errors(256, 2, 1, F32, 64, spans_of(trees), **how)) < EXACT
    assert not interpret_pallas_call.get_races().races_found


# Broken copies: each changes one line of the kernel or of its twin


def caught():
    """True if a broken kernel is detected: by its values, by a race, or by an unfinished operation."""
    try:
        found = max(errors(384, 2, 1, F32, 64, window=200))
        return not found < 100 * EXACT or interpret_pallas_call.get_races().races_found
    except jax.errors.JaxRuntimeError as failed:
        assert re.search("RACE DETECTED|before kernel finished|no threads observed phase", str(failed))
        return True


@pytest.mark.slow
def test_the_unbroken_kernel_is_not_caught():
    assert not caught()


def _without_wait(patch):
    patch.setattr(InterpretedWgmma, "wait", lambda do, barrier: plgpu.commit_smem())


def _without_fence(patch):
    right = InterpretedWgmma.store

    def store(do, *tile):
        with pytest.MonkeyPatch.context() as only_here:
            only_here.setattr(plgpu, "commit_smem", lambda: None)
            right(do, *tile)

    patch.setattr(InterpretedWgmma, "store", store)


def _without_the_last_visit(patch):
    right = mask.Visits.load
    patch.setattr(mask.Visits, "load", lambda row_g, *more: right(row_g, *more)._replace(count=row_g[0] - 1))


def _with_a_wrong_block(patch):
    right = mask.Visits.block
    patch.setattr(mask.Visits, "block", lambda visits, n: right(visits, jnp.maximum(n - 1, 0)))


def _as_if_whole(patch):
    patch.setattr(mask, "is_whole", lambda *tile: jnp.bool_(True))


def _of_another_head(patch):
    right = plgpu.BlockSpec

    def moved(shape, index_map, **how):
        return right(shape, lambda visited: (*index_map(visited)[:2], jnp.int32(1)), **how)

    patch.setattr(hopper.plgpu, "BlockSpec", moved)


def _released_early(patch):
    right = plgpu.emit_pipeline_warp_specialized

    def late(step, *, max_concurrent_steps, **how):
        def released(at, k_s, v_s, k_free, v_free, running):
            plgpu.barrier_arrive(k_free)
            plgpu.barrier_arrive(v_free)
            return step(at, k_s, v_s, running)

        return right(released, max_concurrent_steps=1, manual_consumed_barriers=True, **how)

    patch.setattr(hopper.plgpu, "emit_pipeline_warp_specialized", late)


BROKEN = (
    _without_the_last_visit,
    _without_wait,
    _without_fence,
    _with_a_wrong_block,
    _as_if_whole,
    _of_another_head,
    _released_early,
)


@pytest.mark.parametrize("change", some_in_ci([(change,) for change in BROKEN], lambda i: i in (1, 6)))
def test_a_broken_copy_is_caught(monkeypatch, change):
    change(monkeypatch)
    assert caught()
