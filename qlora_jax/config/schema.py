"""Every setting of a run: its type, default, bounds and help, in one place. Knows nothing of arrays or devices."""

import dataclasses
from typing import Literal

from qlora_jax.config.fields import (
    AT_LEAST_HUNDRED,
    AT_LEAST_ONE,
    AT_LEAST_TWO,
    BELOW_ONE,
    BLOCK_SIZE,
    NON_NEGATIVE,
    NOT_EMPTY,
    POSITIVE,
    UP_TO_ONE,
    setting,
)
from qlora_jax.config.question_settings import QuestionArgs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The base model and how it is held in memory."""

    path: str = setting(
        "a Hugging Face folder with config.json and safetensors, a GGUF file, or a model on the Hub: org/name, "
        "org/name@revision, org/name/file.gguf",
        bound=NOT_EMPTY,
    )
    quant_type: Literal["nf4", "fp4", "int4", "e2m1", "e3m0", "none"] = setting(
        "4-bit code of the linear layers; none keeps them in 16 bit (plain LoRA)", "nf4"
    )
    block_size: int = setting("weights that share one scale (absmax)", 64, BLOCK_SIZE)
    double_quant: bool = setting("quantize the scales too, to 8 bits (saves 0.37 bits a weight)", True)
    new_tokens: list[str] = setting(
        "tokens added to the vocabulary; their rows of embedding and head train too, and begin as the mean row", []
    )
    new_special_tokens: list[str] = setting(
        "likewise, of tokens that are no text, such as marks of turns (docs/tokens.md)", []
    )
    compute_dtype: Literal["auto", "bfloat16", "float32"] = setting(
        "dtype of the matmuls; auto: bfloat16 where the device is fast at it, else float32", "auto"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraArgs:
    """What trains: adapters, or the model itself."""

    method: Literal["lora", "dora", "ia3", "full"] = setting(
        "what trains (docs/adapters.md). lora; dora: LoRA and the length of each row of the weight; ia3: vectors "
        "alone, on keys, values and the MLP's inner activations; full: no adapter, every weight of the model, of which "
        "none is quantized then",
        "lora",
    )
    init: Literal["default", "pissa", "loftq"] = setting(
        "what A and B begin with. default: A random, B zero. pissa: the largest singular parts of each weight, of "
        "which the rest is quantized. loftq: what quantization takes from each weight",
        "default",
    )
    svd_niter: int = setting(
        "pissa and loftq: power iterations of a randomized decomposition, such as 4 or 16; 0 computes the whole one, "
        "which takes long for large models",
        0,
        NON_NEGATIVE,
    )
    loftq_iterations: int = setting(
        "loftq: how often a weight is quantized and what is missing decomposed", 1, AT_LEAST_ONE
    )
    rank: int = setting("columns of lora_a, rows of lora_b", 16, AT_LEAST_ONE)
    alpha: float = setting("the update is scaled by alpha / rank", 32.0, POSITIVE)
    dropout: float = setting("share of adapter inputs zeroed while training", 0.0, BELOW_ONE)
    target_modules: str | list[str] = setting(
        "layers that get an adapter: all-linear (every linear layer but the head), a list of names such as "
        "[q_proj, v_proj], or one regular expression over full names; auto: all-linear, and for ia3 the projections of "
        "keys and values and the MLP's last",
        "auto",
        NOT_EMPTY,
    )
    feedforward_modules: list[str] | None = setting(
        "ia3: those targets whose inputs are scaled, not their results; null: the MLP's last projection", None
    )
    rank_pattern: dict[str, int] = setting("another rank where a name matches: {down_proj: 8}", {})
    alpha_pattern: dict[str, float] = setting("another alpha where a name matches: {down_proj: 16.0}", {})
    use_rslora: bool = setting("scale by alpha / sqrt(rank) instead (rank-stabilized LoRA)", False)
    modules_to_save: list[str] = setting(
        "tables that train whole beside the adapters, of [embed_tokens, lm_head] (docs/tokens.md): copies as large as "
        "they, their gradients and optimizer state besides",
        [],
    )
    start: str | None = setting("a PEFT adapter's folder to go on from; its rank and alpha must be those above", None)
    dtype: Literal["float32", "bfloat16"] = setting(
        "what adapters (with full: matrices) are stored in, and their gradients; bfloat16 is half the bytes, and "
        "each update, computed in float32, is rounded to it",
        "float32",
    )


FormName = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "completion",
    "input-output",
    "seed-tasks",
    "unnatural-instructions-full",
    "unnatural-instructions",
    "flan",
    "hh-rlhf",
    "guanaco",
    "chip2",
    "text",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataArgs:
    """Training and held-out rows, and how they become tokens."""

    train: str | dict[str, float] = setting(
        "training rows: a JSONL, JSON, CSV, TSV or Parquet file, or a data set on the Hub (hf://datasets/org/name); "
        "or several and how often an epoch goes through each: {a.jsonl: 1, b.jsonl: 0.5}",
        bound=NOT_EMPTY,
    )
    eval: str | None = setting("file of held-out rows", None)
    eval_fraction: float = setting(
        "without eval: hold out about this share of train, by a hash of the row", 0.0, BELOW_ONE
    )
    format: FormName | dict[str, FormName] = setting(
        "form of the rows (docs/data.md); auto looks at the columns: messages (chat), sharegpt (conversations), alpaca "
        "(instruction/input/output), completion (prompt/completion), input-output, flan (inputs/targets), "
        "seed-tasks and unnatural-instructions (instances), text; hh-rlhf, guanaco and chip2 have to be named. Of "
        "several files: {b.jsonl: guanaco}, the others being auto",
        "auto",
    )
    learn: Literal["assistant", "last", "all"] = setting(
        "what the loss sees: every turn of the assistant, its last turn alone, or all of a row, prompts too (train on "
        "source)",
        "assistant",
    )
    max_length: int = setting("tokens of a row at most, its special tokens included", 1024, AT_LEAST_TWO)
    overlong: Literal["error", "drop", "truncate-left", "truncate-right"] = setting(
        "what happens to longer rows (they are counted): refused, left out, or cut at their beginning or end",
        "truncate-right",
    )
    source_max_length: int | None = setting(
        "cut what comes before the answer to so many tokens, bos included, on its right: source_max_len of the "
        "reference; rows of one prompt and one answer only",
        None,
        AT_LEAST_ONE,
    )
    target_max_length: int | None = setting(
        "cut the answer, eos included, to so many tokens: target_max_len of the reference", None, AT_LEAST_ONE
    )
    packing: bool = setting(
        "put several rows into one of max_length, each seeing itself alone: no token is wasted on padding. A batch's "
        "rows are then packs, so an epoch has fewer steps",
        False,
    )
    buckets: int = setting(
        "padded lengths that batches come in, rows of like length together (group by length); each costs one "
        "compilation",
        4,
        AT_LEAST_ONE,
    )
    cache: str | None = setting(
        "folder that keeps rows as tokens, by their content and all they follow from, for later runs", None
    )
    window: int | None = setting(
        "rows that are in memory and shuffled at once, read from cache in the file's order: for files larger than "
        "memory. null: all",
        None,
        AT_LEAST_HUNDRED,
    )
    chat_template: str | None = setting("a jinja file used instead of the model's own chat template", None)


OptimizerName = Literal[
    "adamw_32bit",
    "adamw_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimArgs:
    """The optimizer and its schedule."""

    name: OptimizerName = setting(
        "optimizer and bits of its state; paged_: optim.paging is auto unless it is set", "adamw_32bit"
    )
    learning_rate: float = setting("peak learning rate", 2e-4, POSITIVE)
    schedule: Literal["constant", "linear", "cosine"] = setting("after the warm-up: stay, or fall to zero", "constant")
    warmup_ratio: float = setting("share of the steps over which the learning rate rises from 0", 0.03, UP_TO_ONE)
    weight_decay: float = setting("decoupled weight decay", 0.0, NON_NEGATIVE)
    beta1: float = setting("decay of the mean of gradients", 0.9, BELOW_ONE)
    beta2: float = setting("decay of the mean of squared gradients", 0.999, BELOW_ONE)
    eps: float = setting("added to the root of the second moment", 1e-8, POSITIVE)
    max_grad_norm: float = setting("gradients are scaled down to this global norm; 0 turns it off", 0.3, NON_NEGATIVE)
    paging: Literal["by_name", "off", "on", "auto"] = setting(
        "optimizer state in pages that wait in host memory: on keeps paging_budget of them on the device, auto what "
        "the next batch leaves room for; results are the same to the bit. by_name: auto where the optimizer's name "
        "begins with paged_, else off",
        "by_name",
    )
    paging_budget: str | None = setting("device memory for pages, such as 512MiB or 2GiB; paging=on needs it", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """Steps, batches, and what is written when. An optimizer step sees micro_batch_size x accumulation rows."""

    epochs: float = setting("passes over the training rows", 1.0, POSITIVE)
    steps: int | None = setting("optimizer steps; overrides epochs", None, AT_LEAST_ONE)
    micro_batch_size: int = setting("rows that go through the model at once", 1, AT_LEAST_ONE)
    accumulation: int = setting("micro-batches an optimizer step", 16, AT_LEAST_ONE)
    remat: Literal["none", "names", "full", "offload"] = setting(
        "what is computed again in the backward pass: none: nothing; names: norms and activations (as fast, a quarter "
        "less memory on SmolLM2); full: everything (slower, less memory); offload: everything, and layers' inputs wait "
        "in host memory (GPUs alone; least memory)",
        "names",
    )
    eval_every: int = setting("evaluate every so many steps; 0: only at the end", 0, NON_NEGATIVE)
    samples: str | None = setting(
        "file of prompts, as generate --prompts takes it, that the model replies to at every evaluation (greedily): "
        "RUN/samples.jsonl; its cache comes on top of the memory plan",
        None,
        NOT_EMPTY,
    )
    sample_tokens: int = setting("with samples: tokens of a reply at most", 64, AT_LEAST_ONE)
    save_every: int = setting("save a checkpoint every so many steps; 0: only at the end", 100, NON_NEGATIVE)
    keep: int = setting("checkpoints kept, the newest", 2, AT_LEAST_ONE)
    keep_best: bool = setting(
        "also keep the checkpoint with the least held-out loss; it is saved when its evaluation is done", False
    )
    patience: int = setting(
        "stop after so many evaluations in a row without less held-out loss than before; 0: never", 0, NON_NEGATIVE
    )
    log_every: int = setting("report every so many steps", 1, AT_LEAST_ONE)
    track: list[Literal["tensorboard", "wandb"]] = setting(
        "where metrics go besides metrics.jsonl: tensorboard (RUN/tensorboard), wandb; each is an extra to install", []
    )
    trace_steps: int = setting(
        "write a profiler's trace of so many steps, from the third of a start on, to RUN/trace; Perfetto opens it",
        0,
        NON_NEGATIVE,
    )
    seed: int = setting("seed of adapters, shuffling and dropout", 0, NON_NEGATIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training run. Paths are relative to the folder that the command runs in."""

    model: ModelArgs = setting("the base model")
    lora: LoraArgs = dataclasses.field(default_factory=LoraArgs)
    data: DataArgs = setting("the data")
    optim: OptimArgs = dataclasses.field(default_factory=OptimArgs)
    train: TrainArgs = dataclasses.field(default_factory=TrainArgs)
    questions: QuestionArgs = dataclasses.field(default_factory=QuestionArgs)
    output: str = setting("folder of the run: checkpoints, metrics, plot, resolved config", bound=NOT_EMPTY)
