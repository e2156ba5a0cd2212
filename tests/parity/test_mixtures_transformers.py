"""Mixtures of experts against transformers, in f32: tiny models in which every feature is away from its default.

Adapters on attention, dense MLPs, shared experts, routed experts and routers are in all of it: logits of rows padded on
either side and of packed rows, decoding over a key-value cache, the loss and the gradient of every A and B.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import KVPages
from qlora_jax.config import LoraArgs
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, combine
from qlora_jax.models.tensor_names import layer_name
from qlora_jax.nn.router import Routing
from qlora_jax.training.step import row_nll
from tests.marks import some_in_ci
from tests.models.cached import empty_cache, extend
from tests.models.mixtures import EXPERT_TARGETS, NARROW, SIZES, arrays_of, random_mixture

pytestmark = pytest.mark.slow
ORACLE = Path(__file__).parent.parent / "oracle/mixture_rows.py"
TOLERANCE = 1e-4
LENGTH, PADDING, CUT, CHUNK = 36, 11, 15, 12
EVERYTHING = LoraArgs(rank=4, alpha=8.0, target_parameters=[*EXPERT_TARGETS, "mlp.gate"])
SHARED = LoraArgs(rank=4, alpha=8.0, target_parameters=EXPERT_TARGETS, share_experts=True)
CASES = {
    "mixtral": (SIZES | dict(model_type="mixtral", num_local_experts=4, sliding_window=9), EVERYTHING),
    "qwen2_moe": (
        NARROW
        | dict(model_type="qwen2_moe", num_experts=6, shared_expert_intermediate_size=40, norm_topk_prob=True)
        | dict(decoder_sparse_step=2, use_sliding_window=True, sliding_window=9, max_window_layers=2),
        EVERYTHING,
    ),
    "qwen2_moe_no_bias": (
        NARROW | dict(model_type="qwen2_moe", num_experts=5, shared_expert_intermediate_size=24, qkv_bias=False),
        SHARED,
    ),
    "qwen3_moe": (
        NARROW
        | dict(model_type="qwen3_moe", num_experts=8, norm_topk_prob=True, mlp_only_layers=[1], attention_bias=True)
        | dict(head_dim=24, use_sliding_window=True, sliding_window=9, num_experts_per_tok=3),
        EVERYTHING,
    ),
    "olmoe": (
        SIZES
        | dict(model_type="olmoe", num_experts=8, attention_bias=True, tie_word_embeddings=True)
        | dict(clip_qkv=0.7),  # about half of the queries and keys are beyond it
        EVERYTHING,
    ),
    "glm4_moe": (
        NARROW
        | dict(model_type="glm4_moe", n_routed_experts=8, n_group=4, topk_group=2, routed_scaling_factor=1.7)
        | dict(first_k_dense_replace=1, use_qk_norm=True, attention_bias=True, n_shared_experts=2)
        | dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.25, rope_theta=5000.0)),
        EVERYTHING,
    ),
}
IN_CI = ("glm4_moe",)  # dense and sparse layers, groups, a shared expert, and a bias of the choice
OTHERS = tuple(name for name in CASES if name not in IN_CI)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, LENGTH)).astype(np.int32)


@jax.jit
def _logits(parts: ModelParts, tokens_BT: jax.Array, segments_BT: jax.Array, counted_BT: jax.Array):
    model = combine(parts)
    hidden, routing = model.hidden_with_routing(tokens_BT, counted_BT, segments_BT=segments_BT)
    return model.head.logits(hidden).reshape(*tokens_BT.shape, -1), routing


def _rows(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, segments, counted tokens) of the three kinds of row that the oracle computed."""
    place = np.arange(LENGTH)
    segments = np.stack([np.zeros(LENGTH, int), place >= PADDING, place >= CUT]).astype(np.int32)
    counted = np.ones((3, LENGTH), "f4")
    counted[1, :PADDING] = 0
    counted[2] = 0
    return tokens[[0, 1, 0]], segments, counted


def _balance(routing: Routing, experts: int) -> np.ndarray:
    """The load-balancing loss of Switch Transformers, from sums over rows and layers."""
    tokens = routing.tokens_B.sum() * routing.z_BS.shape[1]
    share_E, mean_E = (sums.sum((0, 1)) / tokens for sums in (routing.counts_BSE, routing.probs_BSE))
    return np.asarray(experts * jnp.sum(share_E * mean_E))


