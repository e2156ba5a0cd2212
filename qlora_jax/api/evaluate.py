"""`evaluate_model`: scores models on text, rows and questions; and the models that the settings of `evaluate` name."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_jax.api.generate import stop_ids
from qlora_jax.api.provenance import head_of_model, parts_of
from qlora_jax.config import ConfigError
from qlora_jax.config.parse import from_dict
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.compared_models import load_compared, open_compared
from qlora_jax.evaluation.registry import build_tasks
from qlora_jax.evaluation.results import Evaluation
from qlora_jax.evaluation.score import ScoredModel, prepare_tasks, score_models
from qlora_jax.evaluation.settings import EvaluateArgs, TaskArgs, check_tasks
from qlora_jax.evaluation.task import AnyTask, TaskContext
from qlora_jax.models.decoder import CausalLM
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.progress_reporter import ConsoleReporter, ProgressReporter
from qlora_jax.terminal.console import Console


def evaluate_model(
    model: CausalLM | Mapping[str, CausalLM],
    tokenizer: Tokenizer,
    *,
    text: str | Path | None = None,
    rows: str | Path | None = None,
    pairs: str | Path | None = None,
    embeddings: str | Path | None = None,
    choices: str | Path | None = None,
    letters: str | Path | None = None,
    labels: str | Path | None = None,
    answers: str | Path | None = None,
    programs: str | Path | None = None,
    tasks: Sequence[AnyTask] = (),
    raw: bool = False,
    cache: str | Path | None = None,
    progress: bool = False,
    **settings: object,
) -> Evaluation:
    """Scores a model on files of text, rows and questions (docs/evaluate.md).

    >>> result = q.evaluate_model(model, tokenizer, rows="rows.jsonl")
    >>> [*result.tasks]
    ['rows']

    `result.tasks["text"].metrics["model"]["perplexity"]` is a metric with `value` and `interval`, its 95 % confidence
    interval. Several models are compared in pairs of the same rows: `result.tasks["text"].comparisons`. `print(result)`
    prints tables, and `result.to_dict()` has plain numbers.

    Args:
      model: a model; or several by name, each of which is compared with the next.
      text: text file, scored by the perplexity of its windows.
      rows: file in a format of training data, scored by the loss of the answers.
      pairs: file of preference pairs, scored by how often the chosen answer is likelier, or has the higher reward.
      embeddings: file of texts that mean the same, scored by retrieval, for a model trained with objective=embedding.
      choices: file of multiple-choice questions, scored by the likelihood of each option.
      letters: file of multiple-choice questions, scored by letter, like MMLU.
      labels: file of texts with a label, scored by the likelihood of each label, or by the model's head.
      answers: file of questions, scored by exact match of the greedy reply.
      programs: file of functions to write, scored by running the replies with tests, like HumanEval.
      tasks: more tasks, of your own classes (see qlora_jax/evaluation/task.py).
      raw: no chat template: questions and rows are plain text.
      cache: folder that caches scores, so that an interrupted evaluation resumes.
      progress: show progress bars.
      settings: more settings of the tasks, named like those of the command: window, stride, max_rows, shots,
        answer_pattern, file_columns, harness and so on.

    Raises:
      ValueError: no task, an unknown setting, a file that cannot be used, or models with different heads; the message
        lists all problems.
    """
    models = model if isinstance(model, Mapping) else {"model": model}
    files = {
        "text": text,
        "rows": rows,
        "pairs": pairs,
        "embeddings": embeddings,
        "choices": choices,
        "letters": letters,
        "labels": labels,
        "answers": answers,
        "programs": programs,
    }
    for name, path in files.items():
        if not isinstance(path, str | Path | None):
            raise TypeError(
                f"{name}: found a {type(path).__name__}, expected the path of a file. Write the rows to one"
            )
    args = _task_args({name: str(path) for name, path in files.items() if path is not None} | settings)
    reader = dataclasses.replace(tokenizer, chat_template=None) if raw else tokenizer
    all_tasks = [*build_tasks(args, _context(models, reader)), *tasks]
    if not all_tasks:
        raise ValueError(f"{', '.join(files)}, tasks: found none, expected at least one to score. Give one")
    reporter = ConsoleReporter(Console(stderr=True)) if progress else ProgressReporter()
    prepare_tasks(all_tasks, reporter.message)
    return score_models(
        (ScoredModel(name, parts_of(one)) for name, one in models.items()),
        {name: all_tasks for name in models},
        {name: name for name in models},
        cache_folder=cache,
        reporter=reporter,
    )


def evaluate_side_by_side(
    args: EvaluateArgs, *, raw: bool = False, reporter: ProgressReporter | None = None
) -> Evaluation:
    """Loads and scores, one at a time, the unquantized base, the quantized base, and the checkpoints of the runs.

    Args:
      args: settings that `check_evaluate` accepts.
      raw: no chat template: questions and rows are plain text.
      reporter: receives the progress; None: nobody does.

    Raises:
      ValueError: a model or a task's file cannot be used, or two runs are not comparable.
    """
    reporter = reporter or ProgressReporter()
    compared = open_compared(args, raw=raw)
    tasks = {name: model.tasks for name, model in compared.items()}
    prepare_tasks(next(iter(tasks.values())), reporter.message)
    models = load_compared(args, compared, reporter)
    labels = {name: model.label for name, model in compared.items()}
    return score_models(models, tasks, labels, cache_folder=args.keep, reporter=reporter)


def _task_args(settings: Mapping[str, object]) -> TaskArgs:
    """The validated settings; raises ConfigError."""
    args = from_dict(TaskArgs, settings)
    check_tasks(args)
    if args.pair_beta != TaskArgs().pair_beta:
        raise ConfigError(["pair_beta: models in memory have no reference, and so no rewards. Remove it"])
    return args


def _context(models: Mapping[str, CausalLM], tokenizer: Tokenizer) -> TaskContext:
    """The properties that all models share: the shortest maximum length, the stop ids of any, and the head."""
    chat = tokenizer.chat_template is not None
    return TaskContext(
        tokenizer=tokenizer,
        max_positions=min(model.config.max_positions for model in models.values()),
        stop_ids=frozenset().union(*(stop_ids(model, tokenizer, chat=chat) for model in models.values())),
        head=_common_head(models),
    )


def _common_head(models: Mapping[str, CausalLM]) -> TrainedHead | None:
    """Returns the sequence head of the models; raises ValueError if they differ."""
    heads = {name: head_of_model(model) for name, model in models.items()}
    first, *others = heads.values()
    if any(head != first for head in others):
        found = "; ".join(f"{name}: {head or 'no head'}" for name, head in heads.items())
        raise ValueError(
            f"model: the models have different sequence heads (found {found}). Evaluate them one at a time"
        )
    return first
