"""Logits against transformers, in f32: random tiny models that vary every feature, and the real SmolLM2."""

from pathlib import Path

import jax
import numpy as np
import pytest

from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config

ORACLE = Path(__file__).parent.parent / "oracle"
BASE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
ROPE = dict(rope_theta=5000.0)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
LONGROPE = dict(short_factor=[1.0 + 0.1 * i for i in range(8)], long_factor=[1.5 + 0.2 * i for i in range(8)])
FEATURES = {
    "plain": {},
    "tied": dict(tie_word_embeddings=True),
    "multi_head": dict(num_key_value_heads=4),
    "multi_query": dict(num_key_value_heads=1),
    "wide_head": dict(head_dim=24),
    "attention_bias": dict(attention_bias=True),
    "mlp_bias": dict(mlp_bias=True),
    "qwen2": dict(model_type="qwen2", use_sliding_window=False, sliding_window=16, max_window_layers=2),
    "eps": dict(rms_norm_eps=0.3),
    "theta": dict(rope_parameters=dict(ROPE, rope_type="default")),
    "rope_linear": dict(rope_parameters=dict(ROPE, rope_type="linear", factor=3.0)),
    "rope_dynamic": dict(rope_parameters=dict(ROPE, rope_type="dynamic", factor=3.0), max_position_embeddings=16),
    "rope_llama3": dict(rope_parameters=dict(ROPE, rope_type="llama3", **LLAMA3)),
    "rope_yarn": dict(rope_parameters=dict(ROPE, rope_type="yarn", factor=4.0, original_max_position_embeddings=16)),
    "rope_yarn_all": dict(
        rope_parameters=dict(ROPE, rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
        | dict(beta_fast=20.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.3, truncate=False)
    ),
    "longrope_long": dict(
        rope_parameters=dict(ROPE, rope_type="longrope", factor=4.0, original_max_position_embeddings=16, **LONGROPE)
    ),
    "longrope_short": dict(
        rope_parameters=dict(ROPE, rope_type="longrope", factor=2.0, original_max_position_embeddings=40, **LONGROPE)
    ),
}


def logits_of(path: Path, tokens: np.ndarray) -> np.ndarray:
    """f32 logits [B, T, V] of our decoder on the weights at `path`, unquantized."""
    source = open_model(path)
    weights = WeightFormat(quant_type=None, dtype="float32")
    model = load_model(source, model_config(source.config), weights).model
    hidden = jax.jit(type(model).hidden)(model, tokens)
    return np.asarray(model.head.logits(hidden)).reshape(*tokens.shape, -1)


def test_random_models_of_every_feature(oracle, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 97, (2, 37)).astype(np.int32)
    configs = {name: BASE | overrides for name, overrides in FEATURES.items()}
    expected = oracle(ORACLE / "family_logits.py", configs=configs, folder=str(tmp_path), tokens=tokens)
    errors = {}
    for name in FEATURES:
        difference = np.abs(logits_of(tmp_path / name, tokens) - expected[name]).max()
        errors[name] = difference / np.abs(expected[name]).max()
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.slow
def test_smollm2(oracle, smollm2_gguf):
    tokens = np.random.default_rng(1).integers(17, 49152, (2, 150)).astype(np.int32)
    expected = oracle(ORACLE / "gguf_logits.py", path=str(smollm2_gguf), tokens=tokens)["logits"]
    actual = logits_of(smollm2_gguf, tokens)
    assert np.abs(actual - expected).max() / np.abs(expected).max() < 1e-4