@jax.jit
def _extend(parts: ModelParts, tokens_BT: jax.Array, start: int, cache: KVPages):
    model = combine(parts)
    hidden, cache = extend(model, tokens_BT, start, cache, LENGTH)
    return model.head.logits(hidden), cache


def _decoded(parts: ModelParts, row: np.ndarray) -> np.ndarray:
    """Logits of a row that goes through a cache in chunks of equal length."""
    cache, found = empty_cache(combine(parts).config, 1, LENGTH), []
    for start in range(0, LENGTH, CHUNK):
        logits, cache = _extend(parts, row[None, start : start + CHUNK], start, cache)
        found.append(np.asarray(logits))
    return np.concatenate(found)


def _loss_and_gradients(parts: ModelParts, tokens_BT: np.ndarray):
    """The sum of -log p of each next token, and its gradient by every adapter."""
    targets_BT = jnp.roll(jnp.asarray(tokens_BT), -1, axis=1)
    weights_BT = jnp.ones(tokens_BT.shape, jnp.float32).at[:, -1].set(0)

    @jax.jit
    def loss(lora):
        micro = {"inputs": jnp.asarray(tokens_BT), "targets": targets_BT, "weights": weights_BT}
        return row_nll(combine(parts.with_lora(lora)), micro, remat="names", keys_B=None).sum()

    return jax.value_and_grad(loss)(parts.lora)


def _error(actual, expected) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def _gradient_errors(parts: ModelParts, gradients, expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Compares gradients: for W + s (A B)^T with the gradient G by W, those by A and B are s G^T B^T and s A^T G^T."""
    config, errors = combine(parts).config, {}
    for name, leaves in parts.lora.items():
        by_weight = np.stack(
            [
                _of_weight(expected, config.hugging_face_name(layer_name(name, layer)))
                for layer in config.layers_with(name.removeprefix("model.layers."))
            ]
        )
        a, b, g_KN = np.asarray(leaves["lora_a"]), np.asarray(leaves["lora_b"]), np.swapaxes(by_weight, -1, -2)
        wanted = {"lora_a": 2.0 * g_KN @ np.swapaxes(b, -1, -2), "lora_b": 2.0 * np.swapaxes(a, -1, -2) @ g_KN}
        for leaf, values in wanted.items():
            if leaves[leaf].ndim == 4 and leaves[leaf].shape[1] == 1:
                values = values.sum(axis=1, keepdims=True)
            errors[f"{name} {leaf}"] = _error(np.asarray(gradients[name][leaf]), values)
    return errors


def _of_weight(expected: dict[str, np.ndarray], name: str) -> np.ndarray:
    return expected[name] if name in expected else expected[f"{name}.weight"]


@pytest.mark.parametrize("names", some_in_ci([(IN_CI,), (OTHERS,)], lambda i: i == 0))
def test_mixtures(oracle, tokens, names):
    parts = {name: random_mixture(config, lora) for name, (config, lora) in CASES.items() if name in names}
    arrays = {
        f"{name}/{key}": v
        for name, one in parts.items()
        for key, v in arrays_of(one, model_config(CASES[name][0])).items()
    }
    configs = {name: CASES[name][0] for name in names}
    found = oracle(ORACLE, configs=configs, padding=PADDING, cut=CUT, tokens=tokens, **arrays)
    errors = {}
    for name, one in parts.items():
        wanted = {key.removeprefix(f"{name}/"): v for key, v in found.items() if key.startswith(f"{name}/")}
        (right, left, packed), routing = _logits(one, *_rows(tokens))
        errors[f"{name}, right"] = _error(right, wanted["right"])
        errors[f"{name}, left"] = _error(left[PADDING:], wanted["left"])
        errors[f"{name}, packed"] = _error(packed, wanted["packed"])
        errors[f"{name}, decoded"] = _error(_decoded(one, tokens[0]), wanted["right"])
        if "balance" in wanted:
            errors[f"{name}, balance"] = _error(_balance(routing, routing.counts_BSE.shape[2]), wanted["balance"])
        nll, gradients = _loss_and_gradients(one, tokens)
        errors[f"{name}, loss"] = _error(nll, wanted["nll"])
        of_weights = {k.removeprefix("gradient/"): v for k, v in wanted.items() if k.startswith("gradient/")}
        errors |= {f"{name}, {key}": e for key, e in _gradient_errors(one, gradients, of_weights).items()}
    assert max(errors.values()) < TOLERANCE, {name: error for name, error in errors.items() if not error < TOLERANCE}
