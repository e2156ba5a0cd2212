"""What a Hugging Face config becomes, and what is refused in it: everything at once."""

import pytest

from qlora_jax.models.families import model_config
from qlora_jax.nn.rope import NUMBERS, SCALINGS

SMOLLM2 = dict(
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=100000,
    tie_word_embeddings=True,
    hidden_act="silu",
)


def test_smollm2_has_the_published_number_of_parameters():
    config = model_config(SMOLLM2)
    linear = config.num_layers * sum(n * k for (n, k), _ in config.linear_shapes().values())
    norms = (2 * config.num_layers + 1) * config.embed_dim
    assert linear == 106_168_320
    assert linear + norms + config.vocab_size * config.embed_dim == 134_515_008


def test_older_and_newer_names_of_rope_mean_the_same():
    numbers = dict(factor=8.0, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192)
    older = model_config(SMOLLM2 | dict(rope_scaling=dict(numbers, type="llama3")))
    newer = {k: v for k, v in SMOLLM2.items() if k != "rope_theta"}
    newer = model_config(newer | dict(rope_parameters=dict(numbers, rope_type="llama3", rope_theta=100000.0)))
    assert older == newer
    assert older.rope.scaling.get("low_freq_factor") == 1.0


def test_every_problem_is_told_at_once():
    bad = dict(hidden_act="gelu", num_attention_heads=8, hidden_size="wide", sliding_window=128, clip_qkv=8.0)
    with pytest.raises(ValueError) as caught:
        model_config(SMOLLM2 | bad)
    text = str(caught.value)
    for part in ("hidden_act='gelu'", "hidden_size='wide'", "sliding_window=128", "clip_qkv=8.0", "multiple of"):
        assert part in text


@pytest.mark.parametrize(
    ("scaling", "part"),
    [
        (dict(type="spiral", factor=2.0), "'spiral' is not supported"),
        (dict(type="linear"), "lacks ['factor']"),
        (dict(type="linear", factor=2.0, beta_fast=3), "has ['beta_fast']"),
    ],
)
def test_rope_scalings_that_are_not_understood_are_refused(scaling, part):
    with pytest.raises(ValueError) as caught:
        model_config(SMOLLM2 | dict(rope_scaling=scaling))
    assert part in str(caught.value)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="model_type='mamba' is not supported: known are \\['gemma', 'gemma2', "):
        model_config(dict(SMOLLM2, model_type="mamba"))


def test_each_scaling_says_what_it_needs():
    assert NUMBERS.keys() == SCALINGS.keys()
