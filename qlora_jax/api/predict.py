"""`classify`, `score` and `embed`: predictions of a trained sequence head; and the file that `predict` writes."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from rich.console import Console
from rich.progress import Progress

from qlora_jax.api.load import load_opened
from qlora_jax.api.provenance import head_of_model, parts_of
from qlora_jax.config.objectives import objectives_with
from qlora_jax.data.readers.files import Place, Row, raise_problems, read_lines
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.heads.predict_settings import PredictArgs
from qlora_jax.evaluation.heads.predictions import (
    Prediction,
    added_names,
    class_predictions,
    encode_texts,
    normalized,
    predicted_columns,
)
from qlora_jax.evaluation.task_file import read_task_rows
from qlora_jax.inference.result_cache import open_cache
from qlora_jax.io.loading.progress import loading
from qlora_jax.io.pretrained import open_pretrained, weight_settings
from qlora_jax.models.decoder import CausalLM
from qlora_jax.objectives.head_objective import TrainedHead

# Texts; or rows with the columns of training data, such as {"sentence1": ..., "sentence2": ...}.
Texts = Sequence[str | Mapping[str, object]]
TEXT_SUFFIXES = (".txt", ".txt.gz")


def classify(model: CausalLM, tokenizer: Tokenizer, rows: Texts) -> list[Prediction]:
    """Returns the label of each text, with the probability of every label.

    >>> run = q.finetune(q.add_adapter(model), tokenizer, "labels.jsonl", output="runs/labels", steps=1,
    ...     objective="classification", max_length=128)
    >>> q.classify(run.model, tokenizer, ["good"])[0].label in ("bad", "good")
    True

    Args:
      model: a model that was trained with objective=classification or multi_label.
      rows: texts; or rows with the columns of the training data; `label` may be missing.

    Raises:
      ValueError: the model has another head, or rows cannot be used; the message lists them.
    """
    head = _head(model, objectives_with("labels"))
    return class_predictions(_outputs(model, tokenizer, rows, head), head)


def score(model: CausalLM, tokenizer: Tokenizer, rows: Texts) -> Float64[np.ndarray, " rows"]:
    """Returns the number or the reward of each text.

    >>> run = q.finetune(q.add_adapter(model), tokenizer, "numbers.jsonl", output="runs/numbers", steps=1,
    ...     objective="regression", max_length=128)
    >>> q.score(run.model, tokenizer, ["good", "bad"]).shape
    (2,)

    Args:
      model: a model that was trained with objective=regression or reward.
      rows: for regression as for `classify`; for rewards, rows with `prompt` and `completion`, or with `messages`.

    Raises:
      ValueError: the model has another head, or rows cannot be used; the message lists them.
    """
    head = _head(model, ("regression", "reward"))
    return _outputs(model, tokenizer, rows, head)[:, 0]


def embed(
    model: CausalLM, tokenizer: Tokenizer, rows: Texts, *, normalize: bool = True
) -> Float64[np.ndarray, "rows width"]:
    """Returns the embedding of each text, the pooled hidden state.

    >>> run = q.finetune(q.add_adapter(model), tokenizer, "pairs.jsonl", output="runs/pairs", steps=1,
    ...     objective="embedding", max_length=128)
    >>> q.embed(run.model, tokenizer, ["good", "bad"]).shape  # texts, width
    (2, 64)

    Args:
      model: a model that was trained with objective=embedding.
      rows: texts, or rows with the column `text`.
      normalize: divide each by its length, so that products are cosine similarities.

    Raises:
      ValueError: the model has another head, or rows cannot be used; the message lists them.
    """
    states = _outputs(model, tokenizer, rows, _head(model, ("embedding",)))
    return normalized(states) if normalize else states


def _outputs(model: CausalLM, tokenizer: Tokenizer, rows: Texts, head: TrainedHead) -> Float64[np.ndarray, "rows _"]:
    if isinstance(rows, str | Mapping):  # a text is a sequence of texts, its characters
        raise ValueError(f"rows: found one {type(rows).__name__}, expected a list of texts or rows. Put it into a list")
    named = [_row(number, {"text": row} if isinstance(row, str) else row) for number, row in enumerate(rows)]
    texts = encode_texts("rows", named, head, tokenizer, model.config.max_positions)
    return texts.outputs(parts_of(model))


def _head(model: CausalLM, objectives: Sequence[str]) -> TrainedHead:
    """Returns the model's head; raises ValueError if its objective is another one."""
    head = head_of_model(model)
    if head is None or head.objective not in objectives:
        found = "a model without a sequence head" if head is None else f"a head of objective={head.objective}"
        raise ValueError(
            f"model: it cannot predict this (found {found}, expected {' or '.join(objectives)}). Use classify for "
            "labels, score for numbers and rewards, embed for embeddings, and generate_text without a head"
        )
    return head


def predict_rows(args: PredictArgs, console: Console) -> list[dict[str, object]]:
    """Returns the rows of a file, or one text, with the columns that the run's head predicts.

    Args:
      args: settings that `check_predict` accepts.
      console: shows progress, if it is a terminal.

    Raises:
      ValueError: the run has no head, or rows cannot be used; the message lists them.
    """
    path = args.rows or "text"
    rows = [_row(0, {"text": args.text})] if args.rows is None else _read_texts(path, args)
    opened = open_pretrained(model=args.model, run=args.run, step=args.step)
    if opened.run is None or opened.run.head is None:
        raise ValueError(
            f"{args.run}: has no sequence head. Use generate, or a run of an objective such as classification"
        )
    head = opened.run.head
    problems = [(row.place, problem) for row in rows for problem in _column_problems(row.data, added_names(head))]
    raise_problems(path, problems, len(rows))
    texts = encode_texts(path, rows, head, opened.tokenizer, opened.features.max_positions)
    with loading(console) as progress:
        model = load_opened(opened, weight_settings(opened, args.quant_type, args.compute_dtype), None, progress)
    parts = parts_of(model)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task("predictions", total=len(rows))
        outputs = texts.outputs(parts, lambda done: bar.update(line, completed=done), open_cache(args.keep, parts))
    found = predicted_columns(outputs, head)
    return [{**row.data, **columns} for row, columns in zip(rows, found, strict=True)]


def _row(number: int, columns: Mapping[str, object]) -> Row:
    return Row(Place(number + 1, number), dict(columns))


def _read_texts(path: str, args: PredictArgs) -> list[Row]:
    """Returns the rows of a file; of a .txt file, a row {"text": line} per line that is not blank.

    Raises:
      ValueError: the file cannot be read, has no row, or lacks a column of `file_columns`.
    """
    if Path(path).name.endswith(TEXT_SUFFIXES):
        lines = [(line, text) for line, text in read_lines(path) if text.strip()]
        return [Row(Place(line, number), {"text": text}) for number, (line, text) in enumerate(lines)][: args.max_rows]
    return read_task_rows(path, "rows", args.file_columns, args.max_rows)


def _column_problems(columns: Mapping[str, object], added: Collection[str]) -> list[str]:
    """Returns the reasons why a row's columns cannot be written as JSON with those that predictions add."""
    problems = []
    for name, value in columns.items():
        if name in added:
            problems.append(f"column {name!r} exists, and the predictions get this name. Rename it")
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            problems.append(f"column {name!r} cannot be written as JSON ({error}). Remove it, or make it text")
    return problems
