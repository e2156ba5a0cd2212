"""Declares the finetuning methods, and the settings of the trained parameters.

A method is declared here, without JAX, so that settings are checked and explained before it is imported.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from qlora_jax.config.fields import (
    AT_LEAST_ONE,
    AT_LEAST_TWO,
    BELOW_ONE,
    NON_NEGATIVE,
    POSITIVE,
    WORD,
    TemplateValue,
    WithoutLater,
    setting,
)
from qlora_jax.config.registry import Registry

# Settings of section `lora` that only some methods read, in the order in which errors list them.
CONDITIONAL = (
    *("init", "layers_to_transform", "target_parameters", "share_experts", "rank", "alpha", "dropout", "rank_pattern"),
    *("alpha_pattern", "use_rslora", "dtype", "feedforward_modules", "oft_block_size", "oft_blocks", "block_share"),
    *("use_cayley_neumann", "num_cayley_neumann_terms", "projection_prng_key", "d_initial", "bottleneck_activation"),
    *("target_modules", "modules_to_save", "start", "merge_into", "merge_types", "merge_from"),
)
ON_TARGETS = frozenset({"target_modules", "modules_to_save", "start"})
MERGED = ON_TARGETS | {"merge_into", "merge_types", "merge_from"}
LOW_RANK = MERGED | {"rank", "alpha", "dropout", "rank_pattern", "alpha_pattern", "use_rslora", "dtype"}
BOTTLENECK = frozenset({"rank", "dtype", "bottleneck_activation", "modules_to_save"})

type Refusals = Mapping[str, tuple[str, str]]  # export format -> (the reason, what to do)
MergeInto = Literal["q4_0", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "iq4_nl", "nf4", "nvfp4", "int4", "mxfp4"]
MERGED_FOLDERS = ("nf4", "nvfp4", "int4", "mxfp4")  # lora.merge_into of runs that are exported as a folder, not as GGUF
MERGE_IT = "Export one model instead: --format hf or gguf"
IN_RUN = "Use the run itself: qlora-jax generate --run RUN, or evaluate"


def _no_adapter(reason: str) -> Refusals:
    return dict.fromkeys(("peft", "gguf-lora"), (reason, MERGE_IT))


_NO_BOTTLENECKS = "neither peft nor llama.cpp has bottleneck adapters after attention or MLP"
_NONLINEAR = "an adapter with a nonlinearity between its two products cannot be merged into a weight"
_BOTTLENECKS_REFUSED = {
    **dict.fromkeys(("peft", "gguf-lora"), (_NO_BOTTLENECKS, IN_RUN)),
    **dict.fromkeys(("hf", "gguf"), (_NONLINEAR, IN_RUN)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodDeclaration:
    """The facts about a method that settings, messages and plans read.

    Attributes:
      summary: one line of the help of `lora.method`.
      title: name in banners and model cards.
      implementation: its `Method`, as "module:attribute".
      modules: name of the adapted modules in the banner.
      uses: names out of CONDITIONAL that it reads.
      some_layers: a projection may have adapters in some layers only.
      fast_leaves: trained arrays to which LoRA+ gives the higher learning rate; empty: LoRA+ does not apply.
      switches: trained arrays without which the others in `switched` change nothing; they are 0 at the start.
      switched: the arrays of a module that change nothing while all of its switches are 0.
      on_mesh: it trains on several devices.
      quantized: the base may be quantized.
      of_linears: it adapts weights of linear layers.
      whole_model: all of the model trains, embedding and head too.
      peft_type: of the adapter files of PEFT that hold it; empty: PEFT has no such method.
      stored_as: the method whose adapters it has; empty: its own.
      drawn_from: the setting from which its frozen arrays follow; empty: it adds none.
      refused_exports: export format -> (why it cannot hold the method, what to do).
      options: dataclass of the settings that only this method has, in lora.options; see `options_of`.
    """

    summary: str
    title: str
    implementation: str
    modules: str = "projections"
    uses: frozenset[str]
    some_layers: bool = False
    fast_leaves: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    switched: tuple[str, ...] = ()
    on_mesh: bool = True
    quantized: bool = True
    of_linears: bool = True
    whole_model: bool = False
    peft_type: str = ""
    stored_as: str = ""
    drawn_from: str = ""
    refused_exports: Refusals = dataclasses.field(default_factory=dict)
    options: type | None = None


LORA = "LORA"  # the peft_type that other programs read too
# DoRA's magnitude is not switched, because its product rounds.
_LOW_RANK_LEAVES = {"switches": ("lora_b",), "switched": ("lora_a", "lora_b"), "peft_type": LORA}
METHODS: Registry[MethodDeclaration] = Registry(
    "qlora_jax.methods",
    MethodDeclaration,
    {
        "lora": MethodDeclaration(
            summary="low-rank matrices",
            title="LoRA",
            implementation="qlora_jax.methods.lora:METHOD",
            uses=LOW_RANK | {"init", "layers_to_transform", "target_parameters", "share_experts"},
            some_layers=True,
            fast_leaves=("lora_b",),
            **_LOW_RANK_LEAVES,
        ),
        "lora_fa": MethodDeclaration(
            summary="LoRA whose A stays at its initial value",
            title="LoRA-FA",
            implementation="qlora_jax.methods.lora_fa:METHOD",
            uses=LOW_RANK | {"layers_to_transform"},
            stored_as="lora",
            some_layers=True,
            **_LOW_RANK_LEAVES,
        ),
        "dora": MethodDeclaration(
            summary="LoRA plus a trained norm per weight row",
            title="DoRA",
            implementation="qlora_jax.methods.dora:METHOD",
            uses=LOW_RANK | {"init"},
            fast_leaves=("lora_b", "magnitude"),
            **_LOW_RANK_LEAVES,
        ),
        "ia3": MethodDeclaration(
            summary="scaling vectors for keys, values and the MLP's inner activations",
            title="(IA)^3",
            implementation="qlora_jax.methods.ia3:METHOD",
            uses=MERGED | {"feedforward_modules"},
            peft_type="IA3",
        ),
        "oft": MethodDeclaration(
            summary="rotations of inputs",
            title="OFT",
            implementation="qlora_jax.methods.oft:METHOD",
            uses=MERGED
            | {
                "dtype",
                "oft_block_size",
                "oft_blocks",
                "block_share",
                "use_cayley_neumann",
                "num_cayley_neumann_terms",
            },
            peft_type="OFT",
        ),
        "vera": MethodDeclaration(
            summary="vectors that scale frozen random matrices",
            title="VeRA",
            implementation="qlora_jax.methods.vera:METHOD",
            uses=MERGED | {"rank", "dropout", "projection_prng_key", "d_initial"},
            switches=("lambda_b",),
            switched=("lambda_b", "lambda_d"),
            peft_type="VERA",
            drawn_from="projection_prng_key",
        ),
        "ln_tuning": MethodDeclaration(
            summary="the norms",
            title="LayerNorm tuning",
            implementation="qlora_jax.methods.norms:METHOD",
            modules="norms",
            uses=ON_TARGETS,
            of_linears=False,
            peft_type="LN_TUNING",
        ),
        "bitfit": MethodDeclaration(
            summary="the biases",
            title="BitFit",
            implementation="qlora_jax.methods.bitfit:METHOD",
            modules="layers with a bias",
            uses=ON_TARGETS - {"start"},
            of_linears=False,
            refused_exports=_no_adapter("neither peft nor llama.cpp has adapters that consist of biases"),
        ),
        "houlsby": MethodDeclaration(
            summary="bottleneck adapters after attention and after the MLP",
            title="Houlsby adapter",
            implementation="qlora_jax.methods.bottleneck:HOULSBY",
            modules="modules of a layer",
            uses=BOTTLENECK,
            switches=("up", "up_bias"),
            switched=("down", "down_bias", "up", "up_bias"),
            refused_exports=_BOTTLENECKS_REFUSED,
        ),
        "pfeiffer": MethodDeclaration(
            summary="after the MLP only",
            title="Pfeiffer adapter",
            implementation="qlora_jax.methods.bottleneck:PFEIFFER",
            modules="modules of a layer",
            uses=BOTTLENECK,
            switches=("up", "up_bias"),
            switched=("down", "down_bias", "up", "up_bias"),
            refused_exports=_BOTTLENECKS_REFUSED,
        ),
        "full": MethodDeclaration(
            summary="every weight of the unquantized model",
            title="full finetuning",
            implementation="qlora_jax.methods.full:METHOD",
            modules="layers",
            uses=frozenset({"dtype"}),
            on_mesh=False,
            quantized=False,
            whole_model=True,
            refused_exports=_no_adapter("all of the model was trained and not a part that an adapter could hold"),
        ),
    },
)
MethodName = Annotated[str, METHODS]


def uses(method: str, name: str) -> bool:
    """Returns True if a method reads the setting `lora.name`."""
    return name not in CONDITIONAL or name in METHODS[method].uses


def peft_types() -> tuple[str, ...]:
    """Returns the types of PEFT's adapter files that some method has."""
    return tuple(dict.fromkeys(declared.peft_type for _, declared in METHODS.items() if declared.peft_type))


