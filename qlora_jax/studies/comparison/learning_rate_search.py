"""The search for the learning rate of each method and task, on rows that no result counts."""

from collections.abc import Callable, Mapping, Sequence

from qlora_jax.config import ConfigError
from qlora_jax.studies.comparison.dispatch import Report
from qlora_jax.studies.comparison.run import Run, run_of
from qlora_jax.studies.comparison.settings import Settings
from qlora_jax.studies.comparison.study import Pair, Study

Perform = Callable[[Sequence[Run]], None]  # performs runs; raises ConfigError if some failed


def first_rate(study: Study, pair: Pair) -> Settings:
    """Returns the first learning rate of a method as a setting; no setting if the study searches none."""
    rates = study.learning_rates(pair[0])
    return {"optim.learning_rate": rates[0]} if rates else {}


def search_rates(
    study: Study, settings: Mapping[Pair, Settings], perform: Perform, report: Report
) -> dict[Pair, list[Run]]:
    """Performs the runs of the search; returns those of each method and task.

    A single learning rate needs no run.

    Raises:
      ConfigError: a run failed, or all learning rates of a method and a task diverged.
    """
    seed = {"train.seed": study.settings.search_seed}
    runs = {
        pair: [
            run_of(study, "search", pair, {**settings[pair], **seed, "optim.learning_rate": rate})
            for rate in study.learning_rates(pair[0])
            if len(study.learning_rates(pair[0])) > 1
        ]
        for pair in study.pairs()
    }
    everything = [run for found in runs.values() for run in found]
    if not everything:
        return runs
    report("searching learning rates")
    perform(everything)
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
