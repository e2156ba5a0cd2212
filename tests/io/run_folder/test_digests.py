"""Digests: independent of the number of holders, sensitive to every bit, shape and dtype."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.io import digests
from qlora_jax.io.digests import (
    array_digest,
    changes,
    combine,
    json_digest,
    strip_digest,
    strips,
    tree_digests,
)


@pytest.fixture
def short_strips(monkeypatch):
    """Strips of 64 bytes, so that small arrays have many."""
    monkeypatch.setattr(digests, "STRIP_BYTES", 64)


def test_a_digest_is_the_hash_of_the_header_and_the_strips_digests(short_strips):
    values = np.arange(40, dtype=np.float32).reshape(4, 10)  # 160 bytes
    data = values.tobytes()
    parts = b"".join(xxhash.xxh3_128_digest(data[start : start + 64]) for start in (0, 64, 128))
    expected = xxhash.xxh3_128_hexdigest(b'["float32", [4, 10]]' + parts)
    assert array_digest(values) == {"dtype": "float32", "shape": [4, 10], "xxh3_128": expected}


@given(st.integers(0, 300), st.integers(1, 5))
def test_processes_that_hash_some_strips_each_give_the_digest_of_one_process(length, processes):
    values = np.random.default_rng(length).integers(0, 255, length, np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "STRIP_BYTES", 64)
        every = list(strips(values))
        hashed = [{i: strip_digest(every[i]) for i in range(p, len(every), processes)} for p in range(processes)]
        gathered = dict(sorted(pair for each in hashed for pair in each.items()))
        assert combine(values.dtype, values.shape, gathered.values()) == array_digest(values)


def test_each_bit_the_shape_and_the_dtype_change_a_digest(short_strips):
    values = np.arange(48, dtype=np.float32)
    seen = {array_digest(values)["xxh3_128"]}
    for bit in range(values.nbytes * 8):
        flipped = values.view(np.uint8).copy()
        flipped[bit // 8] ^= 1 << bit % 8
        seen.add(array_digest(flipped.view(np.float32))["xxh3_128"])
    seen |= {array_digest(other)["xxh3_128"] for other in (values.reshape(2, 24), values.view(np.int32), values[:47])}
    assert len(seen) == 1 + values.nbytes * 8 + 3


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32, np.uint8, np.bool_])
def test_device_and_host_arrays_have_one_digest(dtype):
    values = (np.arange(24).reshape(2, 3, 4) % 7).astype(dtype)
    assert array_digest(jnp.asarray(values)) == array_digest(values) == array_digest(np.asfortranarray(values))


def test_zeros_of_either_sign_scalars_and_empty_arrays_have_digests():
    assert array_digest(np.float32(0.0)) != array_digest(np.float32(-0.0))
    assert array_digest(np.int32(3)) == array_digest(jnp.int32(3))
    assert array_digest(np.zeros((0, 4), np.float32)) != array_digest(np.zeros((4, 0), np.float32))


def test_an_array_can_still_be_donated():
    values = jnp.arange(4096.0)
    array_digest(values)
    buffer = values.unsafe_buffer_pointer()
    doubled = jax.jit(lambda x: 2 * x, donate_argnums=0)(values)
    assert values.is_deleted() and doubled.unsafe_buffer_pointer() == buffer


def test_changes_name_each_array_and_how_it_differs():
    tree = {"up": {"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}, "state": (np.int32(1),)}
    expected = tree_digests(tree)
    assert list(expected) == ["state/0", "up/a", "up/b"]
    other = {"up": {"a": np.zeros(3, np.float32), "c": np.ones(2)}, "state": (np.int64(1),)}
    assert changes(tree_digests(other), expected) == [
        "state/0: found int64[], expected int32[]",
        "up/a: other values than were saved",
        "up/b: missing",
        "up/c: not expected",
    ]
    assert changes(expected, expected) == []


def test_the_digest_of_json_depends_on_values_alone():
    value = {"b": [1, 0.1, None, float("inf")], "a": {"ä": "text"}}
    again = {"a": {"ä": "text"}, "b": (1, 0.1, None, float("inf"))}
    assert json_digest(value) == json_digest(again) != json_digest(value | {"a": {}})
