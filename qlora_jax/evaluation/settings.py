"""The settings of `generate` and `evaluate`, read by the same machinery as those of a training run."""

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Literal

from qlora_jax.config import QUESTION_KINDS, ConfigError, QuestionArgs, question_problems
from qlora_jax.config.fields import AT_LEAST_ONE, AT_LEAST_TWO, NON_NEGATIVE, NOT_EMPTY, Bound, setting
from qlora_jax.evaluation.columns import known_columns

ABOVE_ZERO_UP_TO_ONE = Bound("more than 0 and at most 1", lambda value: 0 < value <= 1)

Quant = Literal["auto", "nf4", "fp4", "int4", "e2m1", "e3m0", "none"]
Dtype = Literal["auto", "bfloat16", "float32"]
MODEL = "a Hugging Face folder, a GGUF file, or org/name on the Hub; with run: where the run's base lies now"
COLUMNS = ("unquantized", "quantized", "checkpoint", "against")
TASKS = ("text", *QUESTION_KINDS, "rows", "harness")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOrRunArgs:
    """What is used: a model, or what a run made of it."""

    model: str | None = setting(MODEL, None)
    run: str | None = setting("the folder of a training run: its base and its adapter", None)
    step: int | None = setting("the run's checkpoint (null: the newest)", None, NON_NEGATIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateArgs(ModelOrRunArgs):
    """Answers one prompt, a file of prompts, or a person in a chat (where neither is given)."""

    prompt: str | None = setting("one prompt; the reply is printed as it comes", None, NOT_EMPTY)
    prompts: str | None = setting(
        "file of prompts: JSON or JSON Lines in the forms of training data (an answer at the end is left out), or else "
        "one prompt a line",
        None,
        NOT_EMPTY,
    )
    output: str | None = setting("JSON Lines file for the replies to prompts (null: standard output)", None, NOT_EMPTY)
    system: str | None = setting("system message of the chat template (null: the template's own)", None)
    chat_template: str | None = setting("a jinja file used instead of the model's own chat template", None)
    max_new_tokens: int = setting("tokens of a reply at most", 256, AT_LEAST_ONE)
    temperature: float = setting("0: always the likeliest token; 1: draw as the model says", 0.0, NON_NEGATIVE)
    top_k: int = setting("draw from the k likeliest tokens only; 0: all", 0, NON_NEGATIVE)
    top_p: float = setting("draw from the likeliest tokens that reach this probability", 1.0, ABOVE_ZERO_UP_TO_ONE)
    seed: int = setting("of the draws; a reply depends on it and on its own prompt alone", 0, NON_NEGATIVE)
    quant_type: Quant = setting("4-bit code of the base; auto: as the run was trained, or nf4; none: 16 bit", "auto")
    compute_dtype: Dtype = setting("auto: bfloat16 where the device is fast at it, else float32", "auto")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateArgs(QuestionArgs, ModelOrRunArgs):
    """Scores a model, side by side: its base unquantized, its base quantized, a run's checkpoint, and another run's."""

    against: str | None = setting(
        "the folder of another run, compared with run question by question; with model: their bases both lie there",
        None,
        NOT_EMPTY,
    )
    against_step: int | None = setting("with against: that run's checkpoint (null: the newest)", None, NON_NEGATIVE)
    text: str | None = setting("text file: perplexity of its windows", None, NOT_EMPTY)
    rows: str | None = setting(
        "file of rows in the forms of training data: perplexity of the answers, and how many are what the model would "
        "write",
        None,
        NOT_EMPTY,
    )
    harness: list[str] | None = setting(
        "tasks of lm-evaluation-harness by name, such as [hellaswag, arc_easy] (pip install 'qlora-jax[lm-eval]')",
        None,
        NOT_EMPTY,
    )
    harness_folder: str | None = setting("with harness: a folder with task files of your own", None, NOT_EMPTY)
    answer_start: str | None = setting(
        "with rows: how every answer begins; it is given to the model, and what follows it is scored", None, NOT_EMPTY
    )
    window: int = setting("tokens of a window of text; its first one is not scored", 512, AT_LEAST_TWO)
    stride: int | None = setting(
        "tokens from one window's start to the next one's; each token is scored once, with at least window - stride "
        "before it (null: window, no overlap)",
        None,
        AT_LEAST_ONE,
    )
    max_tokens: int | None = setting("only the first tokens of the text (null: all)", None, AT_LEAST_TWO)
    max_rows: int | None = setting(
        "only the first questions and rows, of each task of the harness too (null: all)", None, AT_LEAST_ONE
    )
    json: str | None = setting("also write the scores to this file", None, NOT_EMPTY)
    keep: str | None = setting(
        "folder for scores as they are made: started again with it, an evaluation that was stopped goes on",
        None,
        NOT_EMPTY,
    )
    columns: list[str] | None = setting(
        f"which of [{', '.join(COLUMNS)}] to score (null: all that there are)", None, NOT_EMPTY
    )
    chat_template: str | None = setting("a jinja file used instead of the model's own chat template", None)
    quant_type: Quant = setting("4-bit code of the quantized base; auto: as the run was trained, or nf4", "auto")
    compute_dtype: Dtype = setting("auto: bfloat16 where the device is fast at it, else float32", "float32")


def check_generate(args: GenerateArgs) -> None:
    """Raises ConfigError with everything in which the settings contradict each other."""
    problems = _model_problems(args)
    if args.prompt is not None and args.prompts is not None:
        problems.append("prompt and prompts: both are given, expected one of them, or neither for a chat")
    if args.output is not None and args.prompts is None:
        problems.append("output: is for the replies to a file of prompts; give prompts too")
    problems += _folder_problems("output", args.output)
    if problems:
        raise ConfigError(problems)


def _unknown_column(name: str) -> str:
    near = ["quantized"] if name in typing.get_args(Quant) else difflib.get_close_matches(name, COLUMNS, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"columns: found {name!r}, expected some of {', '.join(COLUMNS)}{meant}"


def check_evaluate(args: EvaluateArgs) -> None:
    """Raises ConfigError with everything in which the settings contradict each other."""
    problems = _model_problems(args)
    if all(getattr(args, task) is None for task in TASKS):
        problems.append(f"{', '.join(TASKS)}: none is given, expected at least one of them to score")
    if args.harness_folder is not None and args.harness is None:
        problems.append("harness_folder: is for harness; give harness too")
    if args.stride is not None and args.stride > args.window:
        problems.append(f"stride: found {args.stride}, expected at most window ({args.window}), or tokens are left out")
    problems += question_problems(args, rows_columns=() if args.rows is None else known_columns("rows"))
    columns = args.columns or []
    problems += [_unknown_column(name) for name in sorted({*columns} - {*COLUMNS})]
    if args.answer_start is not None and args.rows is None:
        problems.append("answer_start: is for rows; give rows too")
    if args.run is None and "checkpoint" in columns:
        problems.append("columns: checkpoint needs a run")
    problems += _against_problems(args)
    if args.quant_type == "none" and "quantized" in columns:
        problems.append("columns: quantized needs a quant_type other than none")
    problems += _folder_problems("json", args.json)
    if problems:
        raise ConfigError(problems)


def _against_problems(args: EvaluateArgs) -> list[str]:
    if args.against is None:
        problems = ["against_step: is another run's; give against too"] if args.against_step is not None else []
        return problems + ["columns: against needs another run: --against"] * ("against" in (args.columns or []))
    if args.run is None:
        return ["against: is compared with a run; give run too"]
    if (Path(args.run).resolve(), args.step) == (Path(args.against).resolve(), args.against_step):
        return ["against: found what run is; give another run's folder, or another checkpoint: step, against_step"]
    return []


def _model_problems(args: ModelOrRunArgs) -> list[str]:
    problems = []
    if args.model is None and args.run is None:
        problems.append("model, run: neither is given, expected a model's path or a run's folder")
    if args.step is not None and args.run is None:
        problems.append("step: is a run's; give run too")
    return problems


def _folder_problems(key: str, path: str | None) -> list[str]:
    """Told before minutes of work, not after."""
    if path is None or Path(path).parent.is_dir():
        return []
    return [f"{key}: found {path!r}, but there is no folder {str(Path(path).parent)!r}; make it first"]
