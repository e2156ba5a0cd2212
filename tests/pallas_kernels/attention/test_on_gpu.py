"""Attention on an NVIDIA GPU: every feature of the kernels, and real shapes, against a plain softmax in f32 or f64."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import paged_attention
from pallas_kernels.attention.bounds import BLOCKS
from pallas_kernels.attention.dispatch import choose
from pallas_kernels.attention.mosaic.capabilities import HEAD_DIMS
from pallas_kernels.devices import target_device
from tests.pallas_kernels.attention import paged
from tests.pallas_kernels.attention import test_sinks as sinks
from tests.pallas_kernels.attention.test_branching import branching_errors, rows_of_trees
from tests.pallas_kernels.attention.test_contract import ROUNDINGS, _errors, _inputs, _segments, _visible

pytestmark = pytest.mark.gpu
BF16, F16 = jnp.bfloat16, jnp.float16
TOLERANCES = {BF16: ROUNDINGS, F16: ROUNDINGS / 8}
FEATURES = ({}, {"window": 70}, {"softcap": 0.7}, {"window": 33, "softcap": 0.7})


@pytest.fixture(autouse=True)
def _kernels():
    """Skips on a card without kernels, with the reason; the plain softmax multiplies in f32 and not in TF32."""
    choice = choose(target_device(), BF16, HEAD_DIMS[0])
    if choice.name not in BLOCKS:
        pytest.skip("; ".join(choice.refusals.values()))
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_equals_the_plain_softmax(dtype, head_dim):
    for features, length in itertools.product(FEATURES, (1, 150, 512)):
        assert max(_errors(length, 4, 2, dtype, 2, head_dim, **features)) < 2 * TOLERANCES[dtype], (features, length)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed_rows(head_dim):
    ids = _segments(600, (40, 2, 460), (266, 1, 130))
    for window in (None, 70):
        assert max(_errors(600, 4, 2, BF16, head_dim=head_dim, window=window, segments_BT=ids)) < 2 * ROUNDINGS


def test_branches():
    inputs = _inputs(600, 4, 2, head_dim=128, dtype=BF16)
    for window, softcap in ((None, None), (30, 0.7)):
        errors = branching_errors(inputs, rows_of_trees(3, 2, 600), window, softcap, is_traced=window is not None)
        assert max(errors) < 2 * ROUNDINGS


def test_sinks():
    ids = _segments(130, (40, 2, 60), (66, 1, 30))
    errors = sinks._errors(sinks._drawn(130, 4, BF16, 64), _visible(130, 70, ids), window=70, segments_BT=ids)
    assert max(errors) < 2 * sinks.ROUNDINGS


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (64, 8, 64), (16, 4, 256)])
def test_real_shapes(heads, kv_heads, head_dim):
    assert max(_errors(2048, heads, kv_heads, BF16, 1, head_dim)) < 2 * ROUNDINGS


def decoded(one, **how):
    """Returns the results of one token per row."""
    rows_R1 = jnp.arange(len(one.positions))[:, None]
    run = jax.jit(functools.partial(paged_attention, scale=paged.SCALE, **how))
    found = run(one.q[:, None], one.pages, paged.LAYER, rows_R1, jnp.asarray(one.positions)[:, None])
    return np.asarray(found[:, 0], np.float64)


def decoding_error(one, **how):
    right = one.plain(**how)
    return np.abs(decoded(one, **how) - right).max() / np.abs(right).max()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("coded", [False, True], ids=["numbers", "codes"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_decoding_equals_the_definition(dtype, coded, head_dim):
    """Results are rounded, and weights are: each by 2^-9 in bf16."""
    for features, (heads, kv_heads) in zip(FEATURES, ((8, 2), (12, 1), (3, 3), (7, 1)), strict=True):
        one = paged.call((0, 33, 700, -1), heads, kv_heads, head_dim, dtype, coded=coded)
        assert decoding_error(one, **features) < (2**-7 if dtype == BF16 else 2**-10), (features, heads)


def test_decoding_with_sinks_and_a_traced_window():
    one = paged.call((520, 90), 16, 2, 64, BF16, coded=True)
    sinks_N = jnp.linspace(0, 3, 16)
    assert decoding_error(one, window=jnp.int32(128), sinks_N=sinks_N) < 2**-7


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (64, 8, 64), (8, 1, 256)])
def test_decoding_of_real_shapes_has_the_same_bits_in_any_company(heads, kv_heads, head_dim):
    """Sixteen rows of up to 4,096 positions; a row alone has the bits that it has among the others."""
    positions = tuple(int(x) for x in np.linspace(5, 4095, 16))
    one = paged.call(positions, heads, kv_heads, head_dim, BF16)
    assert decoding_error(one) < 2**-7
    together = decoded(one)
    for row in (0, 7, 15):
        table_LRI = one.pages.pages_LRI[:, row : row + 1]
        pages = dataclasses.replace(one.pages, pages_LRI=table_LRI)
        alone = one._replace(q=one.q[row : row + 1], pages=pages, positions=positions[row : row + 1])
        np.testing.assert_array_equal(decoded(alone)[0], together[row])
