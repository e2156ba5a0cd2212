"""From settings to what a plan is made of: the step's setting, the compiler for its device, and words for both."""

from pallas_kernels import aot
from qlora_jax.config import Config, paging_of
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.precision import weight_format
from qlora_jax.training.needs import Compile, Setting, here, on_card
from qlora_jax.training.plan_settings import CPU, PlanArgs, Target, features_of

GIB = 2**30


def setting_of(args: PlanArgs, target: Target) -> Setting:
    """What the run that is asked about needs its memory for, every row as long as data.max_length.

    Raises:
      ValueError: no such model, or rows longer than it was made for.
    """
    model = features_of(args.model.path)
    if args.data.max_length > model.max_positions:
        raise ValueError(
            f"data.max_length={args.data.max_length} is longer than the model allows, which was made for "
            f"{model.max_positions} positions"
        )
    weights = weight_format(args.model, CPU if target.card is None else "gpu")
    return run_setting(args, model, weights, args.data.max_length)


def run_setting(config: Config, model: ModelConfig, weights: WeightFormat, length: int) -> Setting:
    """The setting of a run's steps with rows of `length` tokens."""
    train = config.train
    return Setting(
        model=model,
        weights=weights,
        lora=config.lora,
        optim=config.optim,
        batch=(train.accumulation, train.micro_batch_size, length),
        remat=train.remat,
        paged=paging_of(config.optim) != "off",
    )


def compiler_for(target: Target) -> tuple[Compile | None, str | None]:
    """(what compiles for the target, why nothing does)."""
    if target.card is None:
        return here, None
    problem = aot.problem()
    return (None, problem) if problem else (on_card(target.card.name), None)


def title_of(args: PlanArgs, target: Target) -> str:
    """What is planned, on what."""
    train = args.train
    place = "this CPU" if target.card is None else target.card.description
    return (
        f"{args.model.path}, rank {args.lora.rank}, {train.micro_batch_size} x {args.data.max_length} tokens, "
        f"remat {train.remat}, on {place} ({target.memory_bytes / GIB:,.2f} GiB)"
    )
