"""Names of `model.keep_16bit`: the layers that they select, the bytes that these add, and errors."""

import dataclasses

import jax
import pytest
from flax import nnx

from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.families import model_config
from qlora_jax.models.precision import added_bytes, describe, keep_in_16_bits, kept_layers, kept_text, names_of
from tests.io.tiny_models import tiny_config
from tests.models.mixtures import NARROW

CONFIG = model_config(tiny_config(num_hidden_layers=12))
ALL = tuple(range(12))


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (["down_proj"], {"mlp.down_proj": ALL}),
        (["self_attn.v_proj", "layers.1.mlp.up_proj"], {"self_attn.v_proj": ALL, "mlp.up_proj": (1,)}),
        (["model.layers.11.mlp.up_proj", "layers.1.mlp.up_proj"], {"mlp.up_proj": (1, 11)}),
        (r"model\.layers\.[0-2]\.mlp\..*", {f"mlp.{name}_proj": (0, 1, 2) for name in ("gate", "up", "down")}),
    ],
)
def test_names_and_patterns_select_layers(keep, expected):
    kept = kept_layers(keep, CONFIG)
    assert dict(kept) == expected
    assert kept_layers(names_of(kept, CONFIG), CONFIG) == kept


def test_all_names_that_match_nothing_are_in_one_error():
    with pytest.raises(ValueError) as caught:
        kept_layers(["donw_proj", "layers.12.mlp.up_proj", "up_proj", "lm_head", "donw_proj"], CONFIG)
    unknown, number, head = str(caught.value).splitlines()
    assert unknown.startswith("model.keep_16bit: 'donw_proj' matches none of the linear layers: self_attn.q_proj, ")
    assert unknown.endswith("did you mean mlp.down_proj?")
    assert "'layers.12.mlp.up_proj' names layer 12 (expected 0 to 11" in number
    assert head.endswith("'lm_head' is never quantized, so it needs no entry. Remove it")
    with pytest.raises(ValueError, match=r"model.keep_16bit: 'x+\.\.\.' matches none") as caught:
        kept_layers(["x" * 1_000], CONFIG)
    assert len(str(caught.value)) < 1000
    with pytest.raises(ValueError, match=r"model.keep_16bit: '\(': not a regular expression"):
        kept_layers("(", CONFIG)


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_added_bytes_are_those_of_the_arrays(double_quant):
    weights = WeightFormat(double_quant=double_quant)
    kept = keep_in_16_bits(weights, ["layers.0.mlp.up_proj", "layers.3.mlp.up_proj", "v_proj"], CONFIG)

    def size(weights: WeightFormat) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(abstract(weights))))

    def abstract(weights: WeightFormat) -> CausalLM:
        return nnx.eval_shape(lambda: CausalLM(CONFIG, weights))

    assert added_bytes(kept.dense, CONFIG, weights) == size(kept) - size(weights) > 0


def test_layers_are_described_by_ranges():
    kept = kept_layers(["v_proj", *(f"layers.{layer}.mlp.up_proj" for layer in (0, 1, 2, 5, 11))], CONFIG)
    assert describe(kept, CONFIG) == "self_attn.v_proj of all layers; mlp.up_proj of layers 0-2, 5, 11"
    weights = dataclasses.replace(WeightFormat(), dense=kept)
    assert kept_text(CONFIG, weights).startswith(describe(kept, CONFIG)) and "more than in 4 bits" in kept_text(
        CONFIG, weights
    )
    assert kept_text(CONFIG, WeightFormat()) == ""


def test_layers_of_a_mixture():
    """Layer 1 is dense, and layers 0 and 2 have experts: stacks have a row for each layer with the projection."""
    config = model_config(NARROW | dict(model_type="qwen3_moe", num_experts=5, mlp_only_layers=[1]))
    assert dict(kept_layers(["down_proj"], config)) == {"mlp.down_proj": (0,), "mlp.experts.down_proj": (0, 1)}
    kept = kept_layers(["layers.1.mlp.up_proj", "layers.2.mlp.experts.down_proj"], config)
    assert dict(kept) == {"mlp.up_proj": (0,), "mlp.experts.down_proj": (1,)}
    assert describe(kept, config) == "mlp.up_proj of all layers; mlp.experts.down_proj of layer 2"
    assert kept_layers(names_of(kept, config), config) == kept
    sizes = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model)))
        for weights in (dataclasses.replace(WeightFormat(), dense=kept), WeightFormat())
        for model in [nnx.eval_shape(lambda weights=weights: CausalLM(config, weights))]
    ]
    assert added_bytes(kept, config, WeightFormat()) == sizes[0] - sizes[1] > 0
    with pytest.raises(ValueError, match=r"'mlp\.gate' is never quantized"):
        kept_layers(["mlp.gate"], config)
