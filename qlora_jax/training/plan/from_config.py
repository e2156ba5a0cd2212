"""From settings to what a plan is made of: the step's setting, the compiler for its device, and words for both."""

from collections.abc import Sequence
from pathlib import Path

from pallas_kernels import aot
from qlora_jax.config import Config, LoraArgs, paging_of
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.precision import weight_format
from qlora_jax.training.plan.requirements import CompileStep, StepConfig, compile_here, compile_on_card
from qlora_jax.training.plan.settings import PlanArgs
from qlora_jax.training.plan.target import CPU, PlanTarget, model_features
from qlora_jax.training.session import open_inputs

GIB = 2**30


def step_config(args: PlanArgs, target: PlanTarget, buckets: Sequence[int]) -> StepConfig:
    """What the longest step needs its memory for: of the longest bucket, or data.max_length where none is known.

    Raises:
      ValueError: no such model, or rows longer than it was made for.
    """
    model = model_features(args.model.path)
    if args.data.max_length > model.max_positions:
        raise ValueError(
            f"data.max_length={args.data.max_length} is longer than the model allows, which was made for "
            f"{model.max_positions} positions"
        )
    weights = weight_format(args.model, CPU if target.card is None else "gpu")
    new = len(args.model.new_tokens) + len(args.model.new_special_tokens)
    ids = tuple(range(model.vocab_size, model.vocab_size + new))  # whichever they will be, their rows are as large
    return run_step_config(args, model, weights, max(buckets, default=args.data.max_length), ids)


def data_buckets(args: PlanArgs) -> tuple[tuple[int, ...], str | None]:
    """(the lengths that batches of data.train come in, empty where they are not known; why they are not).

    Raises:
      ValueError: whatever is wrong with the data, or with the model's tokenizer.
    """
    if args.data.train is None:
        return (), None
    place = Path(args.model.path).expanduser()
    if not place.exists() or place.suffix == ".json":
        why = f"{args.model.path} is a configuration alone, without a tokenizer that data.train could be counted with"
        return (), why
    return open_inputs(args).dataset.buckets, None


def run_step_config(
    config: Config, model: ModelConfig, weights: WeightFormat, length: int, new_ids: tuple[int, ...]
) -> StepConfig:
    """The setting of a run's steps with rows of `length` tokens; `new_ids` of its new tokens."""
    train = config.train
    return StepConfig(
        model=model,
        weights=weights,
        lora=config.lora,
        optim=config.optim,
        batch=(train.accumulation, train.micro_batch_size, length),
        remat=train.remat,
        paged=paging_of(config.optim) != "off",
        new_ids=new_ids,
    )


def compiler_for(target: PlanTarget) -> tuple[CompileStep | None, str | None]:
    """(what compiles for the target, why nothing does)."""
    if target.card is None:
        return compile_here, None
    problem = aot.problem()
    return (None, problem) if problem else (compile_on_card(target.card.name), None)


def _method(lora: LoraArgs) -> str:
    return f"rank {lora.rank}" if lora.method in ("lora", "dora") else f"lora.method={lora.method}"


def plan_title(args: PlanArgs, target: PlanTarget, setting: StepConfig) -> str:
    """What is planned, on what."""
    _, rows, length = setting.batch
    place = "this CPU" if target.card is None else target.card.description
    return (
        f"{args.model.path}, {_method(args.lora)}, {rows} x {length} tokens, "
        f"remat {setting.remat}, on {place} ({target.memory_bytes / GIB:,.2f} GiB)"
    )
