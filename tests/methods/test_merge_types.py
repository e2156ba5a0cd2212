"""The types of the tensors of a mixture that a run trains with (`lora.merge_types`)."""

import dataclasses

import jax
import pytest

from qlora_jax.config import Config, DataArgs, LoraArgs, ModelArgs, to_dict
from qlora_jax.methods.attach import abstract_parts
from qlora_jax.methods.merge_into import file_kinds, planned
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import combine
from qlora_jax.training.resume import settings_to_resume
from tests.io.tiny_models import tiny_config

SIZES = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
FEATURES = model_config(tiny_config(**SIZES, head_dim=64, tie_word_embeddings=True))
TYPES = {f"self_attn.{name}_proj": "Q4_K" for name in "qkvo"} | {f"mlp.{name}_proj": "Q4_K" for name in ("gate", "up")}
TYPES |= {"mlp.down_proj": "Q6_K Q4_K", "model.embed_tokens": "Q6_K"}
LORA = LoraArgs(merge_into="q4_k_m", merge_types=TYPES)


def test_one_word_stands_for_all_layers():
    kinds = file_kinds(FEATURES, LORA)
    assert kinds["mlp.down_proj"] == ("Q6_K", "Q4_K") and kinds["self_attn.q_proj"] == ("Q4_K", "Q4_K")
    assert kinds["model.embed_tokens"] == ("Q6_K",) and "lm_head" not in kinds


def test_wrong_types_are_reported_together():
    wrong = TYPES | {"self_attn.q_proj": "Q4_K Q4_K Q4_K", "mlp.up_proj": "Q3_K", "lm_head": "Q6_K"}
    del wrong["mlp.gate_proj"]
    with pytest.raises(ValueError, match=r"lora.merge_types: not the types of this model") as error:
        file_kinds(FEATURES, dataclasses.replace(LORA, merge_types=wrong))
    assert str(error.value).splitlines()[1:] == [
        "  self_attn.q_proj: found 3 types, expected 1 or 2",
        "  mlp.gate_proj: found 0 types, expected 1 or 2",
        "  mlp.up_proj: found Q3_K, expected types of GGUF, whose blocks divide rows of 256",
        "  lm_head: found for a model without this matrix",
    ]


def test_an_adapter_on_a_dense_tensor_is_refused():
    lora = dataclasses.replace(LORA, merge_types=TYPES | {"mlp.down_proj": "F16"})
    with pytest.raises(ValueError, match=r"mlp.down_proj: found rows of 512 inputs, whose type is F16\. Leave it out"):
        abstract_parts(FEATURES, WeightFormat(quant_type=None), lora, (), None)
    elsewhere = dataclasses.replace(lora, target_modules=["q_proj"])
    model = combine(abstract_parts(FEATURES, WeightFormat(quant_type=None), elsewhere, (), None))
    assert isinstance(model.model.layers.mlp.down_proj.weight.get_value(), jax.ShapeDtypeStruct)


@pytest.mark.parametrize(
    ("widths", "kind"), [((256, 512), "INT4_128_BF16"), ((192, 512), "INT4_64_BF16"), ((96, 128), "INT4_32_BF16")]
)
def test_groups_of_integers_divide_the_rows_of_all_projections(widths, kind):
    """Servers fuse projections, whose groups must then be alike."""
    sizes = SIZES | dict(hidden_size=widths[0], intermediate_size=widths[1])
    found = file_kinds(model_config(tiny_config(**sizes, head_dim=64)), LoraArgs(merge_into="int4"))
    assert {each for kinds in found.values() for each in kinds} == {kind} and len(found) == 7


@pytest.mark.parametrize("name", ["int4", "mxfp4"])
def test_rows_that_no_group_divides_are_refused(name):
    features = model_config(tiny_config(**SIZES | dict(intermediate_size=48), head_dim=64))
    with pytest.raises(ValueError, match=r"mlp.down_proj: found rows of 48 inputs, whose type is F16\."):
        abstract_parts(features, WeightFormat(quant_type=None), LoraArgs(merge_into=name), (), None)


def test_plans_need_no_types():
    assert planned(LORA, FEATURES) is LORA
    found = planned(LoraArgs(merge_into="q4_k_m"), FEATURES).merge_types
    assert found.keys() == TYPES.keys() and {*found.values()} == {"Q4_K"}
    narrow = model_config(tiny_config(hidden_size=64, intermediate_size=48, num_hidden_layers=2))
    types = planned(LoraArgs(merge_into="q4_k_m"), narrow).merge_types
    assert (types["self_attn.q_proj"], types["mlp.down_proj"]) == ("Q8_0", "F16")


def test_a_resumed_run_has_the_types_of_its_start():
    config = Config(model=ModelArgs(path="m"), data=DataArgs(train="t"), output="o", lora=LORA)
    state = {"config": to_dict(config), "step": 3}
    without = dataclasses.replace(config, lora=LoraArgs(merge_into="q4_k_m"))
    assert settings_to_resume(without, state).lora == LORA
    other = dataclasses.replace(LORA, merge_types=TYPES | {"mlp.down_proj": "Q4_K"})
    with pytest.raises(ValueError, match=r"lora\.merge_types: .* in the checkpoint"):
        settings_to_resume(dataclasses.replace(config, lora=other), state)
