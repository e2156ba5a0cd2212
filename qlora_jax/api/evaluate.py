"""`evaluate_side_by_side`: scores the base and the runs that the settings of `evaluate` name."""

from qlora_jax.evaluation.candidates import load_candidates, open_candidates
from qlora_jax.evaluation.reporter import Reporter
from qlora_jax.evaluation.results import Evaluation
from qlora_jax.evaluation.score import prepare_tasks, score_models
from qlora_jax.evaluation.settings import EvaluateArgs


def evaluate_side_by_side(args: EvaluateArgs, *, raw: bool = False, reporter: Reporter | None = None) -> Evaluation:
    """Loads and scores, one at a time, the unquantized base, the quantized base, and the checkpoints of the runs.

    Args:
      args: settings that `check_evaluate` accepts.
      raw: use no chat template.
      reporter: receives the progress; None: nobody does.

    Raises:
      ValueError: a model or a task's file cannot be used, or two runs are not comparable.
    """
    reporter = reporter or Reporter()
    candidates = open_candidates(args, raw=raw)
    tasks = {name: candidate.tasks for name, candidate in candidates.items()}
    prepare_tasks(next(iter(tasks.values())), reporter.message)
    models = load_candidates(args, candidates, reporter)
    labels = {name: candidate.label for name, candidate in candidates.items()}
    return score_models(models, tasks, labels, cache_folder=args.keep, reporter=reporter)
