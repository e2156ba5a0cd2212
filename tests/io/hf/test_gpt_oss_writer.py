"""Tests that experts of gpt-oss are joined as its files have them, with one expert in memory beside the result."""

import weakref
from collections.abc import Iterator

import numpy as np

from qlora_jax.io.hf.gpt_oss_writer import joined_specs, joined_values
from qlora_jax.io.hf.shard_writer import TensorSpec

CONFIG = {"model_type": "gpt_oss"}
EXPERTS, F, K = 3, 4, 5
STEM = "model.layers.0.mlp.experts"
RNG = np.random.default_rng(0)
VALUES = {
    f"{STEM}.{expert}.{part}.{leaf}": RNG.normal(size=(F, K)[: 2 - (leaf == "bias")]).astype(np.float32)
    for leaf in ("weight", "bias")
    for expert in range(EXPERTS)
    for part in ("gate_proj", "up_proj")
}
SPECS = [TensorSpec(name, values.dtype, values.shape) for name, values in VALUES.items()]


def test_gate_and_up_take_turns_and_one_expert_is_alive() -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def stream() -> Iterator[np.ndarray]:
        for values in VALUES.values():
            assert sum(ref() is not None for ref in alive) <= 1
            alive.append(weakref.ref(copy := values.copy()))
            yield copy
            del copy

    specs, joined = joined_specs(SPECS, CONFIG), list(joined_values(SPECS, stream(), CONFIG))
    assert [(spec.name, spec.shape) for spec in specs] == [
        (f"{STEM}.gate_up_proj", (EXPERTS, K, 2 * F)),
        (f"{STEM}.gate_up_proj_bias", (EXPERTS, 2 * F)),
    ]
    for leaf, found in zip(("weight", "bias"), joined, strict=True):
        for expert in range(EXPERTS):
            for start, part in enumerate(("gate_proj", "up_proj")):
                expected = VALUES[f"{STEM}.{expert}.{part}.{leaf}"].T
                np.testing.assert_array_equal(found[expert, ..., start::2], expected, strict=True)
