"""Tests that experts are joined as files of gpt-oss and Qwen3-VL-MoE have them, with one expert in memory at a time."""

import weakref
from collections.abc import Iterator

import numpy as np

from qlora_jax.io.hf.model_writer import TensorSpec, joined_specs, joined_values

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


def test_gate_is_left_of_up_in_qwen3_vl_moe() -> None:
    config = {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text"}}
    weights = {name: values for name, values in VALUES.items() if name.endswith("weight")}
    specs = [TensorSpec(name, values.dtype, values.shape) for name, values in weights.items()]
    (spec,), (found,) = joined_specs(specs, config), joined_values(specs, weights.values(), config)
    assert (spec.name, spec.shape) == (f"{STEM}.gate_up_proj", (EXPERTS, K, 2 * F))
    for expert in range(EXPERTS):
        gate, up = (weights[f"{STEM}.{expert}.{part}.weight"] for part in ("gate_proj", "up_proj"))
        np.testing.assert_array_equal(found[expert], np.concatenate([gate, up]).T, strict=True)


def test_a_square_matrix_of_qwen3_vl_moe_stays_upright() -> None:
    """transformers transposes matrices of another shape than its own alone."""
    config = {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text"}}
    weights = {f"{STEM}.{expert}.down_proj.weight": RNG.normal(size=(K, K)).astype("f4") for expert in range(EXPERTS)}
    specs = [TensorSpec(name, values.dtype, values.shape) for name, values in weights.items()]
    (found,) = joined_values(specs, weights.values(), config)
    np.testing.assert_array_equal(found, np.stack([*weights.values()]), strict=True)
