"""A run before it reads weights: its data, its mesh of devices, its compiled step and its memory plan."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh
from rich.console import Console

from pallas_kernels.devices import target_device
from qlora_jax.config import Config, MeshSize
from qlora_jax.config.schema import AUTO
from qlora_jax.config.validate import MeshChoices
from qlora_jax.data.report.text import print_report
from qlora_jax.hosts.group import Group
from qlora_jax.objectives.objective import needs_reference
from qlora_jax.optim.page_pool import memory_of
from qlora_jax.training.compiled_step import CompiledGradients
from qlora_jax.training.display.banner import short_run_warning
from qlora_jax.training.display.run_display import print_banner
from qlora_jax.training.metrics.trackers import check_installed
from qlora_jax.training.paging_budget import device_bytes
from qlora_jax.training.plan.from_config import model_mesh_choices, step_before_files
from qlora_jax.training.plan.plan import first_fitting
from qlora_jax.training.plan.preflight import RunPlan, longest_step, plan_run
from qlora_jax.training.plan.reference import forward_batch
from qlora_jax.training.plan.requirements import StepConfig
from qlora_jax.training.plan.usable_meshes import usable_meshes
from qlora_jax.training.run_mesh import run_mesh
from qlora_jax.training.session import Inputs, PreparedModel, compile_gradients, open_inputs, steps_of_run
from qlora_jax.training.several_processes import agree_on_inputs, all_of

OVERSIZED = "oversized"  # the flag that starts a run although it does not fit


class PlannedRun(NamedTuple):
    """A run before it reads weights.

    Fields:
      refused: meshes that `mesh.fsdp: auto` did not try, and why.
    """

    config: Config
    inputs: Inputs
    gradients: CompiledGradients
    plan: RunPlan
    refused: Mapping[MeshSize, Sequence[str]]

    def compile_all_lengths(self, *, resume: bool) -> None:
        """Compiles the programs of an objective over sequences, so that no compiler works next to the weights.

        Compiling them later would take more memory than the plan has.

        Args:
          resume: True for a run that has its reference log-probabilities already.
        """
        settings, dataset, objective = self.config.train, self.inputs.dataset, self.inputs.objective
        if objective.sequences_per_row == 0:
            return
        has_held_out, reference, forward = dataset.eval is not None, needs_reference(objective), self.gradients.forward
        for length in dataset.eval_buckets:
            batch = forward_batch(self.config, self.inputs, self.gradients.mesh, length)
            if (not resume) if reference else has_held_out:
                forward.outputs(objective, batch)
            if reference and has_held_out:
                forward.comparison(batch)
        for length in dataset.buckets:
            self.gradients.compiled((settings.accumulation, settings.micro_batch_size, length))

    def refuse_oversized(self, allowed: bool) -> None:
        """Raises ValueError with the nearest change that fits if the run does not fit and is not allowed to start."""
        if not (self.plan.fits or allowed):
            lines = [f"memory plan: {self.plan.nearest_fix()}", *_refused_lines(self.refused)]
            raise ValueError("\n  ".join([*lines, f"--{OVERSIZED} starts it anyway"]))


def _refused_lines(refused: Mapping[MeshSize, Sequence[str]]) -> list[str]:
    """Describes the first mesh that was not tried."""
    return [f"mesh ({size}) was not tried. {problem}" for size, problems in refused.items() for problem in problems][:1]


def plan_before_weights(
    config: Config, console: Console, *, full: bool, group: Group, model: PreparedModel | None = None
) -> PlannedRun:
    """Reads the data, chooses the mesh and compiles the step; prints the memory plan and, if `full`, the data report.

    Raises:
      ValueError: bad input, or a mesh that the run cannot use.
      Disagreement: the processes have other files.
    """
    check_installed(config.train.track)
    sizes, refused = _choices(config if model is None else _without_choice(config), group)
    inputs = _open_in_turn(config, model, group)
    agree_on_inputs(group, inputs)
    config = _pinned(config, inputs)
    steps = usable_meshes([longest_step(config, inputs, run_mesh(size)) for size in sizes])
    if full:
        print_report(inputs.dataset.report, console)
        total_steps = steps_of_run(config.train, inputs.dataset.steps_per_epoch)
        if text := short_run_warning(config.optim, total_steps):
            console.print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)
    with console.status("compiling the training step"):
        gradients, plan = _first_that_fits(config, inputs, steps, group)
    print_banner("memory plan", plan.rows() if full else {"memory": plan.rows()["memory"]}, console)
    return PlannedRun(config, inputs, gradients, plan, refused)


def _open_in_turn(config: Config, model: PreparedModel | None, group: Group) -> Inputs:
    """Opens the model and the data; in process 0 first if it writes a cache of rows, which the others then read."""
    cached = config.data.cache is not None
    if cached and not group.is_first:
        group.meet("the cached rows", config.hosts.stuck_after)
    inputs = open_inputs(config, model)
    if cached and group.is_first:
        group.meet("the cached rows", config.hosts.stuck_after)
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


def _pinned(config: Config, inputs: Inputs) -> Config:
    """The settings with a Hub model's commit and the date of its template, so that a resumed run has equal rows."""
    path, date = inputs.source.hub_name or config.model.path, inputs.dataset.tokenizer.template_date
    data = config.data if date is None else dataclasses.replace(config.data, template_date=f"{date}")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=path), data=data)


def _first_that_fits(
    config: Config, inputs: Inputs, steps: Sequence[StepConfig], group: Group
) -> tuple[CompiledGradients, RunPlan]:
    """Returns the compiled step and the plan of the first of these steps that fits; of the last if none does.

    It fits if it does in all processes. A mesh that is clearly too small is not compiled for.
    """

    @functools.cache
    def planned_on(mesh: Mesh | None) -> tuple[CompiledGradients, RunPlan]:
        gradients = compile_gradients(config, inputs, mesh)
        return gradients, plan_run(config, inputs, gradients)

    chosen = first_fitting(
        steps,
        lambda step: group.least("memory", device_bytes(memory_of(_devices(step)))[0]),
        lambda step: all_of(group, "plan", planned_on(_devices(step))[1].fits),
    )
    return planned_on(_devices(chosen))


def _devices(step: StepConfig) -> Mesh | None:
    assert not isinstance(step.mesh, AbstractMesh), "a run's devices are present"
    return step.mesh
