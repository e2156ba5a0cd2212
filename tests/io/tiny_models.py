"""Small Llama models on disk, for tests: a Hugging Face folder or a GGUF file, with the same random weights."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import save_file

TOKENS = ["<unk>", "<s>", "</s>", *(f"t{index}" for index in range(29))]


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A config.json of a Llama with 2 layers, 4 heads and 2 kv-heads."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(TOKENS),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return config | changes


def tiny_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name and shape of every tensor of such a model."""
    width, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    linears = {
        "self_attn.q_proj": (q, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, q),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, shape in linears.items():
            shapes[f"{prefix}.{name}.weight"] = shape
            biased = config["attention_bias"] if name.startswith("self_attn") else config["mlp_bias"]
            if biased:
                shapes[f"{prefix}.{name}.bias"] = shape[:1]
        shapes[f"{prefix}.input_layernorm.weight"] = (width,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return shapes


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """f32 weights: normal, scaled for activations near 1; norms near 1."""
    rng = np.random.default_rng(seed)
    return {
        name: (1 + rng.normal(0, 0.1, shape) if "norm" in name else rng.normal(0, shape[-1] ** -0.5, shape)).astype(
            "f4"
        )
        for name, shape in tiny_shapes(config).items()
    }


def write_folder(
    folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray], shards: int = 1, **files: str
) -> Path:
    """A Hugging Face folder with the weights in `shards` files; `files` are further files by name (_ for .)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
    else:
        shard_of = {
            name: f"model-{index % shards + 1:05d}-of-{shards:05d}.safetensors" for index, name in enumerate(weights)
        }
        for shard in set(shard_of.values()):
            save_file({name: weights[name] for name in weights if shard_of[name] == shard}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def tokenizer_json() -> str:
    """tokenizer.json of a vocabulary of whole words, TOKENS."""
    model = tokenizers.models.WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token="<unk>")
    return tokenizers.Tokenizer(model).to_str()


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The name that llama.cpp's converter gives a tensor of Hugging Face."""
    module, leaf = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{leaf}"
    return f"{GGUF_NAMES[module]}.{leaf}"


def permute_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Permutes rows of q and k like llama.cpp's converter, in a copy of its code."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    matrix_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """A GGUF file as llama.cpp's converter would write it; `extra` metadata, `tensors` added under GGUF names.

    `types` are those of matrices that differ from `matrix_type`, by Hugging Face's name.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    add_vocabulary(writer)
    writer.add_unk_token_id(0)
    for key, value in (extra or {}).items():
        _add(writer, key, value)
    for name, weight in weights.items():
        _add_weight(writer, config, name, weight, (types or {}).get(name, matrix_type))
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """TOKENS, as a byte-level vocabulary."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * 29)
    writer.add_token_merges(["t 0", "t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)


def _add_weight(
    writer: gguf.GGUFWriter, config: dict[str, Any], name: str, weight: np.ndarray, kind: gguf.GGMLQuantizationType
) -> None:
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if f".{part}." in name:
            weight = permute_rows(weight, config[heads])
    if weight.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(gguf_name(name), weight)
    else:
        writer.add_tensor(gguf_name(name), gguf.quantize(weight, kind), raw_dtype=kind)
