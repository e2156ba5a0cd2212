"""Each family against transformers, in f32: random tiny models in which every feature is away from its default.

Logits of rows padded on either side and of packed rows; decoding over a key-value cache against the whole row at once;
the loss, and the gradient of every A and B, with random adapters on every linear layer.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraArgs
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, combine, partition
from qlora_jax.models.tensor_names import layer_name
from qlora_jax.training.step import row_nll
from tests.models.cached import empty_cache, extend
from tests.training.compiled_text import TO_READ

ORACLE = Path(__file__).parent.parent / "oracle/family_rows.py"
TOLERANCE = 1e-4
VOCAB, LENGTH, PADDING, CUT, CHUNK = 97, 36, 11, 15, 12
SCALING = 2.0
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
GQA = SIZES | dict(num_key_value_heads=2)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
LONGROPE = dict(short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.5, 1.7, 1.9, 2.1])
YARN = dict(factor=4.0, original_max_position_embeddings=8, beta_fast=4.0, beta_slow=1.0, mscale_all_dim=1.0)
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama3": GQA | dict(rope_parameters=dict(LLAMA3, rope_type="llama3", rope_theta=5000.0)),
    "mistral": GQA | dict(model_type="mistral", sliding_window=9, head_dim=24, rms_norm_eps=1e-2),
    "mistral_no_window": GQA | dict(model_type="mistral", sliding_window=None),
    "qwen2_window": GQA
    | dict(
        model_type="qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen3": GQA | dict(model_type="qwen3", head_dim=24, attention_bias=True),
    "qwen3_window": GQA
    | dict(model_type="qwen3", head_dim=16, use_sliding_window=True, sliding_window=9)
    | dict(layer_types=ALTERNATING),
    "smollm3": GQA | dict(model_type="smollm3", no_rope_layer_interval=2, mlp_bias=True, attention_bias=True),
    "smollm3_window": GQA
    | dict(model_type="smollm3", no_rope_layers=[0, 1, 1], use_sliding_window=True, sliding_window=9),
    "olmo2": GQA | dict(model_type="olmo2", attention_bias=True, tie_word_embeddings=True),
    "gemma": GQA | dict(model_type="gemma", head_dim=24, attention_bias=True),
    "gemma2": GQA
    | dict(model_type="gemma2", head_dim=16, sliding_window=9, query_pre_attn_scalar=40)
    | dict(attn_logit_softcapping=0.5, final_logit_softcapping=1.5),
    "gemma2_plain": GQA
    | dict(model_type="gemma2", head_dim=16, attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3": GQA
    | dict(model_type="gemma3_text", head_dim=16, sliding_window=9, query_pre_attn_scalar=20, layer_types=ALTERNATING)
    | dict(
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=4.0, rope_theta=9000.0),
            sliding_attention=dict(rope_type="default", rope_theta=500.0),
        )
    ),
    "gemma3_softcap": GQA
    | dict(model_type="gemma3_text", head_dim=16, sliding_window=9, attention_bias=True, final_logit_softcapping=1.5),
    "phi3": GQA | dict(model_type="phi3", sliding_window=9),
    "phi3_longrope": GQA
    | dict(model_type="phi3", original_max_position_embeddings=32)
    | dict(rope_parameters=dict(LONGROPE, rope_type="longrope", partial_rotary_factor=0.5, rope_theta=5000.0)),
    "phi": GQA | dict(model_type="phi", rope_parameters=dict(rope_type="default", partial_rotary_factor=0.25)),
    "gpt_neox": SIZES | dict(model_type="gpt_neox", layer_norm_eps=1e-3),
    "gpt_neox_sequential": SIZES
    | dict(model_type="gpt_neox", use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new")
    | dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)),
    "olmo3": GQA
    | dict(model_type="olmo3", sliding_window=9, attention_bias=True, layer_types=ALTERNATING)
    | dict(
        rope_parameters=dict(
            full_attention=dict(YARN, rope_type="yarn", rope_theta=9000.0, attention_factor=1.3),
            sliding_attention=dict(rope_type="default", rope_theta=9000.0),
        )
    ),
    "seed_oss": GQA | dict(model_type="seed_oss", head_dim=24, attention_out_bias=True, mlp_bias=True),
    "exaone4": GQA | dict(model_type="exaone4", sliding_window=9, sliding_window_pattern=2, tie_word_embeddings=True),
    "glm4": GQA
    | dict(model_type="glm4", head_dim=16)
    | dict(rope_parameters=dict(rope_type="default", rope_theta=5000.0, partial_rotary_factor=0.75)),
    "granite": GQA
    | dict(model_type="granite", attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    | dict(embedding_multiplier=3.0, attention_multiplier=0.4, residual_multiplier=0.3, logits_scaling=0.2),
    "cohere2": GQA
    | dict(model_type="cohere2", attention_bias=True, sliding_window=9, layer_types=ALTERNATING, logit_scale=3.0),
    "ministral3": GQA
    | dict(model_type="ministral3", head_dim=24, sliding_window=9)
    | dict(rope_parameters=dict(YARN, rope_type="yarn", rope_theta=5000.0, llama_4_scaling_beta=0.7, mscale=0.7)),
}
# Rotations that follow from the length of a row are others in a part of it alone.
LENGTH_MATTERS = {"phi3_longrope"}
compiled = functools.partial(jax.jit, compiler_options=TO_READ)  # tiny models compile longer than they run


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCAB, (2, LENGTH)).astype(np.int32)


def _loaded(path: Path):
    source = open_model(path)
    return load_model(source, model_config(source.config), WeightFormat(quant_type=None, dtype="float32")).model


def _rows(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segments) of the three kinds of row that the oracle computed."""
    place = np.arange(LENGTH)
    segments = np.stack([np.zeros(LENGTH, int), place >= PADDING, place >= CUT]).astype(np.int32)
    return tokens[[0, 1, 0]], segments


