"""The start banner names the implementations that multiply with the frozen weights."""

from types import SimpleNamespace

import jax.numpy as jnp

from pallas_kernels.nf4_matmul import api, reference
from pallas_kernels.nf4_matmul.dispatch import Capabilities, Implementation
from qlora_jax.training.banner import _matmuls
from tests.pallas_kernels.nf4_matmul.contract import weight


def session_of(*weights):
    return SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(micro_batch_size=2)),
        dataset=SimpleNamespace(buckets=(16, 64)),
        weights=SimpleNamespace(dtype="bfloat16"),
        parts=SimpleNamespace(base={str(i): w for i, w in enumerate(weights)}),
    )


def test_the_implementation_and_why_not_the_one_that_the_device_would_rather_run(monkeypatch):
    few = Implementation(reference.forward, reference.backward, Capabilities(rows=(1, 64)))
    monkeypatch.setitem(api.IMPLEMENTATIONS, "few", few)
    monkeypatch.setitem(api.PREFERENCE, "cpu", ("few", "reference"))
    products = _matmuls.__wrapped__(session_of(weight((64, 128)), weight((96, 192)), jnp.ones(3)))
    assert products == "reference; not few: takes 1 to 64 rows, not 128"
    assert _matmuls.__wrapped__(session_of(jnp.ones((4, 4)))) == "XLA, dense weights"
