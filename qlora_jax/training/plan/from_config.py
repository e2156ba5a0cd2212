"""Builds the inputs of a plan from settings: the step's configuration, the compiler for its device, and the title."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

from pallas_kernels import aot
from qlora_jax.config import Config, ConfigError, DataArgs, LoraArgs, mesh_choices, paging_of
from qlora_jax.config.methods import uses
from qlora_jax.config.schema import mesh_sizes
from qlora_jax.config.validate import MeshChoices
from qlora_jax.data.batching.packing import UNIT
from qlora_jax.data.report.stats import DataReport
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.objectives.make_objective import make_objective
from qlora_jax.objectives.objective import Objective, needs_reference
from qlora_jax.sharding import AnyMesh, absent_mesh, make_mesh
from qlora_jax.training.plan.requirements import CompileStep, StepConfig, compile_here, compile_on_card
from qlora_jax.training.plan.settings import PlanArgs
from qlora_jax.training.plan.target import CPU, PlanTarget, model_features, planned_weights
from qlora_jax.training.plan.usable_meshes import usable_meshes, width_problems
from qlora_jax.training.session import Inputs, open_inputs

GIB = 2**30
HOST_CARDS = (2, 4, 8)  # numbers of cards that hosts usually have


class PlannedRows(NamedTuple):
    """The rows of a run's batches.

    Fields:
      buckets: padded lengths of batches, ascending; empty if they are not known.
      objective: the loss.
      branching: True if data rows have branches.
      report: counts of the data; None if it is not known.
    """

    buckets: tuple[int, ...]
    objective: Objective
    branching: bool
    report: DataReport | None = None

    @property
    def compared(self) -> bool:
        """True if held-out rows are compared with the reference, or may be."""
        return needs_reference(self.objective) and (self.report is None or self.report.eval is not None)


def planned_rows(args: PlanArgs) -> tuple[PlannedRows, str | None]:
    """Returns (the rows of data.train, or those of any data if it cannot be read; the reason why not, or None).

    Raises:
      ValueError: a problem with the data, or with the model's tokenizer.
    """
    unknown = _any_rows(args)
    if args.data.train is None:
        return unknown, None
    place = Path(args.model.path).expanduser()
    if not place.exists() or place.suffix == ".json":
        return unknown, f"{args.model.path} has no tokenizer to count the tokens of data.train"
    return rows_of(open_inputs(args)), None


def _any_rows(config: Config) -> PlannedRows:
    objective = make_objective(config)
    return PlannedRows((), objective, branching=objective.sequences_per_row > 1)


def rows_of(inputs: Inputs) -> PlannedRows:
    """Returns the rows of a run whose data has been read."""
    return PlannedRows(inputs.dataset.buckets, inputs.objective, inputs.dataset.branching, inputs.dataset.report)


def step_configs(args: PlanArgs, target: PlanTarget, rows: PlannedRows) -> list[StepConfig]:
    """Returns the longest step on each mesh that the settings allow, the first to try first.

    Raises:
      ValueError: an unknown model, rows longer than its maximum, or settings that no mesh allows.
    """
    model = model_features(args.model.path)
    if args.data.max_length > model.max_positions:
        raise ValueError(
            f"data.max_length={args.data.max_length} is longer than the model allows (at most {model.max_positions} "
            f"positions). Set data.max_length to at most {model.max_positions}."
        )
    weights = planned_weights(args.model, model, CPU if target.card is None else "gpu")
    new = len(args.model.new_tokens) + len(args.model.new_special_tokens)
    ids = tuple(range(model.vocab_size, model.vocab_size + new))  # any ids: only their number matters
    config = run_step_config(args, model, weights, rows, ids)
    sizes = model_mesh_choices(args, device_count(args, target), lambda: config).usable
    mesh = make_mesh if target.card is None else absent_mesh
    return usable_meshes([config if size.devices == 1 else config.replace(mesh=mesh(*size)) for size in sizes])


def model_mesh_choices(config: Config, devices: int, step: Callable[[], StepConfig]) -> MeshChoices:
    """Returns the candidate meshes of a run on so many devices.

    Args:
      step: returns the run's step on one device; called if the settings allow no mesh.

    Raises:
      ConfigError: there is none; with the problems of the settings and of the model's widths.
    """
    try:
        return mesh_choices(config, devices)
    except ConfigError as error:
        problems = list(error.problems)
    # A model that cannot be read is an error later, when its files are opened.
    with contextlib.suppress(ValueError, OSError):
        mesh = absent_mesh(*mesh_sizes(config.mesh, devices)[0])
        problems += width_problems(step().replace(mesh=mesh))
    raise ConfigError(problems)


def step_before_files(config: Config, platform: str) -> StepConfig:
    """Returns a run's step on one device as far as it is known before its data and weights are opened.

    Raises:
      ValueError: the model is missing or not supported.
    """
    model = model_features(config.model.path)
    return run_step_config(config, model, planned_weights(config.model, model, platform), _any_rows(config), ())


def _longest_row(data: DataArgs, sequences: int) -> int:
    """Returns the length of a batch of the longest rows, each with this many sequences."""
    length = data.max_length * max(1, sequences)
    return -(-length // UNIT) * UNIT if sequences > 1 else length


def device_count(args: PlanArgs, target: PlanTarget) -> int:
    """Returns the number of devices to plan for: this machine's CPU devices, or `cards`, or those of a given mesh."""
    if target.card is None:
        return jax.local_device_count()
    return max(args.cards, math.prod(size for size in (args.mesh.data, args.mesh.fsdp) if isinstance(size, int)))