@compiled
def _logits(model, tokens_BT, segments_BT):
    hidden = model.hidden(tokens_BT, segments_BT=segments_BT)
    return model.head.logits(hidden).reshape(*tokens_BT.shape, -1)


@compiled
def _extended(model, tokens_BT, start, cache):
    hidden, cache = extend(model, tokens_BT, start, cache, LENGTH)
    return model.head.logits(hidden), cache


def _decoded(model, tokens_BT):
    """Logits of rows that go through a cache in chunks of equal length."""
    batch, length = tokens_BT.shape
    cache, found = empty_cache(model.config, batch, length), []
    for start in range(0, length, CHUNK):
        logits, cache = _extended(model, tokens_BT[:, start : start + CHUNK], start, cache)
        found.append(np.asarray(logits).reshape(batch, CHUNK, -1))
    return np.concatenate(found, axis=1)


def adapted(model, spec: LoraArgs) -> ModelParts:
    """Adds random adapters and subtracts each A B from its weight, so that the model computes what it did.

    Weights in codes cannot change, so their B stays zero.
    """
    attach_method(model, spec, jax.random.key(0))
    parts, rng = partition(model), np.random.default_rng(0)
    base, lora = dict(nnx.to_flat_state(parts.base)), {}
    for name, leaves in parts.lora.items():
        weights = _weights_of(base, tuple(name.split(".")))
        b = leaves["lora_b"]
        if all(isinstance(base[path].get_value(), jax.Array) for path in weights):
            b = jnp.asarray(0.3 * rng.standard_normal(b.shape, "f4"))
        lora[name] = {"lora_a": leaves["lora_a"], "lora_b": b}
        deltas = jnp.split(SCALING * jnp.swapaxes(leaves["lora_a"] @ b, -1, -2), len(weights), axis=-2)
        for path, delta in zip(weights, deltas, strict=True):
            if b.any():
                base[path] = base[path].replace(base[path].get_value() - delta)
    return dataclasses.replace(parts, lora=lora, base=nnx.from_flat_state(list(base.items())))


