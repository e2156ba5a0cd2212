"""Declares the settings of a study file, and of the command that runs it."""

import dataclasses
from typing import Literal

from qlora_jax.config.fields import AT_LEAST_ONE, BELOW_ONE, NON_NEGATIVE, NOT_EMPTY, POSITIVE, setting

# A value in YAML of a training setting or of an evaluation setting.
Value = bool | int | float | str | list[str] | list[int] | dict[str, int] | dict[str, float] | dict[str, str] | None
Settings = dict[str, Value]  # by dotted name, such as lora.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetArgs:
    """The amount that is equal for all methods: exactly one of steps, trainable_parameters and seconds."""

    steps: int | None = setting("optimizer steps per run", None, AT_LEAST_ONE)
    trainable_parameters: int | None = setting(
        "trainable parameters; each method's lora.rank is chosen to come nearest", None, AT_LEAST_ONE
    )
    tolerance: float = setting(
        "trainable_parameters: largest relative difference that counts as equal", 0.02, BELOW_ONE
    )
    seconds: float | None = setting(
        "time in training steps per run; a short run of each method first measures its steps", None, POSITIVE
    )
    calibration_steps: int = setting("seconds: steps of these short runs", 10, AT_LEAST_ONE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """One task of a study: training rows, and held-out rows with the measure that counts."""

    train: str | dict[str, float] = setting("training rows, as in data.train", bound=NOT_EMPTY)
    search: str | None = setting("rows for the search of learning rates, as in data.eval", None, NOT_EMPTY)
    search_fraction: float = setting(
        "without search: the fraction of train to hold out for it, as in data.eval_fraction", 0.0, BELOW_ONE
    )
    evaluate: Settings = setting(
        "held-out rows or questions, as settings of qlora-jax evaluate: {rows: heldout.jsonl}", bound=NOT_EMPTY
    )
    measure: str = setting("the measure of qlora-jax evaluate that counts, such as 'loss per token'", bound=NOT_EMPTY)
    margin: float | None = setting("the largest difference between methods that counts as equal", None, POSITIVE)
    settings: Settings = setting("training settings of this task: {data.max_length: 256}", {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySettings:
    """A study: every method learns every task with every seed."""

    base: str = setting("configuration of all runs: a YAML file of qlora-jax train", bound=NOT_EMPTY)
    settings: Settings = setting("training settings of all runs: {train.micro_batch_size: 8}", {})
    methods: dict[str, Settings] = setting(
        "by name, training settings that belong together: {lora: {lora.rank: 16}}, also data.train in place of a "
        "task's; the first is the reference",
        bound=NOT_EMPTY,
    )
    tasks: dict[str, dict[str, Value | dict[str, Value]]] = setting(
        "by name: train, search or search_fraction, evaluate, measure, margin, settings", bound=NOT_EMPTY
    )
    seeds: list[int] = setting("seeds of the runs whose results count", [0, 1, 2], NOT_EMPTY)
    budget: BudgetArgs = dataclasses.field(default_factory=BudgetArgs)
    learning_rates: list[float] | dict[str, list[float]] | None = setting(
        "learning rates to search for each method and task, or by method: {full: [1e-5, 1e-4]}; null: no search",
        None,
        NOT_EMPTY,
    )
    search_seeds: list[int] = setting("seeds of the search, none of them in seeds", [1000], NOT_EMPTY)
    pairs: Literal["first", "all"] = setting(
        "methods to test against each other: each against the first, or all pairs", "first"
    )
    output: str = setting("folder of the runs, the page and the table", bound=NOT_EMPTY)


LauncherName = Literal["local", "submitit", "ray"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareArgs:
    """The study to perform, and the machines that perform its runs."""

    study: str = setting("the study file (docs/compare.md)", bound=NOT_EMPTY)
    model: str | None = setting("base model, in place of the study's model.path", None, NOT_EMPTY)
    output: str | None = setting("folder of the runs and results, in place of the study's output", None, NOT_EMPTY)
    launcher: LauncherName = setting("local: processes here; submitit: a SLURM cluster; ray: a Ray cluster", "local")
    processes: int = setting("local: runs at the same time", 1, AT_LEAST_ONE)
    submitit: Settings = setting(
        "submitit: parameters of its AutoExecutor, such as {timeout_min: 240, slurm_partition: gpu}; cluster: local or "
        "debug needs no SLURM",
        {},
    )
    ray_address: str | None = setting(
        "ray: address of the cluster; null: one that RAY_ADDRESS names, or a local one", None
    )
    ray: Settings = setting("ray: resources of a run, such as {num_gpus: 1, num_cpus: 4}", {})
    retries: int = setting("how often a lost run is started again (process killed, machine gone)", 2, NON_NEGATIVE)
