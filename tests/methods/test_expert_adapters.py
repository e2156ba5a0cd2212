"""Adapters on experts and routers: which get one, in which shapes, with which values, and what is refused."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from qlora_jax.config import LoraArgs
from qlora_jax.methods.attach import attach_method
from qlora_jax.methods.expert_lora import initial_parameter_factors
from qlora_jax.methods.targets import target_parameters
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import CausalLM, layer_runs
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import combine, partition
from tests.models.mixtures import EXPERT_TARGETS, NARROW, SIZES

CONFIG = NARROW | dict(model_type="qwen3_moe", num_experts=5, mlp_only_layers=[1])
EXPERTS = LoraArgs(rank=4, target_modules=[], target_parameters=EXPERT_TARGETS)
GATE_UP, DOWN = (f"model.layers.{name}" for name in EXPERT_TARGETS)


def parts_of(spec: LoraArgs):
    """Returns the model with shapes in place of arrays."""

    def make():
        model = CausalLM(model_config(CONFIG), WeightFormat())
        attach_method(model, spec, jax.random.key(0))
        return partition(model)

    return jax.eval_shape(make)


def shapes_of(**settings) -> dict[str, list[tuple[int, ...]]]:
    lora = parts_of(dataclasses.replace(EXPERTS, **settings)).lora
    return {name: [leaf.shape for leaf in leaves.values()] for name, leaves in lora.items()}


def test_experts_and_routers_get_adapters_only_by_their_names():
    assert shapes_of() == {GATE_UP: [(2, 5, 64, 4), (2, 5, 4, 48)], DOWN: [(2, 5, 24, 4), (2, 5, 4, 64)]}
    shared = shapes_of(share_experts=True, rank_pattern={"down_proj": 2})
    assert shared == {GATE_UP: [(2, 1, 64, 4), (2, 1, 4, 48)], DOWN: [(2, 1, 24, 2), (2, 1, 2, 64)]}
    assert shapes_of(target_parameters=["mlp.gate"]) == {"model.layers.mlp.gate": [(2, 64, 4), (2, 4, 5)]}
    some = shapes_of(target_parameters=["layers.2.mlp.experts.down_proj"], target_modules=["up_proj"])
    assert some == {DOWN: [(1, 5, 24, 4), (1, 5, 4, 64)], "model.layers.mlp.up_proj": [(1, 64, 4), (1, 4, 48)]}
    everything = shapes_of(target_parameters=[], target_modules="all-linear")
    assert everything.keys() == {
        *(f"model.layers.self_attn.{name}_proj" for name in "qkvo"),
        *(f"model.layers.mlp.{name}_proj" for name in ("gate", "up", "down")),
    }


def test_runs_have_layers_of_one_kind():
    def runs(**settings) -> list[range]:
        model = combine(parts_of(dataclasses.replace(EXPERTS, **settings)))
        return layer_runs(model.model.layers, model.config)

    alternating = [range(1), range(1, 2), range(2, 3)]
    assert runs() == runs(target_parameters=["layers.2.mlp.experts.down_proj"]) == alternating


def test_initial_values_are_those_of_linear_layers():
    config = model_config(CONFIG)
    how = {"config": config, "spec": EXPERTS, "rank": 4, "dtype": "float32"}
    for name, shape in config.expert_targets().items():
        draw = functools.partial(initial_parameter_factors, jax.random.key(0), inner=name, shape=shape, **how)
        (a, b), (second, _), bound = draw(layers=(0, 2)), draw(layers=(2,)), shape[1] ** -0.5
        assert 0.95 * bound < np.abs(a).max() <= bound and not b.any()
        assert len(np.unique(a)) > 0.99 * a.size
        np.testing.assert_array_equal(second[0], a[1])


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (
            dict(target_parameters=["mlp.experts.up_proj"]),
            "matches none of the parameters of experts and routers: model.layers.mlp.experts.gate_up_proj, ",
        ),
        (
            dict(target_parameters=["layers.1.mlp.gate"]),
            "'layers.1.mlp.gate' matches none of the parameters of experts",
        ),
        (dict(target_modules=["experts.down_proj"]), "matches none of the linear layers"),
        (dict(method="full", target_parameters=[]), "lora.method=full: the model is a mixture of experts"),
    ],
)
def test_what_cannot_have_an_adapter_is_refused(settings, part):
    with pytest.raises(ValueError) as caught:
        shapes_of(**settings)
    assert part in str(caught.value)


def test_a_dense_model_has_no_such_parameters():
    dense = model_config({key: value for key, value in SIZES.items() if "expert" not in key} | dict(model_type="qwen3"))
    with pytest.raises(ValueError, match=r"target_parameters: found .* but the model has no experts"):
        target_parameters(dense, EXPERTS)