def method_with_peft_type(peft_type: str) -> str | None:
    """Returns the first method whose adapter files have a type; those of other packages are looked for last."""
    if peft_type not in peft_types():
        METHODS.load_all()
    return next((name for name, declared in METHODS.items() if peft_type and declared.peft_type == peft_type), None)


def methods_with(property: str) -> tuple[str, ...]:
    """Returns the names of the methods whose declaration has a property, such as "some_layers"."""
    return tuple(name for name, declared in METHODS.items() if getattr(declared, property))


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LoraArgs(WithoutLater):
    """The trained parameters: an adapter, or the whole model."""

    method: MethodName = setting(
        "finetuning method (docs/adapters.md). "
        + ". ".join(f"{name}: {declared.summary}" for name, declared in METHODS.items()),
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
    options: dict[str, TemplateValue] = setting("settings of a method of another package: {rank: 4}", {}, later=True)
    merge_into: MergeInto | None = setting(
        "train with the weights that the export will store: each product is with the merged weight, rounded to this "
        "format (docs/training.md). q4_0, q8_0: of GGUF files, whose tables are rounded too. q6_k, q5_k_m, q4_k_m, "
        "q4_k_s, iq4_nl: the same with llama.cpp's type for each tensor. nf4: of bitsandbytes. nvfp4, int4 "
        "(groups of integers), mxfp4: of compressed-tensors. null: the adapter stays apart, and an export rounds after "
        "training",
        None,
        later=True,
    )
    merge_types: dict[str, str] = setting(
        "the type of each tensor where lora.merge_into is a mixture such as q4_k_m, one for all layers or one per "
        "layer: {self_attn.q_proj: Q4_K, mlp.down_proj: Q6_K Q4_K}. {}: llama.cpp's own, by its quantizer (the extra "
        "gguf-quantize), which a new run writes here",
        {},
        later=True,
    )
    merge_from: float = setting(
        "share of the steps after which products are with the rounded weights of lora.merge_into. Before it they are "
        "with base and adapter apart, which takes less time. 0: from the start",
        0.0,
        BELOW_ONE,
        later=True,
    )


def register_method(name: str, declaration: MethodDeclaration) -> None:
    """Adds a finetuning method to this process; commands find one by an entry point of the group qlora_jax.methods.

    Raises:
      ValueError: the name is taken.
    """
    METHODS.register(name, declaration)
