"""Declares every setting of a training run: type, default, bounds and help. Imports neither arrays nor devices."""

import dataclasses
import math
from typing import Annotated, Literal, NamedTuple

from qlora_jax.config.distillation import DistillationArgs
from qlora_jax.config.fields import (
    AT_LEAST_HUNDRED,
    AT_LEAST_ONE,
    AT_LEAST_TWO,
    BELOW_ONE,
    BLOCK_SIZE,
    DATE,
    NON_NEGATIVE,
    NOT_EMPTY,
    POSITIVE,
    TEMPLATE_CHOICES,
    UP_TO_ONE,
    Bound,
    TemplateValue,
    setting,
)
from qlora_jax.config.methods import LoraArgs, methods_with
from qlora_jax.config.objectives import HeadArgs, ObjectiveName, PreferenceArgs
from qlora_jax.config.policy import PolicyArgs
from qlora_jax.config.question_settings import QuestionArgs
from qlora_jax.config.rewards import RewardArgs
from qlora_jax.config.rollouts import RolloutArgs
from qlora_jax.config.row_formats import ROW_FORMATS
from qlora_jax.config.suggestions import suggests_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterArgs:
    """Losses of the routers of a mixture of experts (docs/training.md)."""

    aux_loss_coef: float = setting(
        "factor of the load-balancing loss, as router_aux_loss_coef in transformers, such as 0.001; 0: no such loss",
        0.0,
        NON_NEGATIVE,
    )
    z_loss_coef: float = setting(
        "factor of the router z-loss, the mean of logsumexp(logits)^2, such as 0.001; 0: no such loss",
        0.0,
        NON_NEGATIVE,
    )


