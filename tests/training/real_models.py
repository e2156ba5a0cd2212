"""The features of published models, by the names of pallas_kernels.nf4_matmul.shapes."""

from qlora_jax.models.config import ModelConfig
from qlora_jax.nn.rope import Rope, RopeScaling


def _model(width: int, heads: int, kv_heads: int, inner: int, layers: int, vocab: int, **features) -> ModelConfig:
    head_dim = width // heads
    scaling = features.pop("scaling", RopeScaling())
    return ModelConfig(
        vocab_size=vocab,
        embed_dim=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=inner,
        norm_eps=1e-5,
        rope=Rope(theta=10000.0, dim=head_dim, max_positions=8192, scaling=scaling),
        max_positions=8192,
        **{"tie_embeddings": False} | features,
    )


REAL_MODELS = {
    "smollm2-135m": _model(576, 9, 3, 1536, 30, 49152, tie_embeddings=True),
    "qwen2-0.5b": _model(896, 14, 2, 4864, 24, 151936, tie_embeddings=True, qkv_bias=True),
    "llama-3-8b": _model(4096, 32, 8, 14336, 32, 128256),
    "llama-2-7b": _model(4096, 32, 32, 11008, 32, 32000),
    "llama-65b": _model(8192, 64, 64, 22016, 80, 32000),
}
