"""Writes a model with random weights, for benchmarks to which only the shape matters.

    python -m scripts.bench.support.random_model [qwen2-0.5b | random-15m]

Writes a Hugging Face folder (config.json, bf16 safetensors; no tokenizer) into the cache and prints its path.
Qwen2-0.5B's shape is written as a `llama` with attention biases and tied embeddings. The arithmetic is the same, except
for one additional bias, of `o_proj`, in each layer.
"""

import json
import math
import os
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from scripts.bench.support.train_rows import SHAPES, Shape
from scripts.fetch_smollm2 import cache_dir

STANDARD_DEVIATION = 0.02
SETTINGS = {
    "random-15m": {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "attention_bias": False},
    "qwen2-0.5b": {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "attention_bias": True},
}


def config_of(name: str) -> dict[str, object]:
    """Returns the contents of config.json."""
    shape = SHAPES[name]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": shape.layers,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **SETTINGS[name],
    }


def tensor_shapes(shape: Shape, attention_bias: bool) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor by its Hugging Face name."""
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    names = [*(f"self_attn.{name}" for name in attention), *(f"mlp.{name}" for name in mlp)]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.width)}
    for layer in (f"model.layers.{index}" for index in range(shape.layers)):
        for name, linear in zip(names, shape.linears(), strict=True):
            shapes[f"{layer}.{name}.weight"] = linear
            if attention_bias and name.startswith("self_attn."):
                shapes[f"{layer}.{name}.bias"] = linear[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (shape.width,)
    return shapes | {"model.norm.weight": (shape.width,)}


def random_tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Returns ones for a norm, normal numbers for everything else, in bfloat16."""
    if name.endswith("norm.weight"):
        return np.ones(shape, ml_dtypes.bfloat16)
    values = rng.standard_normal(math.prod(shape), np.float32) * np.float32(STANDARD_DEVIATION)
    return values.astype(ml_dtypes.bfloat16).reshape(shape)


def make_random_model(name: str) -> Path:
    """Returns the model's folder, written on the first call; a renamed temporary folder, so it is never incomplete."""
    target = cache_dir() / f"random-{name}"
    if target.exists():
        return target
    config, rng = config_of(name), np.random.default_rng(0)
    shapes = tensor_shapes(SHAPES[name], attention_bias=bool(config["attention_bias"]))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as parent:
        folder = Path(parent) / target.name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        tensors = {tensor: random_tensor(tensor, shape, rng) for tensor, shape in shapes.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        os.replace(folder, target)
    return target


if __name__ == "__main__":
    print(make_random_model(sys.argv[1] if len(sys.argv) > 1 else "qwen2-0.5b"))
