"""Declares the settings of the trained parameters: the method, and each method's own."""

import dataclasses
from typing import Literal

from qlora_jax.config.fields import (
    AT_LEAST_ONE,
    AT_LEAST_TWO,
    BELOW_ONE,
    NON_NEGATIVE,
    POSITIVE,
    WORD,
    setting,
)
from qlora_jax.config.keyword_suggestions import suggests_settings
from qlora_jax.config.method_names import MethodName


@suggests_settings
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraArgs:
    """The trained parameters: an adapter, or the whole model."""

    method: MethodName = setting(
        "finetuning method (docs/adapters.md). lora: low-rank matrices. lora_fa: LoRA whose A stays at its initial "
        "value. dora: LoRA plus a trained norm per weight row. ia3: scaling vectors for keys, values and the MLP's "
        "inner activations. oft: rotations of inputs. vera: vectors that scale frozen random matrices. ln_tuning: the "
        "norms. bitfit: the biases. houlsby: bottleneck adapters after attention and after the MLP. pfeiffer: after "
        "the MLP only. full: every weight of the unquantized model",
        "lora",
        common="finetuning method, such as lora, dora, full",
    )
    init: Literal["default", "pissa", "loftq"] = setting(
        "initial adapter. default: A random, B zero. pissa: the largest singular components of each weight; the "
        "remainder is quantized. loftq: an approximation of the quantization error",
        "default",
    )
    svd_niter: int = setting(
        "pissa and loftq: power iterations of the randomized SVD, such as 4 or 16; 0: the exact SVD, slow for large "
        "models",
        0,
        NON_NEGATIVE,
    )
    loftq_iterations: int = setting("loftq: alternations between quantization and SVD", 1, AT_LEAST_ONE)
    rank: int = setting(
        "rank of the adapter: columns of lora_a, rows of lora_b; houlsby, pfeiffer: width of the bottleneck",
        16,
        AT_LEAST_ONE,
        common="LoRA rank",
    )
    alpha: float = setting(
        "the adapter's output is scaled by alpha / rank", 32.0, POSITIVE, common="LoRA alpha; scaling is alpha / rank"
    )
    dropout: float = setting("dropout rate of the adapter's inputs in training", 0.0, BELOW_ONE)
    target_modules: str | list[str] = setting(
        "layers with an adapter: all-linear (every linear layer except the head), a list of names such as [q_proj, "
        "v_proj], or one regular expression for full names. auto: all-linear; for ia3 the key and value projections "
        "and the MLP's last projection; for ln_tuning all norms except those of queries and keys; for bitfit all "
        "layers with a bias",
        "auto",
        common="layers with an adapter: all-linear, or a list such as [q_proj, v_proj]",
    )
    target_parameters: list[str] = setting(
        "lora on a mixture of experts: parameters with an adapter, by transformers' names: [mlp.experts.gate_up_proj, "
        "mlp.experts.down_proj] for the routed experts, mlp.gate (gpt-oss: mlp.router) for the router. target_modules "
        "does not select these; set it to [] for adapters only on these. layers_to_transform does not apply, but a "
        "name may have a layer's index",
        [],
    )
    share_experts: bool = setting(
        "target_parameters: all experts of a layer share one adapter; false: each expert has its own", False
    )
    layers_to_transform: int | list[int] | str | None = setting(
        "lora and lora_fa: layers with an adapter, from 0: a list such as [0, 2], or ranges such as 8-15,20. null: "
        "all. Not with a regular expression in target_modules, which may select layers itself",
        None,
    )
    feedforward_modules: list[str] | None = setting(
        "ia3: target modules whose inputs are scaled instead of their outputs; null: the MLP's last projection", None
    )
    bottleneck_activation: Literal["gelu", "relu", "silu"] = setting(
        "houlsby, pfeiffer: the function between the two projections of an adapter", "gelu"
    )
    oft_block_size: int = setting(
        "oft: neighbouring inputs that rotate together; it divides the inputs of each target module", 32, AT_LEAST_TWO
    )
    oft_blocks: int = setting(
        "oft: number of blocks of each target module, in place of oft_block_size; 0: oft_block_size decides",
        0,
        NON_NEGATIVE,
    )
    block_share: bool = setting("oft: all blocks of a target module share one rotation", False)
    use_cayley_neumann: bool = setting(
        "oft: compute rotations by a series, which is fast but exact only for small angles; false: by a linear solve",
        True,
    )
    num_cayley_neumann_terms: int = setting("oft: terms of this series", 5, AT_LEAST_TWO)
    projection_prng_key: int = setting("vera: seed of the frozen matrices, which all layers share", 0, WORD)
    d_initial: float = setting("vera: initial value of the vector that scales the first product", 0.1, POSITIVE)
    rank_pattern: dict[str, int] = setting("a different rank for matching names: {down_proj: 8}", {})
    alpha_pattern: dict[str, float] = setting("a different alpha for matching names: {down_proj: 16.0}", {})
    use_rslora: bool = setting("scale by alpha / sqrt(rank) instead (rank-stabilized LoRA)", False)
    modules_to_save: list[str] = setting(
        "tables to train in full next to the adapter, out of [embed_tokens, lm_head] (docs/tokens.md). Each needs "
        "memory for a full copy, its gradient and its optimizer state",
        [],
    )
    start: str | None = setting(
        "folder of a PEFT adapter to start from; its rank and alpha must equal the settings above", None
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "storage dtype of trained parameters and their gradients. bfloat16 needs half the memory; each update is "
        "computed in float32 and rounded",
        "float32",
    )
