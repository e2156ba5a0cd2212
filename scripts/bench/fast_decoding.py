"""Measures what faster decoding changes in logits: products of integers, and a head in 8 or 4 bits.

    python -m scripts.bench.fast_decoding [--tokens 2048]

SmolLM2-135M-Instruct in NF4 reads a text in calls of 8 tokens, as decoding does. Each row compares one setting with
products in f32 and a head in 16 bits:

  KL        mean Kullback-Leibler divergence of the next token's distribution from that of f32, in nats
  same      positions whose likeliest token is the same
  loss      mean negative log-likelihood of the text, in nats
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import KVPages
from qlora_jax import runtime
from qlora_jax.config import ModelArgs
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.inference.fast_decoding import for_fast_decoding
from qlora_jax.inference.settings import ComputeDtype
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, combine, partition
from qlora_jax.models.precision import weight_format
from scripts.fetch_smollm2 import fetch_smollm2

TEXT = "examples/titles/heldout.jsonl"
AT_ONCE = 8  # tokens per call
SETTINGS: list[tuple[ComputeDtype, bool, int]] = [  # compute dtype, integer, head_bits
    ("float32", False, 16),
    ("bfloat16", False, 16),
    ("float32", False, 8),
    ("float32", False, 4),
    ("float32", True, 16),
    ("float32", True, 8),
    ("float32", True, 4),
]


@functools.partial(jax.jit, donate_argnums=3)
def _log_probs(parts: ModelParts, tokens_1T: jax.Array, positions_1T: jax.Array, cache):
    model = combine(parts)
    hidden_TD, cache = model.extend(tokens_1T, jnp.zeros_like(tokens_1T), positions_1T, cache)
    return jax.nn.log_softmax(model.head.logits(hidden_TD)), cache


def log_probs_of(parts: ModelParts, ids: np.ndarray) -> np.ndarray:
    """Returns the log-probabilities [T, V] of the token after each one."""
    model = combine(parts)
    config, dtype = model.config, model.model.embed_tokens.weight[...].dtype
    heads = config.num_kv_heads, config.head_dim
    cache = KVPages.for_rows(config.num_layers, 1, len(ids), heads, dtype)
    found = []
    for start in range(0, len(ids), AT_ONCE):
        tokens_1T = jnp.asarray(ids[None, start : start + AT_ONCE])
        positions_1T = start + jnp.arange(tokens_1T.shape[1], dtype=jnp.int32)[None]
        log_probs_TV, cache = _log_probs(parts, tokens_1T, positions_1T, cache)
        found.append(np.asarray(log_probs_TV))
    return np.concatenate(found)


def main() -> None:
    """Prints a line per setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="a multiple of 8")
    args = parser.parse_args()
    runtime.start()
    path = fetch_smollm2()
    source = open_model(path)
    config = model_config(source.config)
    with open(TEXT, encoding="utf-8") as lines:
        text = "\n\n".join(json.loads(line)["messages"][0]["content"] for line in lines)
    ids = np.asarray(load_tokenizer(source.tokenizer).encode(text)[: args.tokens], np.int32)
    exact_TV = None
    print(f"{'products':<12}{'head':>6}{'KL':>12}{'same':>9}{'loss':>9}")
    for dtype, integer, head_bits in SETTINGS:
        weights = weight_format(ModelArgs(path=str(path), compute_dtype=dtype), config)
        parts = for_fast_decoding(
            partition(load_model(source, config, weights).model), integer=integer, head_bits=head_bits
        )
        found_TV = log_probs_of(parts, ids)
        exact_TV = found_TV if exact_TV is None else exact_TV
        divergence = np.mean(np.sum(np.exp(exact_TV) * (exact_TV - found_TV), axis=1))
        same = np.mean(exact_TV.argmax(axis=1) == found_TV.argmax(axis=1))
        loss = -np.mean(found_TV[np.arange(len(ids) - 1), ids[1:]])
        name = "integers" if integer else dtype
        print(f"{name:<12}{head_bits:>6}{divergence:>12.2e}{100 * same:>8.1f}%{loss:>9.4f}", flush=True)


if __name__ == "__main__":
    main()
