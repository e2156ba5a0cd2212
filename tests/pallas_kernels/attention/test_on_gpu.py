"""Attention on an NVIDIA GPU: every feature of the kernels, and real shapes, against a plain softmax in f32."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention.dispatch import choose
from pallas_kernels.attention.mosaic.capabilities import HEAD_DIMS
from pallas_kernels.devices import target_device
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
    if choice.name != "mma":
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
