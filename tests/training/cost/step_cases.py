"""Steps of small models that between them have every feature, adapter and policy, whose counts tests compare."""

import dataclasses
import math

from qlora_jax.config import LoraArgs
from qlora_jax.models.config import ExpertsConfig, ModelConfig
from qlora_jax.nn.rope import QueryPositionScale, Rope
from qlora_jax.training.cost.step_shape import StepShape

LAYERS = 7  # no other loop runs as often
MODEL = ModelConfig(
    vocab_size=1000,
    embed_dim=192,
    num_layers=LAYERS,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=320,
    norm_eps=1e-5,
    rope=Rope(theta=1e4, dim=32, max_positions=2048),
    tie_embeddings=False,
    qkv_bias=True,
    max_positions=2048,
)
EVERY = LoraArgs(rank=8, rank_pattern={"down_proj": 16})
FIXED_A = LoraArgs(method="lora_fa", rank=8)
MERGED = LoraArgs(rank=8, merge_into="q4_0")
SOME = LoraArgs(rank=8, target_modules=["q_proj", "v_proj"], dropout=0.1)
# Of ranks for whose norms no C++ handler multiplies from the codes, which a compiled text would not tell.
DORA = LoraArgs(method="dora", rank=16, rank_pattern={"down_proj": 12})
SOME_DORA = dataclasses.replace(SOME, method="dora", rank=16)
IA3 = LoraArgs(method="ia3")
OFT = LoraArgs(method="oft", oft_block_size=32)
SOME_OFT = LoraArgs(method="oft", oft_blocks=16, block_share=True, target_modules=["q_proj", "o_proj", "down_proj"])
EXACT_OFT = dataclasses.replace(OFT, use_cayley_neumann=False, dtype="bfloat16")
VERA = LoraArgs(method="vera", rank=24)
SOME_VERA = LoraArgs(method="vera", rank=24, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"], dropout=0.1)
WHOLE = LoraArgs(method="full")
LN_TUNING, BITFIT = LoraArgs(method="ln_tuning"), LoraArgs(method="bitfit")
HOULSBY, PFEIFFER = LoraArgs(method="houlsby", rank=8), LoraArgs(method="pfeiffer", rank=8)
EVERY_IA3 = LoraArgs(method="ia3", target_modules="all-linear", feedforward_modules=["up_proj", "gate_proj", "o_proj"])
# Features of other families, between them all that change what is multiplied, held or kept.
LIKE_GEMMA3 = dataclasses.replace(
    MODEL,
    layout="both",
    qk_norm="head",
    norm_offset=1.0,
    windows=(40, None) * 3 + (40,),
    ropes=(Rope(theta=5e3, dim=32, max_positions=2048), MODEL.rope) * 3 + (MODEL.rope,),
    attention_softcap=5.0,
    head_softcap=3.0,
    activation="gelu_tanh",
)
SPARSE = ExpertsConfig(
    count=8, per_token=2, mlp_dim=128, layers=tuple(range(LAYERS)), shared_mlp_dim=64, shared_gate=True
)
MIXTURE = dataclasses.replace(MODEL, experts=SPARSE)
ON_EXPERTS = LoraArgs(rank=8, target_parameters=["gate_up_proj", "mlp.experts.down_proj", "mlp.gate"])
LIKE_OLMO2 = dataclasses.replace(MODEL, layout="post", qk_norm="width")
LIKE_PHI3 = dataclasses.replace(MODEL, fused_qkv="parts", fused_gate_up=True)
PLAIN_MLP = dict(norm="layer", gated=False, o_bias=True, mlp_bias=True, activation="gelu")
LIKE_PHI = dataclasses.replace(MODEL, layout="parallel, one norm", head_bias=True, **PLAIN_MLP)
LIKE_NEOX = dataclasses.replace(MODEL, layout="parallel", num_kv_heads=6, fused_qkv="heads", **PLAIN_MLP)
LIKE_COHERE2 = dataclasses.replace(
    MODEL,
    layout="parallel, one norm",
    norm="layer without bias",
    rope_interleaved=True,
    query_position_scale=QueryPositionScale(beta=0.1, period=64),
    residual_scale=0.3,
    logit_scale=0.25,
)
# Lengths: one chunk of attention, 3 with padding in the last, and 9.
CASES = {
    "none": (MODEL, "none", (1, 2, 320), EVERY),
    "names": (MODEL, "names", (2, 2, 320), EVERY),
    "full": (MODEL, "full", (1, 2, 320), EVERY),
    "names, two adapters": (MODEL, "names", (1, 1, 320), SOME),
    "none, two adapters": (MODEL, "none", (1, 1, 320), SOME),
    "names, bf16 adapters": (MODEL, "names", (2, 2, 320), dataclasses.replace(EVERY, dtype="bfloat16")),
    "names, dora": (MODEL, "names", (2, 2, 320), DORA),
    "names, ia3": (MODEL, "names", (1, 2, 320), IA3),
    "names, long": (MODEL, "names", (1, 1, 1152), EVERY),
    "full, short": (MODEL, "full", (1, 2, 100), EVERY),
    "full, not unrolled": (MODEL, "full", (1, 3, 200), EVERY),
    "attention": (MODEL, "attention", (1, 2, 320), EVERY),
    "full, mlp in chunks": (MODEL, "full", (1, 2, 2176), EVERY),
}
FAMILIES = {
    f"{name}, {remat}": (model, remat, (1, 2, 320), EVERY)
    for name, model in {"gemma3": LIKE_GEMMA3, "olmo2": LIKE_OLMO2, "phi3": LIKE_PHI3, "phi": LIKE_PHI}.items()
    for remat in ("none", "names")
} | {
    "neox, none": (LIKE_NEOX, "none", (1, 2, 320), EVERY),
    "gemma3, full": (LIKE_GEMMA3, "full", (1, 2, 320), EVERY),
    "cohere2, names": (LIKE_COHERE2, "names", (1, 2, 320), EVERY),
}
NEW_IDS = (1000, 1001, 1002, 7, 998)
NEW_TOKENS = {
    "names, new tokens": (MODEL, "names", (2, 2, 320), EVERY, NEW_IDS),
    "names, new tokens, tied": (
        *(dataclasses.replace(MODEL, tie_embeddings=True), "names", (1, 2, 320)),
        *(dataclasses.replace(EVERY, dtype="bfloat16"), NEW_IDS),
    ),
}
BOTH = ["embed_tokens", "lm_head"]
NEW_TOKENS |= {
    "names, whole tables": (MODEL, "names", (2, 2, 320), dataclasses.replace(EVERY, modules_to_save=BOTH)),
    "names, whole head": (
        *(MODEL, "names", (1, 2, 320)),
        *(dataclasses.replace(EVERY, modules_to_save=BOTH[1:], dtype="bfloat16"), (1000, 1001, 1002)),
    ),
    "names, tied and whole": (
        *(dataclasses.replace(MODEL, tie_embeddings=True), "names", (1, 2, 320)),
        *(dataclasses.replace(EVERY, modules_to_save=BOTH[:1]), (1000, 1001)),
    ),
}
IN_HANDLERS = ("names, C++ attention", "full, C++ attention")
CASES |= {IN_HANDLERS[0]: (MODEL, "names", (2, 2, 320), EVERY), IN_HANDLERS[1]: (MODEL, "full", (1, 2, 100), EVERY)}
METHODS = {
    "names, merged": (MODEL, "names", (2, 2, 320), MERGED),
    "none, merged": (MODEL, "none", (1, 2, 320), MERGED),
    "full, merged": (MODEL, "full", (1, 2, 320), MERGED),
    "names, merged dora": (MODEL, "names", (1, 2, 320), dataclasses.replace(DORA, merge_into="q4_0")),
    "names, merged lora_fa": (MODEL, "names", (1, 2, 320), dataclasses.replace(FIXED_A, merge_into="q4_0")),
    "names, lora_fa": (MODEL, "names", (1, 2, 320), FIXED_A),
    "none, lora_fa": (MODEL, "none", (1, 2, 320), FIXED_A),
    "none, dora": (MODEL, "none", (1, 2, 320), DORA),
    "full, dora": (MODEL, "full", (1, 2, 320), DORA),
    "names, dora and dropout": (MODEL, "names", (1, 2, 320), SOME_DORA),
    "full, dora and dropout": (MODEL, "full", (1, 2, 320), SOME_DORA),
    "names, dora in bf16": (MODEL, "names", (1, 2, 320), dataclasses.replace(DORA, dtype="bfloat16")),
    "names, oft": (MODEL, "names", (2, 2, 320), OFT),
    "full, vera": (MODEL, "full", (1, 2, 320), VERA),
    "none, oft": (MODEL, "none", (1, 2, 320), OFT),
    "full, oft": (MODEL, "full", (1, 2, 320), OFT),
    "none, oft, shared": (MODEL, "none", (1, 2, 320), SOME_OFT),
    "names, oft, exact": (MODEL, "names", (1, 2, 320), EXACT_OFT),
    "none, vera": (MODEL, "none", (1, 2, 320), VERA),
    "names, vera": (MODEL, "names", (2, 2, 320), VERA),
    "names, vera and dropout": (MODEL, "names", (1, 2, 320), SOME_VERA),
    "none, ia3": (MODEL, "none", (1, 2, 320), IA3),
    "full, ia3": (MODEL, "full", (1, 2, 320), IA3),
    "names, ln_tuning": (LIKE_GEMMA3, "names", (1, 2, 320), LN_TUNING),
    "full, bitfit": (LIKE_NEOX, "full", (1, 2, 320), BITFIT),
    "none, bitfit": (MODEL, "none", (1, 2, 320), BITFIT),
    "names, houlsby": (MODEL, "names", (2, 2, 320), HOULSBY),
    "none, houlsby": (LIKE_OLMO2, "none", (1, 2, 320), HOULSBY),
    "full, houlsby": (MODEL, "full", (1, 2, 320), HOULSBY),
    "full, pfeiffer in bf16": (LIKE_GEMMA3, "full", (1, 2, 320), dataclasses.replace(PFEIFFER, dtype="bfloat16")),
    "none, ia3 everywhere": (MODEL, "none", (1, 2, 320), EVERY_IA3),
    "names, ia3 everywhere": (MODEL, "names", (1, 2, 320), EVERY_IA3),
    "full, ia3 everywhere": (MODEL, "full", (1, 2, 320), EVERY_IA3),
}
# With dense weights: the product of a frozen one is XLA's, and so is that of one that trains.
NOT_QUANTIZED = {
    "names, whole": (MODEL, "names", (2, 2, 320), WHOLE),
    "none, whole": (MODEL, "none", (1, 2, 320), WHOLE),
    "full, whole in bf16": (MODEL, "full", (1, 2, 320), dataclasses.replace(WHOLE, dtype="bfloat16")),
    "names, whole, neox": (LIKE_NEOX, "names", (1, 2, 320), WHOLE),
}
MIXTURES = {
    "names, experts": (MIXTURE, "names", (2, 2, 320), ON_EXPERTS),
    "full, experts": (MIXTURE, "full", (1, 2, 320), ON_EXPERTS),
    "none, experts": (MIXTURE, "none", (1, 2, 320), EVERY),
}
FAMILIES |= METHODS | NEW_TOKENS | NOT_QUANTIZED | MIXTURES


def counted_step(model, weights, step, batch, lora, **settings) -> StepShape:
    """The counts of an abstract step."""
    return StepShape(model=model, weights=weights, lora=lora, batch=batch, remat=step.remat, **settings)


def leaf_bytes(leaf) -> int:
    """The bytes of an array or of its shape."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize
