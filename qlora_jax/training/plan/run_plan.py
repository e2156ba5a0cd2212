"""Chooses the mesh of a run, compiles its step and plans its memory: from settings alone, or with the run's data."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh
from rich.console import Console

from pallas_kernels import aot
from pallas_kernels.devices import target_device
from qlora_jax.config import Config, ConfigError, LoraArgs, MeshSize, mesh_choices, paging_of
from qlora_jax.config.methods import uses
from qlora_jax.config.schema import AUTO, mesh_sizes
from qlora_jax.config.validate import MeshChoices
from qlora_jax.data.batching.packing import UNIT
from qlora_jax.data.formats.turn_fields import Tools
from qlora_jax.data.report.stats import DataReport
from qlora_jax.data.report.text import print_report
from qlora_jax.evaluation.heads.reward_model import reward_model_bytes
from qlora_jax.hosts.group import Group
from qlora_jax.io.export.gguf_metadata import with_merge_types
from qlora_jax.methods.merge_into import planned
from qlora_jax.models.config import IN_BLOCKS, QUANTIZED, ModelConfig, WeightFormat
from qlora_jax.objectives.make_objective import make_objective
from qlora_jax.objectives.objective import Objective, needs_reference, token_values
from qlora_jax.objectives.policy_gradient import OLD_LOGPS, REFERENCE_LOGPS
from qlora_jax.optim.page_pool import memory_of
from qlora_jax.rollouts.inputs import row_lengths
from qlora_jax.sharding import DATA, FSDP, AnyMesh, absent_mesh, axis_size, make_mesh
from qlora_jax.training.compiled_programs import CompiledGradients
from qlora_jax.training.cost import memory_use
from qlora_jax.training.cost.memory_use import frozen_bytes
from qlora_jax.training.cost.step_shape import CODES
from qlora_jax.training.device_mesh import run_mesh
from qlora_jax.training.display.banner import short_run_warning
from qlora_jax.training.display.run_display import print_banner
from qlora_jax.training.metrics.trackers import check_installed
from qlora_jax.training.optimizer_state import device_bytes
from qlora_jax.training.plan.fit_search import first_fitting
from qlora_jax.training.plan.records import PlannedTeacher, RunPlan
from qlora_jax.training.plan.reference_pass import forward_batch, plan_reference
from qlora_jax.training.plan.settings import PlanArgs
from qlora_jax.training.plan.step_memory import (
    CompileStep,
    Temporaries,
    compile_here,
    compile_on_card,
    compiled_requirements,
)
from qlora_jax.training.plan.target import PlanTarget, model_features, planned_weights
from qlora_jax.training.run_spec import PreparedModel, RunInputs, RunSpec, open_inputs, weights_of
from qlora_jax.training.several_processes import agree_on_inputs, all_of
from qlora_jax.training.step_spec import StepSpec
from qlora_jax.training.teacher.sources import open_teacher

LARGEST = 16  # value of mesh.fsdp to propose


def usable_meshes(steps: Sequence[StepSpec]) -> list[StepSpec]:
    """Returns the steps whose mesh cuts the model's weights, or needs no cut.

    Raises:
      ConfigError: there are none; with the values of mesh.fsdp that cut them.
    """
    usable = [step for step in steps if not width_problems(step)]
    if not usable:
        raise ConfigError(width_problems(steps[0]))
    return usable


def width_problems(step: StepSpec) -> list[str]:
    """Describes why a mesh does not cut a model's weights: at most one line."""
    fsdp = axis_size(step.mesh, FSDP)
    if fsdp == 1:
        return []
    if whole := _whole_weights(step):
        return [f"mesh.fsdp: found {fsdp}, which does not divide {', '.join(whole)}. {_fix(step)}"]
    if not _is_cut(step):
        return [
            f"mesh.fsdp: found {fsdp}, which divides neither a 4-bit weight nor a table of this model. {_fix(step)}"
        ]
    return []


def _whole_weights(step: StepSpec) -> list[str]:
    """Describes the 4-bit projections of which each device would hold all codes, with their outputs x inputs."""
    shape, weights = step.sizes, step.weights
    if weights.quant_type in IN_BLOCKS:
        return []
    whole = {leaf.name for kind, leaf in shape.trees.frozen(step.mesh) if kind == CODES and not leaf.is_cut}
    names = [name for name in whole if {*weights.formats(name, shape.layers(name))} == {QUANTIZED}]
    found = {name: size for name, size in shape.matrices() if name in names}
    return [f"{name.rpartition('.')[2]} ({n:,} x {k:,})" for name, (n, k) in found.items()]


