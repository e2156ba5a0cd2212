"""Declares the settings of `evaluate`; those of questions are in config, because training runs have them too."""

import dataclasses
import difflib
import typing
from pathlib import Path

from qlora_jax.config import ConfigError, QuestionArgs, question_problems
from qlora_jax.config.fields import (
    AT_LEAST_ONE,
    AT_LEAST_TWO,
    NON_NEGATIVE,
    NOT_EMPTY,
    POSITIVE,
    TEMPLATE_CHOICES,
    TemplateValue,
    setting,
)
from qlora_jax.evaluation.registry import TASKS
from qlora_jax.evaluation.task_file import known_columns
from qlora_jax.inference.settings import (
    ComputeDtype,
    ExpertPlace,
    ModelOrRunArgs,
    QuantType,
    folder_problems,
    model_problems,
)

COLUMNS = ("unquantized", "quantized", "checkpoint", "against")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskArgs(QuestionArgs):
    """The tasks to score: question files, and the tasks that training runs do not have."""

    text: str | None = setting(
        "text file, scored by the perplexity of its windows", None, NOT_EMPTY, common="text file: perplexity"
    )
    rows: str | None = setting(
        "file of rows in a format of training data, scored by the perplexity of the answers, and by how many of them "
        "greedy decoding generates",
        None,
        NOT_EMPTY,
        common="file of training rows: perplexity and exact match of the answers",
    )
    pairs: str | None = setting(
        "file of preference pairs in a format of training data (prompt, chosen, rejected), scored by how often the "
        "chosen answer has the higher reward, or is likelier",
        None,
        NOT_EMPTY,
        common="file of preference pairs: accuracy by reward and by likelihood",
    )
    embeddings: str | None = setting(
        "for a run with objective=embedding: file of texts that mean the same (anchor, positive, and optionally "
        "negative), scored by retrieval; or of pairs with a score (sentence1, sentence2, label), scored by rank "
        "correlation",
        None,
        NOT_EMPTY,
    )
    pair_beta: float = setting(
        "pairs: factor of rewards: pair_beta * (log p - log p of the reference); not for runs with objective=reward",
        0.1,
        POSITIVE,
    )
    harness: list[str] | None = setting(
        "tasks of lm-evaluation-harness, such as [hellaswag, arc_easy] (pip install 'qlora-jax[lm-eval]')",
        None,
        NOT_EMPTY,
        common="tasks of lm-evaluation-harness, such as [hellaswag]",
    )
    harness_folder: str | None = setting("harness: folder with your own task files", None, NOT_EMPTY)
    answer_start: str | None = setting(
        "rows: text that every answer begins with; the model is given it, and only the rest is scored", None, NOT_EMPTY
    )
    by: str | None = setting(
        "rows, pairs: a column, such as lang; also reports the loss or the accuracies for each of its values",
        None,
        NOT_EMPTY,
    )
    window: int = setting("text: tokens per window; the first token is not scored", 512, AT_LEAST_TWO)
    stride: int | None = setting(
        "text: tokens from the start of a window to the start of the next; each token is scored once, after at least "
        "window - stride tokens (null: window, no overlap)",
        None,
        AT_LEAST_ONE,
    )
    max_tokens: int | None = setting("text: use only the first tokens; null: all", None, AT_LEAST_TWO)
    max_rows: int | None = setting(
        "use only the first questions or rows of each task, including the harness' tasks; null: all",
        None,
        AT_LEAST_ONE,
        common="use only the first rows of each task",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateArgs(TaskArgs, ModelOrRunArgs):
    """Scores models side by side: the unquantized base, the quantized base, a run's checkpoint, and another run's."""

    against: str | None = setting(
        "folder of another run, compared with run question by question; model is then the base of both",
        None,
        NOT_EMPTY,
        common="folder of another run to compare with run",
    )
    against_step: int | None = setting("against: checkpoint of that run (null: the newest)", None, NON_NEGATIVE)
    json: str | None = setting(
        "also write the scores to this file", None, NOT_EMPTY, common="also write the scores to this file"
    )
    json_rows: bool = setting("json: include the scores of each row", False)
    keep: str | None = setting(
        "folder that caches scores as they are computed, so that an interrupted evaluation resumes",
        None,
        NOT_EMPTY,
        common="folder that caches scores, so that an interrupted evaluation resumes",
    )
    columns: list[str] | None = setting(f"models to score, of [{', '.join(COLUMNS)}]; null: all", None, NOT_EMPTY)
    chat_template: str | None = setting(f"{TEMPLATE_CHOICES}, to use instead of the model's chat template", None)
    chat_template_kwargs: dict[str, TemplateValue] | None = setting(
        "variables for the chat template: {enable_thinking: false} (null: the run's)", None
    )
    quant_type: QuantType = setting(
        "4-bit code of the quantized base; auto: as in training, or nf4", "auto", common="4-bit code of the base"
    )
    keep_16bit: str | list[str] | None = setting(
        "linear layers of the base that stay in 16 bits, as for train --model.keep_16bit (null: as in training, or "
        "none)",
        None,
    )
    compute_dtype: ComputeDtype = setting("auto: bfloat16 if the device computes it fast, else float32", "float32")
    experts: ExpertPlace = setting(
        "where routed experts are; auto: as in training, or on the device; offload: in host memory", "auto"
    )


def check_tasks(args: TaskArgs) -> None:
    """Raises ConfigError if settings of tasks contradict each other; the message lists all contradictions."""
    if problems := _task_problems(args):
        raise ConfigError(problems)


def check_evaluate(args: EvaluateArgs) -> None:
    """Raises ConfigError if settings contradict each other; the message lists all contradictions."""
    problems = [*model_problems(args), *_given_problems(args), *_task_problems(args), *_column_problems(args)]
    problems += _against_problems(args)
    problems += folder_problems("json", args.json)
    if args.pair_beta != TaskArgs().pair_beta and args.run is None:
        problems.append("pair_beta: requires run, because a base has no reference; set run too, or remove it")
    if args.json_rows and args.json is None:
        problems.append("json_rows: requires json; set it too")
    if problems:
        raise ConfigError(problems)


def _given_problems(args: TaskArgs) -> list[str]:
    if any(getattr(args, task, None) is not None for task in TASKS):
        return []
    return [f"{', '.join(TASKS)}: found none, expected at least one to score. Set one"]


def _task_problems(args: TaskArgs) -> list[str]:
    problems = []
    if args.harness_folder is not None and args.harness is None:
        problems.append("harness_folder: requires harness; set it too")
    if args.stride is not None and args.stride > args.window:
        problems.append(
            f"stride: larger than window, which skips tokens (found {args.stride}, expected at most {args.window})"
        )
    has_rows = args.rows is not None or args.pairs is not None
    by_head = args.embeddings is not None or (args.labels is not None and args.label_prompt is None)
    columns = known_columns("rows") if has_rows or by_head else ()
    problems += question_problems(args, rows_columns=columns, may_have_head=True)
    if args.answer_start is not None and args.rows is None:
        problems.append("answer_start: requires rows; set it too")
    if args.by is not None and not has_rows:
        problems.append("by: requires rows or pairs; set one too")
    if args.pair_beta != TaskArgs().pair_beta and args.pairs is None:
        problems.append("pair_beta: requires pairs; set it too")
    return problems


def _column_problems(args: EvaluateArgs) -> list[str]:
    columns = args.columns or []
    problems = [_unknown_column(name) for name in sorted({*columns} - {*COLUMNS})]
    if args.run is None and "checkpoint" in columns:
        problems.append("columns: checkpoint requires run; set it too")
    if args.quant_type == "none" and "quantized" in columns:
        problems.append("columns: quantized requires a quant_type other than none")
    return problems


def _unknown_column(name: str) -> str:
    near = ["quantized"] if name in typing.get_args(QuantType) else difflib.get_close_matches(name, COLUMNS, n=1)
    suggestion = f". Did you mean {near[0]}?" if near else ""
    return f"columns: unknown column (found {name!r}, expected any of {', '.join(COLUMNS)}){suggestion}"


def _against_problems(args: EvaluateArgs) -> list[str]:
    if args.against is None:
        problems = ["against_step: requires against; set it too"] if args.against_step is not None else []
        return problems + ["columns: against requires another run; set against too"] * (
            "against" in (args.columns or [])
        )
    if args.run is None:
        return ["against: requires run, with which it is compared; set run too"]
    if (Path(args.run).resolve(), args.step) == (Path(args.against).resolve(), args.against_step):
        return [
            f"against: the same run and checkpoint as run (found {args.against!r}). Set another run, or another "
            "checkpoint (step, against_step)"
        ]
    return []
