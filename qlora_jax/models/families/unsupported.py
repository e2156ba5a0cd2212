"""Models that are not supported, with the part that the decoder lacks."""

LATENT = "queries, keys and values are projected through latent vectors (multi-head latent attention)"
DELTA = "most layers are linear attention (gated delta networks)"
PER_LAYER = "layers have their own token embeddings, and share keys and values"
CHUNKED = "layers attend within chunks of 8,192 positions, and scale queries by temperature"

# model_type of a whole model, or of a text half -> the reason.
REASONS = {
    **dict.fromkeys(("gemma3n", "gemma3n_text"), f"{PER_LAYER}; the residual stream has several parts (AltUp)"),
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), PER_LAYER),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_vl_v2", "kimi_k2", "kimi_vl", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("mistral4", "mistral_large4", "mistral_large4_text"), LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), DELTA),
    **dict.fromkeys(("llama4", "llama4_text"), CHUNKED),
    "mllama": "layers attend to the image (cross attention)",
}