def _is_cut(step: StepSpec) -> bool:
    """Returns True if a device has less than all codes and tables."""
    return _codes_and_tables(step) != _codes_and_tables(step.replace(mesh=None))


def _codes_and_tables(step: StepSpec) -> tuple[int, int]:
    found = frozen_bytes(step.sizes)
    return found["codes"], found["tables"]


def _fix(step: StepSpec) -> str:
    cut = {n: step.replace(mesh=absent_mesh(1, n)) for n in range(2, LARGEST + 1)}
    values = [n for n, other in cut.items() if _is_cut(other) and not _whole_weights(other)]
    of_model = f"Set mesh.fsdp to one of {', '.join(map(str, values))}, or" if values else "Set"
    devices = axis_size(step.mesh, DATA, FSDP)
    return f"{of_model} mesh.fsdp=1 and mesh.data={devices} to share only the rows"


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


def rows_of(inputs: RunInputs) -> PlannedRows:
    """Returns the rows of a run whose data has been read."""
    return PlannedRows(inputs.lengths, inputs.objective, inputs.branching, inputs.dataset.report)


def step_configs(args: PlanArgs, target: PlanTarget, rows: PlannedRows) -> list[StepSpec]:
    """Returns the longest step on each candidate mesh, in the order to try them.

    Raises:
      ValueError: an unknown model, rows longer than its maximum, or settings that no mesh allows.
    """
    model = model_features(args.model.path)
    if args.data.max_length > model.max_positions:
        raise ValueError(
            f"data.max_length={args.data.max_length} is longer than the model allows (at most {model.max_positions} "
            f"positions). Set data.max_length to at most {model.max_positions}."
        )
    weights = planned_weights(args.model, model, *target.device)
    new = len(args.model.new_tokens) + len(args.model.new_special_tokens)
    ids = tuple(range(model.vocab_size, model.vocab_size + new))  # any ids: only their number matters
    config = run_step_config(args, model, weights, rows, ids)
    sizes = model_mesh_choices(args, device_count(args, target), lambda: config).usable
    mesh = make_mesh if target.card is None else absent_mesh
    return usable_meshes([config if size.devices == 1 else config.replace(mesh=mesh(*size)) for size in sizes])


def model_mesh_choices(config: Config, devices: int, step: Callable[[], StepSpec]) -> MeshChoices:
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


def step_before_files(config: Config, platform: str) -> StepSpec:
    """Returns a run's step on one device as far as it is known before its data and weights are opened.

    Raises:
      ValueError: the model is missing or not supported.
    """
    model = model_features(config.model.path)
    return run_step_config(config, model, planned_weights(config.model, model, platform), _any_rows(config), ())


