"""Parameter counts of the named models against what their publishers say, to the last parameter."""

import pytest

from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import model_config
from qlora_jax.models.public import PUBLIC, nearest

# Numbers of elements of all published tensors. Llama 1's paper rounds them to 6.7, 13.0, 32.5 and 65.2 billion.
PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def parameters(model: ModelConfig) -> int:
    layer = sum(n * k + has_bias * n for (n, k), has_bias in model.linear_shapes().values()) + 2 * model.embed_dim
    tables = (1 if model.tie_embeddings else 2) * model.vocab_size * model.embed_dim
    return model.num_layers * layer + tables + model.embed_dim


def test_each_has_a_published_count():
    assert PUBLIC.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_parameters_are_the_published_ones(name):
    assert parameters(model_config(PUBLIC[name])) == PARAMETERS[name]


def test_a_misspelt_name_finds_its_model():
    assert nearest("llama3-8b") == "llama-3-8b" and nearest("Qwen2-7B") == "qwen2-7b"
    assert nearest("a-folder/of/mine") is None
