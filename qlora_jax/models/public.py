"""Published models by name, as the Hugging Face config of each: for plans of models that have not been downloaded.

Sources: the papers and model cards of LLaMA (arXiv 2302.13971), Llama 2 (2307.09288), Llama 3 (2407.21783), Qwen2
(2407.10671) and SmolLM2 (2502.02737), and the config.json that came with each.
"""

import difflib
from typing import Any

Config = dict[str, Any]


def _of(model_type: str, sizes: tuple[int, ...], vocabulary: int, positions: int, theta: float, eps: float) -> Config:
    """`sizes`: width, inner width of the MLP, layers, query heads, key and value heads."""
    width, inner, layers, heads, kv_heads = sizes
    return {
        "model_type": model_type,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "rope_theta": theta,
        "rms_norm_eps": eps,
    }


def _llama1(*sizes: int, eps: float) -> Config:
    return _of("llama", sizes, 32000, 2048, 1e4, eps)


def _llama3(*sizes: int) -> Config:
    return _of("llama", sizes, 128256, 8192, 5e5, 1e-5)


def _qwen2(*sizes: int, vocabulary: int, tied: bool = False) -> Config:
    return _of("qwen2", sizes, vocabulary, 131072, 1e6, 1e-6) | {"tie_word_embeddings": tied}


def _smollm2(*sizes: int, theta: float) -> Config:
    return _of("llama", sizes, 49152, 8192, theta, 1e-5) | {"tie_word_embeddings": True}


PUBLIC: dict[str, Config] = {
    "llama-7b": _llama1(4096, 11008, 32, 32, 32, eps=1e-6),
    "llama-13b": _llama1(5120, 13824, 40, 40, 40, eps=1e-6),
    "llama-33b": _llama1(6656, 17920, 60, 52, 52, eps=1e-6),
    "llama-65b": _llama1(8192, 22016, 80, 64, 64, eps=1e-5),
    "llama-2-70b": _of("llama", (8192, 28672, 80, 64, 8), 32000, 4096, 1e4, 1e-5),
    "llama-3-8b": _llama3(4096, 14336, 32, 32, 8),
    "llama-3-70b": _llama3(8192, 28672, 80, 64, 8),
    "qwen2-0.5b": _qwen2(896, 4864, 24, 14, 2, vocabulary=151936, tied=True),
    "qwen2-1.5b": _qwen2(1536, 8960, 28, 12, 2, vocabulary=151936, tied=True),
    "qwen2-7b": _qwen2(3584, 18944, 28, 28, 4, vocabulary=152064),
    "qwen2-72b": _qwen2(8192, 29568, 80, 64, 8, vocabulary=152064),
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, theta=1e5),
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5, theta=1e5),
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, theta=1.3e5),
}


def nearest(name: str) -> str | None:
    """The published model whose name is most like this one; None where none is."""
    near = difflib.get_close_matches(name.lower(), PUBLIC, n=1, cutoff=0.6)
    return near[0] if near else None
