"""Keys of published GGUF files, as llama.cpp logs them, and the number of parameters that it counts."""

from pathlib import Path
from typing import Any

import pytest

from qlora_jax.io.gguf.config_reader import architecture_of, config_from_metadata
from qlora_jax.models.families import model_config

HEAD = {"output.weight"}
BIASES = {"blk.0.attn_q.bias"}
GPT_OSS_YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 32.0,
    "rope.scaling.original_context_length": 4096,
}
DEVSTRAL_YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 48.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "rope.scaling.yarn_log_multiplier": 1.0,
    "rope.scaling.original_context_length": 8192,
}


def _sizes(
    layers: int,
    context: int,
    width: int,
    mlp: int,
    heads: int,
    kv_heads: int,
    theta: float,
    eps: float = 1e-5,
    norm: str = "layer_norm_rms",
) -> dict[str, Any]:
    """Returns the keys that every file has."""
    return {
        "block_count": layers,
        "context_length": context,
        "embedding_length": width,
        "feed_forward_length": mlp,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        f"attention.{norm}_epsilon": eps,
        "rope.freq_base": theta,
    }


def _head(length: int) -> dict[str, int]:
    return {"attention.key_length": length, "attention.value_length": length}


# By model: (architecture, its keys, tokens, tensors that imply attributes, billions of parameters).
PUBLISHED: dict[str, tuple[str, dict[str, Any], int, set[str], str]] = {
    "Granite 3.1 2B": (
        "granite",
        _sizes(40, 131072, 2048, 8192, 32, 8, 5e6)
        | {"vocab_size": 49155, "rope.dimension_count": 64, "attention.scale": 0.015625, "embedding_scale": 12.0}
        | {"residual_scale": 0.22, "logit_scale": 8.0},
        49155,
        set(),
        "2.53",
    ),
    "GLM-Z1 32B 0414": (
        "glm4",
        _sizes(61, 32768, 6144, 23040, 48, 2, 1e4) | _head(128) | {"rope.dimension_count": 64},
        151552,
        HEAD,
        "32.57",
    ),
    "Devstral Small 2 24B": (
        "mistral3",
        _sizes(40, 393216, 5120, 32768, 32, 8, 1e8)
        | _head(128)
        | DEVSTRAL_YARN
        | {"rope.dimension_count": 128, "attention.temperature_scale": 0.1, "vocab_size": 131072},
        131072,
        HEAD,
        "23.57",
    ),
    "Gemma 3 27B": (
        "gemma3",
        _sizes(62, 131072, 5376, 21504, 32, 16, 1e6, 1e-6)
        | _head(128)
        | {"attention.sliding_window": 1024, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        262208,
        set(),
        "27.009",
    ),
    "Mixtral 8x7B": (
        "llama",
        _sizes(32, 32768, 4096, 14336, 32, 8, 1e6)
        | {"rope.dimension_count": 128, "expert_count": 8, "expert_used_count": 2},
        32000,
        HEAD,
        "46.70",
    ),
    "Qwen3-Coder 480B": (
        "qwen3moe",
        _sizes(62, 262144, 6144, 8192, 96, 8, 1e7, 1e-6)
        | _head(128)
        | {"expert_count": 160, "expert_used_count": 8, "expert_feed_forward_length": 2560}
        | {"expert_shared_feed_forward_length": 0},
        151936,
        HEAD,
        "480.155",
    ),
    "gpt-oss 20B": (
        "gpt-oss",
        _sizes(24, 131072, 2880, 2880, 64, 8, 150000.0)
        | _head(64)
        | GPT_OSS_YARN
        | {"expert_count": 32, "expert_used_count": 4, "expert_feed_forward_length": 2880}
        | {"attention.sliding_window": 128},
        201088,
        HEAD | BIASES,
        "20.91",
    ),
    # llama.cpp counts 110.469 with the layer that predicts further tokens; 106.852 is the count of the Hub.
    "GLM-4.5 Air": (
        "glm4moe",
        _sizes(47, 131072, 4096, 10944, 96, 8, 1e6)
        | _head(128)
        | {"expert_used_count": 8, "rope.dimension_count": 64, "expert_count": 128, "expert_feed_forward_length": 1408}
        | {"expert_shared_count": 1, "leading_dense_block_count": 1, "expert_gating_func": 2}
        | {"expert_weights_scale": 1.0, "expert_weights_norm": True, "nextn_predict_layers": 1},
        151552,
        HEAD | BIASES,
        "106.852",
    ),
    "Command A 111B": (
        "cohere2",
        _sizes(64, 262144, 12288, 36864, 96, 8, 50000.0, norm="layer_norm")
        | _head(128)
        | {"logit_scale": 0.25, "attention.sliding_window": 4096, "vocab_size": 256000, "rope.dimension_count": 128}
        | {"rope.scaling.type": "none"},
        256000,
        set(),
        "111.058",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_headers_are_read(name: str) -> None:
    architecture, keys, tokens, tensors, billions = PUBLISHED[name]
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    metadata |= {"general.architecture": architecture, "tokenizer.ggml.tokens": [""] * tokens}
    found = architecture_of(Path(name), metadata)
    model = model_config(config_from_metadata(Path(name), found, metadata, frozenset(tensors), {}))
    decimals = len(billions.split(".")[1])
    assert f"{model.parameters() / 1e9:.{decimals}f}" == billions
