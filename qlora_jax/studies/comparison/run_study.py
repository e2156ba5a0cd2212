"""Performs the stages of a study: measures steps, searches learning rates, trains and scores the runs that count."""

from collections.abc import Mapping, Sequence

from qlora_jax.config import Config, ConfigError
from qlora_jax.studies.comparison.budget import matching_rank, steps_within, trainable_parameters
from qlora_jax.studies.comparison.dispatch import Report, raise_failures, run_all
from qlora_jax.studies.comparison.launchers import Launcher
from qlora_jax.studies.comparison.learning_rate_search import Perform, best_rate, first_rate, search_rates
from qlora_jax.studies.comparison.run import Run, check_unchanged, run_of
from qlora_jax.studies.comparison.settings import Settings
from qlora_jax.studies.comparison.study import Pair, Study, data_settings


def sized_settings(study: Study) -> tuple[dict[Pair, Settings], dict[Pair, int]]:
    """Returns the settings that give each method and task its budget of parameters, and the number of parameters.

    Raises:
      ConfigError: some methods cannot have that number; lists all of them.
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

    def perform(runs: Sequence[Run]) -> None:
        check_unchanged(runs)
        raise_failures(run_all(runs, launcher, retries, report))

    lengths = _lengths(study, sizes, perform, report)
    settings = {pair: {**sizes[pair], **lengths[pair]} for pair in study.pairs()}
    searched = search_rates(study, settings, perform, report)
    rates = {pair: best_rate(runs) or first_rate(study, pair) for pair, runs in searched.items()}
    final = [
        run_of(study, "final", pair, {**settings[pair], **rates[pair], "train.seed": seed})
        for pair in study.pairs()
        for seed in study.settings.seeds
    ]
    report("training and scoring the runs that count")
    perform(final)
    return [*(run for runs in searched.values() for run in runs), *final]


def _lengths(study: Study, sizes: Mapping[Pair, Settings], perform: Perform, report: Report) -> dict[Pair, Settings]:
    """Returns the number of steps of each method and task, as the budget says; measures it if the budget is a time."""
    budget = study.settings.budget
    if budget.seconds is None:
        return dict.fromkeys(study.pairs(), {} if budget.steps is None else {"train.steps": budget.steps})
    first = {"train.seed": study.settings.search_seed, "train.steps": budget.calibration_steps}
    runs = {
        pair: run_of(study, "calibration", pair, {**sizes[pair], **first, **first_rate(study, pair)})
        for pair in study.pairs()
    }
    report(f"measuring the time of {budget.calibration_steps} steps")
    perform(list(runs.values()))
    times = {pair: run.outcome()["seconds_per_step"] for pair, run in runs.items()}
    return {pair: {"train.steps": steps_within(budget.seconds, time)} for pair, time in times.items()}