def larger_meshes(config: StepConfig, target: PlanTarget) -> list[AbstractMesh]:
    """Returns meshes of more cards to propose; none for a CPU."""
    counts = [] if target.card is None else [count for count in HOST_CARDS if count > config.devices]
    return [absent_mesh(1, count) for count in counts]


def run_step_config(
    config: Config,
    model: ModelConfig,
    weights: WeightFormat,
    rows: PlannedRows,
    new_ids: tuple[int, ...],
    mesh: AnyMesh | None = None,
) -> StepConfig:
    """Returns the configuration of a run's longest step. Without buckets, each text of a row has data.max_length."""
    train = config.train
    length = max(rows.buckets, default=_longest_row(config.data, rows.objective.sequences_per_row))
    return StepConfig(
        model=model,
        weights=weights,
        lora=config.lora,
        optim=config.optim,
        batch=(train.accumulation, train.micro_batch_size, length),
        remat=train.remat,
        paged=paging_of(config.optim) != "off",
        new_ids=new_ids,
        packed=config.data.packing,
        branching=rows.branching,
        compared=rows.compared,
        neftune_noise_alpha=train.neftune_noise_alpha,
        objective=rows.objective,
        router=config.router,
        mesh=mesh,
    )


def compiler_for(target: PlanTarget) -> tuple[CompileStep | None, str | None]:
    """Returns (the compiler for the target, the reason if there is none)."""
    if target.card is None:
        return compile_here, None
    problem = aot.problem()
    return (None, problem) if problem else (compile_on_card(target.card.name), None)


def _method(lora: LoraArgs) -> str:
    method = [] if lora.method == LoraArgs().method else [f"lora.method={lora.method}"]
    rank = [f"rank {lora.rank}"] if uses(lora.method, "rank") else []
    return ", ".join(method + rank)


def plan_title(args: PlanArgs, target: PlanTarget, setting: StepConfig) -> str:
    """Returns the title of a plan: model, method, batch and device."""
    _, rows, length = setting.batch
    place = "this CPU" if target.card is None else target.card.description
    cards = "" if setting.mesh is None else f"{setting.devices} x "
    return (
        f"{args.model.path}, {_method(args.lora)}, {rows} x {length} tokens, "
        f"remat {setting.remat}, on {cards}{place} ({target.memory_bytes / GIB:,.2f} GiB)"
    )