AUTO = "auto"
AT_LEAST_FIVE = Bound("5 or more", lambda value: value >= 5)
_SIZE = Bound("1 or more, or auto", lambda value: value == AUTO or value >= 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshArgs:
    """The devices of a run, data x fsdp of them (docs/distributed.md). They change no result beyond rounding."""

    data: int | Literal["auto"] = setting(
        "groups of devices that share the rows of a micro-batch; each group has the whole model. auto: as many as the "
        "devices allow",
        1,
        _SIZE,
    )
    fsdp: int | Literal["auto"] = setting(
        "devices per group, which split its rows, the weights, the adapter and the optimizer state. "
        "auto: 1 if the run fits on one device, else the fewest that it fits on",
        AUTO,
        _SIZE,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsArgs:
    """The processes of a run (docs/distributed.md): the same command in each, on one machine or several."""

    launcher: Literal["auto", "off", "slurm", "ompi", "mpi4py", "k8s"] = setting(
        "the program that starts the processes and knows their number. auto: by its environment variables; off: one "
        "process",
        "auto",
    )
    coordinator: str | None = setting(
        "without a launcher: address and port of process 0, such as 10.0.0.1:1234", None, NOT_EMPTY
    )
    processes: int | None = setting("without a launcher: the number of processes", None, AT_LEAST_ONE)
    process: int | None = setting("without a launcher: the number of this process, from 0", None, NON_NEGATIVE)
    devices: list[int] | Literal["auto"] = setting(
        "local devices that this process drives, such as [0, 1]; auto: its share of those that the processes of its "
        "machine see",
        AUTO,
        NOT_EMPTY,
    )
    heartbeat: int = setting("seconds after which the death of one process ends the others", 30, AT_LEAST_FIVE)
    stuck_after: int = setting("seconds without a finished step after which a process ends", 900, AT_LEAST_ONE)


class MeshSize(NamedTuple):
    """The sizes of a mesh."""

    data: int
    fsdp: int

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return f"data {self.data}, fsdp {self.fsdp}"


def mesh_sizes(args: MeshArgs, devices: int) -> list[MeshSize]:
    """Returns the candidate meshes, in the order to try them: exactly one unless `fsdp` is auto.

    Args:
      devices: the number of devices that there are.
    """
    groups = args.data if isinstance(args.data, int) else 1
    fsdp = [args.fsdp] if isinstance(args.fsdp, int) else _divisors(max(1, devices // groups))
    if isinstance(args.data, int):
        return [MeshSize(args.data, size) for size in fsdp]
    return [MeshSize(max(1, devices // size), size) for size in fsdp]


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


suggests_settings(LoraArgs)  # here, because suggestions list the methods


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The base model and its weight format."""

    path: str = setting(
        "the base model: a Hugging Face folder with config.json and safetensors, a GGUF file, or a model on the Hub "
        "(org/name, org/name@revision, org/name/file.gguf)",
        bound=NOT_EMPTY,
        common="the base model: a Hugging Face folder, a GGUF file, or org/name on the Hub",
    )
    quant_type: Literal["nf4", "fp4", "int4", "e2m1", "e3m0", "nvfp4", "stored", "none"] = setting(
        "4-bit data type of the linear layers; stored: the files' codes, unchanged (GGUF, MXFP4, NVFP4, FP8, GPTQ, "
        "AWQ, compressed-tensors, 4-bit bitsandbytes); none: 16 bits (plain LoRA)",
        "nf4",
        common="4-bit type of linear layers: nf4, fp4, int4, e2m1, e3m0, nvfp4; stored: files' codes; none: 16 bits",
    )
    block_size: int = setting("number of weights that share one scale (absmax)", 64, BLOCK_SIZE)
    double_quant: bool = setting("quantize the scales to 8 bits too; saves 0.37 bits per weight", True)
    keep_16bit: str | list[str] = setting(
        "linear layers that stay in 16 bits: a list of names such as [down_proj, layers.0.self_attn.v_proj], or one "
        "regular expression for full names. qlora-jax quantize --measure finds those that matter most",
        [],
    )
    new_tokens: list[str] = setting(
        "tokens to add to the vocabulary (docs/tokens.md). Their rows of embedding and head train too; each starts as "
        "the mean row",
        [],
    )
    new_special_tokens: list[str] = setting(
        "special tokens to add, such as turn markers; like new_tokens, but never part of plain text (docs/tokens.md)",
        [],
    )
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "dtype of the matmuls; auto: bfloat16 where the device is fast at it, else float16 on a GPU and float32 on a "
        "CPU",
        "auto",
    )
    experts: Literal["device", "offload"] = setting(
        "where the weights of routed experts are; offload: in host memory, from which each layer fetches its own "
        "before it runs (docs/families.md)",
        "device",
    )


FormName = Annotated[str, ROW_FORMATS]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataArgs:
    """Training and evaluation data, and its tokenization."""

    train: str | dict[str, float] = setting(
        "training data: a JSONL, JSON, CSV, TSV or Parquet file, a dataset on the Hub (hf://datasets/org/name), or for "
        "objective grpo a task of reasoning-gym (reasoning_gym:NAME?size=500&seed=0). "
        "Several files take weights: {a.jsonl: 1, b.jsonl: 0.5} uses half of b.jsonl per epoch",
        bound=NOT_EMPTY,
        common="training data: a JSONL, JSON, CSV, TSV or Parquet file, or hf://datasets/org/name",
    )
    eval: str | None = setting("evaluation data: a file like train", None, common="file of evaluation data")
    eval_fraction: float = setting(
        "without eval: the fraction of train to hold out, chosen by a hash of each row",
        0.0,
        BELOW_ONE,
        common="without data.eval: fraction of data.train to hold out",
    )
    format: FormName | dict[str, FormName] = setting(
        "row format (docs/data.md). auto detects it by columns: messages (chat), sharegpt (conversations), alpaca "
        "(instruction/input/output), completion (prompt/completion), input-output, flan (inputs/targets), seed-tasks "
        "and unnatural-instructions (instances), text. hh-rlhf, guanaco, guanaco-answers and chip2 must be given. "
        "Other objectives have their own formats, such as preference (prompt/chosen/rejected). For several files: "
        "{b.jsonl: guanaco}; the others are auto",
        "auto",
    )
    columns: dict[str, str] | dict[str, dict[str, str]] | None = setting(
        "column names in the files, where they differ from the format's: {prompt: question, completion: answer}. For "
        "one of several files: {b.jsonl: {prompt: question}}",
        None,
        NOT_EMPTY,
        common="column names in the file: '{prompt: question, completion: answer}'",
    )
    bad_rows: Literal["error", "drop"] = setting(
        "treatment of rows that cannot be used, such as broken JSON or an empty answer: raise an error, or drop them. "
        "The data report counts and lists them",
        "error",
    )
    learn: Literal["assistant", "last", "all"] = setting(
        "tokens in the loss: every assistant turn, the last assistant turn, or all tokens including prompts",
        "assistant",
    )
    max_length: int = setting(
        "maximum tokens per text, special tokens included. The text is a row, a pair's prompt with one answer, or a "
        "branch with the history that it continues; a head takes one position of it",
        1024,
        AT_LEAST_TWO,
        common="maximum tokens per row",
    )
    overlong: Literal["error", "drop", "truncate-left", "truncate-right"] = setting(
        "treatment of longer rows: raise an error, drop them, or truncate them at the left or right end. The data "
        "report counts them",
        "truncate-right",
    )
    source_max_length: int | None = setting(
        "truncate the prompt on the right to this many tokens, bos included (source_max_len of the QLoRA reference). "
        "Only for rows of one prompt and one answer",
        None,
        AT_LEAST_ONE,
    )
    target_max_length: int | None = setting(
        "truncate the answer to this many tokens, eos included (target_max_len of the QLoRA reference)",
        None,
        AT_LEAST_ONE,
    )
    packing: bool = setting(
        "pack several rows into one of max_length, without padding; each row attends only to itself. A batch then "
        "holds packs, so an epoch has fewer steps",
        False,
        common="pack several rows into one of max_length",
    )
    buckets: int = setting(
        "number of padded lengths; batches group rows of similar length. Each costs one compilation", 4, AT_LEAST_ONE
    )
    cache: str | None = setting("folder for tokenized rows, reused by later runs with the same data and settings", None)
    window: int | None = setting(
        "for files larger than memory: the number of rows to load and shuffle at once, from cache; null: all rows",
        None,
        AT_LEAST_HUNDRED,
    )
    chat_template: str | None = setting(f"{TEMPLATE_CHOICES}, to use instead of the model's chat template", None)
    chat_template_kwargs: dict[str, TemplateValue] = setting(
        "variables for the chat template: {enable_thinking: false}. The run stores them, and generate and evaluate use "
        "them too",
        {},
    )
    template_date: str | None = setting(
        "the date that templates with strftime_now write, such as 2026-11-28; null: today. A run keeps the date of its "
        "start when it resumes",
        None,
        DATE,
    )

    def columns_of(self, path: str) -> dict[str, str]:
        """Returns the names of one file's columns: our name -> its name in the file."""
        by_name = {ours: theirs for ours, theirs in (self.columns or {}).items() if isinstance(theirs, str)}
        by_file = {file: names for file, names in (self.columns or {}).items() if isinstance(names, dict)}
        return by_file.get(path, by_name)

    def format_of(self, path: str) -> str:
        """Returns the name of one file's row format, or "auto"."""
        return self.format if isinstance(self.format, str) else self.format.get(path, "auto")


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
    """The optimizer and its learning rate schedule."""

    name: OptimizerName = setting(
        "optimizer and precision of its state; paged_* turns on paging unless optim.paging is set",
        "adamw_32bit",
        common="adamw_32bit, adamw_8bit, lion_32bit, lion_8bit, or paged_*",
    )
    learning_rate: float = setting("peak learning rate", 2e-4, POSITIVE, common="peak learning rate")
    loraplus_lr_ratio: float | None = setting(
        f"LoRA+ ({' and '.join(methods_with('fast_leaves'))}): B and magnitudes train at this multiple of the learning "
        "rate, such as 16; null: at the learning rate itself",
        None,
        POSITIVE,
    )
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "learning rate after warm-up: constant, or decay to zero", "constant", common="constant, linear or cosine"
    )
    warmup_ratio: float = setting("fraction of the steps in which the learning rate rises from 0", 0.03, UP_TO_ONE)
    warmup_start: Literal["zero", "first"] = setting(
        "learning rate of the first of W warm-up steps. zero: 0, as in transformers, so that step changes nothing. "
        "first: learning_rate / W",
        "zero",
    )
    weight_decay: float = setting("decoupled weight decay", 0.0, NON_NEGATIVE)
    beta1: float = setting("decay rate of the first moment", 0.9, BELOW_ONE)
    beta2: float = setting("decay rate of the second moment", 0.999, BELOW_ONE)
    eps: float = setting("added to the root of the second moment", 1e-8, POSITIVE)
    max_grad_norm: float = setting("clip gradients to this global norm; 0: no clipping", 0.3, NON_NEGATIVE)
    paging: Literal["by_name", "off", "on", "auto"] = setting(
        "page optimizer state to host memory. on: keep paging_budget of it on the device. auto: keep as much as the "
        "next batch leaves room for. by_name: auto for paged_* optimizers, else off. Results are bit-identical",
        "by_name",
    )
    paging_budget: str | None = setting(
        "paging=on: device memory for optimizer state, such as 512MiB or 2GiB; required there", None
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """Steps, batch sizes, evaluation and checkpoints. An optimizer step sees micro_batch_size x accumulation rows."""

    epochs: float = setting("passes over the training data", 1.0, POSITIVE, common="passes over the training data")
    steps: int | None = setting(
        "optimizer steps; overrides epochs", None, AT_LEAST_ONE, common="optimizer steps; overrides epochs"
    )
    micro_batch_size: int = setting(
        "rows per forward pass, on all devices together; a multiple of the number of devices",
        1,
        AT_LEAST_ONE,
        common="rows per forward pass, on all devices together",
    )
    accumulation: int = setting(
        "micro-batches per optimizer step", 16, AT_LEAST_ONE, common="micro-batches per optimizer step"
    )
    neftune_noise_alpha: float | None = setting(
        "NEFTune: adds uniform noise of at most alpha / sqrt(tokens x width) to the embeddings in training, such as 5; "
        "null: no noise",
        None,
        POSITIVE,
    )
    remat: Literal["none", "names", "attention", "full", "offload", "offload_attention"] = setting(
        "recomputation in the backward pass. none: nothing. names: norms and activation functions (as fast as none, a "
        "quarter less memory on SmolLM2). attention: everything but attention (for long rows). full: everything "
        "(slower, less memory). offload: everything, with layer inputs in host memory (GPUs only, least memory). "
        "offload_attention: as attention, with what is saved in host memory (GPUs only)",
        "names",
        common="recomputation in the backward pass: none, names, attention, full, offload",
    )
    eval_every: int = setting(
        "steps between evaluations; 0: only at the end",
        0,
        NON_NEGATIVE,
        common="steps between evaluations; 0: only at the end",
    )
    samples: str | None = setting(
        "file of prompts, as for generate --prompts. The model replies to them greedily at every evaluation, in "
        "RUN/samples.jsonl. The memory plan does not include their key-value cache",
        None,
        NOT_EMPTY,
    )
    sample_tokens: int = setting("samples: maximum tokens per reply", 64, AT_LEAST_ONE)
    save_every: int = setting(
        "steps between checkpoints; 0: only at the end",
        100,
        NON_NEGATIVE,
        common="steps between checkpoints; 0: only at the end",
    )
    keep: int = setting("number of recent checkpoints to keep", 2, AT_LEAST_ONE)
    keep_best: bool = setting("also keep the checkpoint with the lowest held-out loss", False)
    patience: int = setting(
        "stop after this many evaluations in a row without a lower held-out loss; 0: never", 0, NON_NEGATIVE
    )
    log_every: int = setting("steps between lines of progress", 1, AT_LEAST_ONE)
    track: list[Literal["tensorboard", "wandb"]] = setting(
        "experiment trackers besides metrics.jsonl: tensorboard (RUN/tensorboard), wandb; install the extra of the "
        "same name",
        [],
    )
    trace_steps: int = setting(
        "number of steps to profile, from the third step on, into RUN/trace, which Perfetto opens",
        0,
        NON_NEGATIVE,
    )
    seed: int = setting(
        "random seed of adapter initialization, shuffling, dropout and noise", 0, NON_NEGATIVE, common="random seed"
    )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Returns the number of optimizer steps of a run."""
        return self.steps or math.ceil(self.epochs * steps_per_epoch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of one training run. Relative paths start at the folder that the command runs in."""

    model: ModelArgs = setting("the base model")
    lora: LoraArgs = dataclasses.field(default_factory=LoraArgs)
    data: DataArgs = setting("the data")
    optim: OptimArgs = dataclasses.field(default_factory=OptimArgs)
    train: TrainArgs = dataclasses.field(default_factory=TrainArgs)
    preference: PreferenceArgs = dataclasses.field(default_factory=PreferenceArgs)
    head: HeadArgs = dataclasses.field(default_factory=HeadArgs)
    policy: PolicyArgs = dataclasses.field(default_factory=PolicyArgs, metadata={"later": True})
    rollouts: RolloutArgs = dataclasses.field(default_factory=RolloutArgs, metadata={"later": True})
    rewards: RewardArgs = dataclasses.field(default_factory=RewardArgs, metadata={"later": True})
    distillation: DistillationArgs = dataclasses.field(default_factory=DistillationArgs, metadata={"later": True})
    router: RouterArgs = dataclasses.field(default_factory=RouterArgs)
    questions: QuestionArgs = dataclasses.field(default_factory=QuestionArgs)
    mesh: MeshArgs = dataclasses.field(default_factory=MeshArgs)
    hosts: HostsArgs = dataclasses.field(default_factory=HostsArgs)
    objective: ObjectiveName = setting(
        "loss of the run. sft: supervised finetuning. dpo, orpo, cpo, simpo: learn from pairs of a chosen and a "
        "rejected answer; kto: from answers labelled good or bad (docs/preferences.md). classification, multi_label, "
        "regression, reward, embedding: train a head on whole sequences (docs/heads.md). grpo: learn from rewards of "
        "sampled replies. distill, gkd: learn a teacher's predictions, for the data's answers or for sampled replies",
        "sft",
        common="loss of the run: sft, dpo, kto, classification, grpo, distill or another (docs/README.md)",
    )
    reward: list[str] = setting(
        "a reward function as FILE.py:NAME, with TRL's signature (docs/rl.md); may be given several times",
        [],
        repeated=True,
        command_line=True,
    )
    tool: list[str] = setting(
        "a function that the model may call while it replies, as FILE.py:NAME (docs/rl.md); may be given several times",
        [],
        repeated=True,
        command_line=True,
    )
    environment: str | None = setting(
        "a class as FILE.py:NAME, whose objects the replies act on: TRL's environment_factory; or verifiers:NAME, a "
        "task set of that package (docs/rl.md)",
        None,
        NOT_EMPTY,
        command_line=True,
    )
    output: str = setting(
        "the run's folder, for checkpoints, metrics, report and resolved configuration",
        bound=NOT_EMPTY,
        common="the run's folder",
    )


PAGED = "paged_"


def plain_name(name: str) -> str:
    """The optimizer's name without `paged_`; paging does not change its results."""
    return name.removeprefix(PAGED)


def paging_of(optim: OptimArgs) -> Literal["off", "on", "auto"]:
    """The paging mode: optim.paging, or for `by_name` the one that the optimizer's name implies."""
    if optim.paging == "by_name":
        return "auto" if optim.name.startswith(PAGED) else "off"
    return optim.paging
