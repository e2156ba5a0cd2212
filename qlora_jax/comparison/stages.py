"""The stages of a study: measure the steps, search the learning rates, and train and score the runs that count."""

from collections.abc import Callable, Mapping, Sequence

from qlora_jax.comparison.budget import matching_rank, steps_within, trainable_parameters
from qlora_jax.comparison.dispatch import Report, run_all
from qlora_jax.comparison.launchers import Launcher
from qlora_jax.comparison.run import Run, check_unchanged
from qlora_jax.comparison.run_files import Stage
from qlora_jax.comparison.settings import Settings
from qlora_jax.comparison.study import Pair, Study, data_settings
from qlora_jax.config import Config, ConfigError

Perform = Callable[[Sequence[Run]], Mapping[Run, str]]  # performs runs, and returns the reasons of failed ones


def sized_settings(study: Study) -> tuple[dict[Pair, Settings], dict[Pair, int]]:
    """Returns the settings that give each method and task its budget of parameters, and the number of parameters.

    Raises:
      ConfigError: a method cannot have so many; all that cannot are listed.
    """
    budget = study.settings.budget
    settings: dict[Pair, Settings] = {}
    counts: dict[Pair, int] = {}
    problems = []
    for pair in study.pairs():
        config = _plain_config(study, pair, {})
        try:
            rank = None
            if budget.trainable_parameters is not None:
                rank = matching_rank(config, budget.trainable_parameters, budget.tolerance)
            settings[pair] = {} if rank is None else {"lora.rank": rank}
            counts[pair] = trainable_parameters(_plain_config(study, pair, settings[pair]))
        except ValueError as error:
            problems.append(f"methods.{pair[0]}: {error}")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return settings, counts


def _plain_config(study: Study, pair: Pair, settings: Settings) -> Config:
    data = data_settings(study, pair, search=False)
    return study.config(*pair, {**data, **settings, "output": study.settings.output})


def run_study(
    study: Study, sizes: Mapping[Pair, Settings], launcher: Launcher, retries: int, report: Report
) -> list[Run]:
    """Performs all stages; returns the runs that count, and those of the search before them.

    Args:
      sizes: as `sized_settings` returns them.

    Raises:
      ConfigError: runs that were started with other inputs, or failed; all of a stage are listed.
    """

    def perform(runs: Sequence[Run]) -> Mapping[Run, str]:
        check_unchanged(runs)
        return run_all(runs, launcher, retries, report)

    lengths = _lengths(study, sizes, perform, report)
    settings = {pair: {**sizes[pair], **lengths[pair]} for pair in study.pairs()}
    searched = _search(study, settings, perform, report)
    rates = {pair: best_rate(runs) or _first_rate(study, pair) for pair, runs in searched.items()}
    final = [
        _run(study, "final", pair, {**settings[pair], **rates[pair], "train.seed": seed})
        for pair in study.pairs()
        for seed in study.settings.seeds
    ]
    report("training and scoring the runs that count")
    _refuse(perform(final))
    return [*(run for runs in searched.values() for run in runs), *final]


def _run(study: Study, stage: Stage, pair: Pair, settings: Settings) -> Run:
    return Run(study=study, stage=stage, method=pair[0], task=pair[1], settings=settings)


def _lengths(study: Study, sizes: Mapping[Pair, Settings], perform: Perform, report: Report) -> dict[Pair, Settings]:
    """Returns the number of steps of each method and task, as the budget says; measures it if the budget is a time."""
    budget = study.settings.budget
    if budget.seconds is None:
        return dict.fromkeys(study.pairs(), {} if budget.steps is None else {"train.steps": budget.steps})
    first = {"train.seed": study.settings.search_seed, "train.steps": budget.calibration_steps}
    runs = {
        pair: _run(study, "calibration", pair, {**sizes[pair], **first, **_first_rate(study, pair)})
        for pair in study.pairs()
    }
    report(f"measuring the time of {budget.calibration_steps} steps")
    _refuse(perform(list(runs.values())))
    times = {pair: run.outcome()["seconds_per_step"] for pair, run in runs.items()}
    return {pair: {"train.steps": steps_within(budget.seconds, time)} for pair, time in times.items()}


def _first_rate(study: Study, pair: Pair) -> Settings:
    rates = study.learning_rates(pair[0])
    return {"optim.learning_rate": rates[0]} if rates else {}


def _search(study: Study, settings: Mapping[Pair, Settings], perform: Perform, report: Report) -> dict[Pair, list[Run]]:
    """Performs the runs of the search; returns those of each method and task.

    A single learning rate needs no run.

    Raises:
      ConfigError: a run failed, or all learning rates of a method and a task diverged.
    """
    seed = {"train.seed": study.settings.search_seed}
    runs = {
        pair: [
            _run(study, "search", pair, {**settings[pair], **seed, "optim.learning_rate": rate})
            for rate in study.learning_rates(pair[0])
            if len(study.learning_rates(pair[0])) > 1
        ]
        for pair in study.pairs()
    }
    everything = [run for found in runs.values() for run in found]
    if not everything:
        return runs
    report("searching learning rates")
    _refuse(perform(everything))
    empty = [", ".join(pair) for pair, found in runs.items() if found and not best_rate(found)]
    if empty:
        raise ConfigError([f"learning_rates: all of {pair} diverged. Add lower ones" for pair in empty])
    return runs


def best_rate(runs: Sequence[Run]) -> Settings:
    """Returns the learning rate with the lowest loss on the rows of the search; no setting if none is finite."""
    losses = {run: run.outcome()["search_loss"] for run in runs}
    finite = {run: loss for run, loss in losses.items() if loss is not None}
    if not finite:
        return {}
    return {"optim.learning_rate": min(finite, key=lambda run: finite[run]).settings["optim.learning_rate"]}


def _refuse(failed: Mapping[Run, str]) -> None:
    if failed:
        raise ConfigError(
            [f"{run.label}: {reason}\n  log: {run.folder / 'log.txt'}" for run, reason in failed.items()]
            + ["Finished runs are kept: correct the cause, and start the study again"]
        )