def _weights_of(base: dict, name: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Returns the paths of the weights of an adapter; gate and up of experts share one."""
    if name[-2:] == ("experts", "gate_up_proj"):
        return [(*name[:-1], half, "weight") for half in ("gate_proj", "up_proj")]
    return [(*name, "weight")]


def loss_and_gradients(parts: ModelParts, tokens_BT):
    """Returns the sum of -log p of each next token, and its gradient by every adapter."""
    tokens_BT, targets_BT = jnp.asarray(tokens_BT), jnp.roll(tokens_BT, -1, axis=1)
    weights_BT = jnp.ones(tokens_BT.shape, jnp.float32).at[:, -1].set(0)

    def loss(lora):
        micro = {"inputs": tokens_BT, "targets": targets_BT, "weights": weights_BT}
        return row_nll(combine(parts.with_lora(lora)), micro, remat="names", keys_B=None).sum()

    return compiled(jax.value_and_grad(loss))(parts.lora)


def _error(actual, expected) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def errors_of_adapter(leaves, gradients, by_weight_KN) -> list[float]:
    """Compares gradients of one layer: for W + s (A B)^T, those by A and B are s G B^T and s A^T G, G that by W^T."""
    a, b = np.asarray(leaves["lora_a"]), np.asarray(leaves["lora_b"])
    errors = [_error(np.asarray(gradients["lora_b"]), SCALING * np.swapaxes(a, -1, -2) @ by_weight_KN)]
    if b.any():
        errors.append(_error(np.asarray(gradients["lora_a"]), SCALING * by_weight_KN @ np.swapaxes(b, -1, -2)))
    return errors


def _gradient_errors(config, lora, gradients, expected: dict[str, np.ndarray]) -> list[float]:
    errors = []
    for name, leaves in lora.items():
        assert leaves["lora_b"].any(), name
        for row, layer in enumerate(config.layers_with(name.removeprefix("model.layers."))):
            by_weight = expected.pop(config.hugging_face_name(layer_name(name, layer)))
            one, found = (jax.tree.map(lambda leaf, row=row: leaf[row], each) for each in (leaves, gradients[name]))
            errors += errors_of_adapter(one, found, by_weight.T)
    assert not expected, f"linear layers without an adapter: {sorted(expected)}"
    return errors


def errors_of(name: str, model, expected: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, float]:
    """The errors of everything that the oracle computed of a model."""
    wanted = {key.removeprefix(f"{name}/"): v for key, v in expected.items() if key.startswith(f"{name}/")}
    right, left, packed = _logits(model, *_rows(tokens))
    errors = {"right": _error(right, wanted["right"]), "left": _error(left[PADDING:], wanted["left"])}
    if name not in LENGTH_MATTERS:
        errors["packed"] = _error(packed, wanted["packed"])
    errors["decoded"] = _error(_decoded(model, tokens[:1])[0], wanted["right"])
    parts = adapted(model, LoraArgs(rank=4, alpha=4 * SCALING))
    nll, gradients = loss_and_gradients(parts, tokens)
    errors["loss"] = _error(nll, wanted["nll"])
    of_weights = {k.removeprefix("gradient/"): v for k, v in wanted.items() if k.startswith("gradient/")}
    errors["gradients"] = max(_gradient_errors(model.config, parts.lora, gradients, of_weights))
    return {f"{name}, {kind}": error for kind, error in errors.items()}


@pytest.mark.slow
def test_families(oracle, tmp_path, tokens):
    settings = {"configs": CONFIGS, "folder": str(tmp_path), "padding": PADDING, "cut": CUT}
    settings |= {"by_length": sorted(LENGTH_MATTERS)}
    expected = oracle(ORACLE, **settings, tokens=tokens)
    errors = {}
    for name in CONFIGS:
        errors |= errors_of(name, _loaded(tmp_path / name), expected, tokens)
    assert max(errors.values()) < TOLERANCE, {name: error for name, error in errors.items() if error >= TOLERANCE}