def _longest_row(config: Config, objective: Objective) -> int:
    """Returns the length of a batch of the longest rows: with all texts, or one prompt with all replies."""
    sequences = objective.sequences_per_row
    if objective.row_kind == "prompt":
        reply = config.rollouts.max_completion_length
        return max(row_lengths(config.data.max_length - reply, reply, sequences, 1))
    length = config.data.max_length * max(1, sequences)
    return -(-length // UNIT) * UNIT if sequences > 1 else length


def device_count(args: PlanArgs, target: PlanTarget) -> int:
    """Returns the number of devices to plan for: this machine's CPU devices, or `cards`, or those of a given mesh."""
    if target.card is None:
        return jax.local_device_count()
    return max(args.cards, math.prod(size for size in (args.mesh.data, args.mesh.fsdp) if isinstance(size, int)))


def larger_meshes(config: StepSpec, target: PlanTarget) -> list[AbstractMesh]:
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
) -> StepSpec:
    """Returns the configuration of a run's longest step. Without buckets, each text of a row has data.max_length."""
    train = config.train
    length = max(rows.buckets, default=_longest_row(config, rows.objective))
    return StepSpec(
        model=model,
        weights=weights,
        lora=planned(config.lora, model),
        optim=config.optim,
        batch=(train.accumulation, train.micro_batch_size, length),
        remat=train.remat,
        paged=paging_of(config.optim) != "off",
        new_ids=new_ids,
        packed=config.data.packing,
        branching=rows.branching,
        compared=rows.compared,
        reward_model=0 if config.rewards.run is None else reward_model_bytes(config.rewards.run),
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


def plan_title(args: PlanArgs, target: PlanTarget, setting: StepSpec) -> str:
    """Returns the title of a plan: model, method, batch and device."""
    _, rows, length = setting.batch
    place = "this CPU" if target.card is None else target.card.description
    cards = "" if setting.mesh is None else f"{setting.devices} x "
    return (
        f"{args.model.path}, {_method(args.lora)}, {rows} x {length} tokens, "
        f"remat {setting.remat}, on {cards}{place} ({target.memory_bytes / GIB:,.2f} GiB)"
    )


# The memory plan of a run before it starts, for the device that it runs on.
#
# It plans the step for the longest rows of the data, which the run compiles anyway. More is compiled only if that does
# not fit.


def longest_step(config: Config, inputs: RunInputs, mesh: Mesh | None) -> StepSpec:
    """Returns the configuration of the run's step for its longest bucket."""
    return run_step_config(config, inputs.model, weights_of(config, inputs), rows_of(inputs), inputs.new_ids, mesh)


def compile_run(config: Config, inputs: RunInputs, mesh: Mesh | None = None) -> RunSpec:
    """Compiles the run's gradient program for its longest batches, before `prepare` takes memory."""
    gradients = CompiledGradients(longest_step(config, inputs, mesh))
    gradients.compiled(gradients.step.batch)
    return RunSpec(config=config, inputs=inputs, gradients=gradients)


def plan_run(run: RunSpec) -> RunPlan:
    """Plans the run's step for its longest bucket; uses the program that the run has compiled."""
    questions, teacher = run.inputs.questions, run.inputs.teacher
    limit, device = device_bytes(memory_of(run.mesh))
    return RunPlan(
        requirements=compiled_requirements(run.step, _compiled_by(run.gradients)),
        limit=limit,
        device=device,
        questions=None if questions is None else questions.memory(run.gradients.parts),
        rollouts=run.rollout_memory,
        reference=plan_reference(run),
        teacher=None if teacher is None else PlannedTeacher(teacher.nbytes, run.inputs.rollouts is not None),
    )


def _compiled_by(gradients: CompiledGradients) -> CompileStep:
    """Returns a compiler that reads the gradients' program and bounds the update's scratch by f32 gradients."""

    def compile_step(step: StepSpec) -> Temporaries:
        memory = aot.read_memory(gradients.compiled(step.batch).memory_analysis())
        in_f32 = dataclasses.replace(step.lora, dtype="float32")
        update = memory_use.gradient_bytes(dataclasses.replace(step.sizes, lora=in_f32))
        return Temporaries(memory.device.temporaries, update, memory.host.temporaries, memory.host.arguments)

    return compile_step


class PlannedRun(NamedTuple):
    """A run before it reads weights.

    Fields:
      refused: meshes that `mesh.fsdp: auto` did not try, and why.
    """

    run: RunSpec
    plan: RunPlan
    refused: Mapping[MeshSize, Sequence[str]]

    def compile_all_lengths(self, *, resume: bool) -> None:
        """Compiles the programs of an objective over sequences, so that no compiler works next to the weights.

        Compiling them later would take more memory than the plan has.

        Args:
          resume: True for a run that has its reference log-probabilities already.
        """
        run, dataset, objective = self.run, self.run.inputs.dataset, self.run.inputs.objective
        if objective.sequences_per_row == 0:
            return
        for length in run.inputs.lengths:
            run.gradients.compiled((*run.step.batch[:2], length))
        has_held_out, reference, forward = dataset.eval is not None, needs_reference(objective), run.gradients.forward
        if run.inputs.rollouts is not None:
            scored = {OLD_LOGPS, REFERENCE_LOGPS} & {*token_values(objective)}
            for length in run.inputs.lengths if scored else ():
                forward.outputs(objective, forward_batch(run, length, run.step.batch[1]))
            return
        for length in dataset.eval_buckets:
            batch = forward_batch(run, length)
            if (not resume) if reference else has_held_out:
                forward.outputs(objective, batch)
            if reference and has_held_out:
                forward.comparison(batch)


def plan_before_weights(
    config: Config,
    console: Console,
    *,
    full: bool,
    group: Group,
    model: PreparedModel | None = None,
    tools: Tools = (),
    check: Callable[[RunInputs], None],
) -> PlannedRun:
    """Reads the data, chooses the mesh and compiles the step; prints the memory plan and, if `full`, the data report.

    Args:
      check: raises ValueError for inputs that the run cannot use, before the step is compiled.

    Raises:
      ValueError: bad input, or a mesh that the run cannot use.
      Disagreement: the processes have other files.
    """
    check_installed(config.train.track)
    sizes, refused = _choices(config if model is None else _without_choice(config), group)
    inputs = _open_in_turn(config, model, group, tools)
    agree_on_inputs(group, inputs)
    check(inputs)
    config = _pinned(config, inputs)
    steps = usable_meshes([longest_step(config, inputs, run_mesh(size)) for size in sizes])
    if full:
        print_report(inputs.dataset.report, console)
        total_steps = config.train.total_steps(inputs.dataset.steps_per_epoch)
        if text := short_run_warning(config.optim, total_steps):
            console.print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)
    with console.status("compiling the training step"):
        run, plan = _first_that_fits(config, inputs, steps, group)
    print_banner("memory plan", plan.rows() if full else {"memory": plan.rows()["memory"]}, console)
    return PlannedRun(run, plan, refused)


