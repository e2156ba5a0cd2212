"""The kinds of judges, and the judges that the settings of a tournament name."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.tournament.judges.endpoint import EndpointJudge
from qlora_jax.studies.tournament.judges.judge import Judge
from qlora_jax.studies.tournament.judges.model import ModelJudge
from qlora_jax.studies.tournament.judges.person import PersonJudge
from qlora_jax.studies.tournament.judges.recorded import RecordedJudge, read_verdicts
from qlora_jax.studies.tournament.settings import ArenaArgs, Value, judge_settings


class Context(NamedTuple):
    """The surroundings of a judge: its name, the tournament's folder, and the receiver of messages."""

    name: str
    folder: Path
    reporter: ProgressReporter


# kind -> (its settings, the context) -> judge; the settings are those of settings.JUDGE_SETTINGS.
BUILDERS: dict[str, Callable[[Any, Context], Judge]] = {
    "endpoint": lambda args, context: EndpointJudge(args),
    "model": lambda args, context: ModelJudge(args, context.reporter),
    "verdicts": lambda args, context: RecordedJudge(context.name, read_verdicts(args.path), context.reporter),
    "person": lambda args, context: PersonJudge(context.name, args, context.folder, context.reporter),
}


def build_judge(given: Mapping[str, Value], context: Context) -> Judge:
    """The judge of settings that `judge_problems` accepts.

    Raises:
      ValueError: its key, its file or its model is missing or cannot be used.
    """
    return BUILDERS[str(given["kind"])](judge_settings(given), context)


def build_judges(args: ArenaArgs, reporter: ProgressReporter) -> dict[str, Judge]:
    """The judges by name; raises ValueError as `build_judge` does."""
    folder = Path(args.output)
    return {name: build_judge(given, Context(name, folder, reporter)) for name, given in args.judges.items()}