def _open_in_turn(config: Config, model: PreparedModel | None, group: Group, tools: Tools) -> RunInputs:
    """Opens the model and the data; in process 0 first if it writes a cache of rows, which the others then read."""
    cached = config.data.cache is not None
    if cached and not group.is_first:
        group.barrier("the cached rows", config.hosts.stuck_after)
    inputs = open_inputs(config, model, tools)
    inputs = dataclasses.replace(inputs, teacher=open_teacher(config, inputs.dataset.tokenizer, inputs.model))
    if cached and group.is_first:
        group.barrier("the cached rows", config.hosts.stuck_after)
    return inputs


def _choices(config: Config, group: Group) -> MeshChoices:
    """Returns the meshes that the run may use. Several processes use all of their devices.

    Raises:
      ValueError: there is none, or JAX has other processes than the run.
    """
    if jax.process_count() != group.processes:
        raise ValueError(
            f"jax.distributed: found {jax.process_count()} processes, expected {group.processes}. Train with several "
            "processes by the command qlora_jax.train, which joins them"
        )
    devices = jax.device_count()
    choices = model_mesh_choices(config, devices, lambda: step_before_files(config, target_device().platform))
    usable = [size for size in choices.usable if group.processes == 1 or size.devices == devices]
    if not usable:
        raise ValueError(
            f"mesh.data, mesh.fsdp: found {' or '.join(f'({size})' for size in choices.usable)}, expected "
            f"{devices} devices in all, because {group.processes} processes use all of theirs. Set mesh.data=auto, or "
            f"sizes whose product is {devices}"
        )
    return MeshChoices(usable, choices.refused)


def _without_choice(config: Config) -> Config:
    """Replaces `mesh.fsdp: auto` by 1: a model in memory is whole on one device already."""
    chosen = config.mesh.fsdp if config.mesh.fsdp != AUTO else 1
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=chosen))


def _pinned(config: Config, inputs: RunInputs) -> Config:
    """The settings with what a resumed run must have too: a Hub model's commit, its template's date, types of codes."""
    path, date = inputs.source.hub_name or config.model.path, inputs.dataset.tokenizer.template_date
    data = config.data if date is None else dataclasses.replace(config.data, template_date=f"{date}")
    lora = with_merge_types(config.lora, inputs.source, inputs.model)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=path), data=data, lora=lora)


def _first_that_fits(
    config: Config, inputs: RunInputs, steps: Sequence[StepSpec], group: Group
) -> tuple[RunSpec, RunPlan]:
    """Returns the run and the plan of the first of these steps that fits; of the last if none does.

    It fits if it does in all processes. A mesh that is clearly too small is not compiled for.
    """

    @functools.cache
    def planned_on(mesh: Mesh | None) -> tuple[RunSpec, RunPlan]:
        run = compile_run(config, inputs, mesh)
        return run, plan_run(run)

    chosen = first_fitting(
        steps,
        lambda step: group.least("memory", device_bytes(memory_of(_devices(step)))[0]),
        lambda step: all_of(group, "plan", planned_on(_devices(step))[1].fits),
    )
    return planned_on(_devices(chosen))


def _devices(step: StepSpec) -> Mesh | None:
    assert not isinstance(step.mesh, AbstractMesh), "a run's devices are present"
    return step.mesh
