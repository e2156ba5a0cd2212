"""Tasks from files: a text, questions with options, rows in the forms of training data."""

from collections.abc import Mapping, Sequence

import numpy as np

from qlora_jax.data.encoder import check_rows, encode_rows, expand_examples
from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.loss_mask.by_offsets import encode_segments
from qlora_jax.data.loss_mask.spans import Segment
from qlora_jax.data.readers.files import Problem, Row, raise_problems, read_text
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.columns import read_each, read_named
from qlora_jax.evaluation.loglikelihood import ScoredIds, windows
from qlora_jax.evaluation.tasks.choices import Choice
from qlora_jax.evaluation.tasks.question_rows import Question, read_question
from qlora_jax.evaluation.tasks.task import ChoiceTask, RowsTask, TextTask


def text_task(
    path: str, tokenizer: Tokenizer, *, window: int, stride: int | None, max_tokens: int | None, max_positions: int
) -> TextTask:
    """Windows of `window` tokens, one `stride` after the other (None: no overlap), of the text in a file; nothing is
    added to it. Each token is scored once, in the first window that holds it."""
    if window > max_positions:
        raise ValueError(f"window={window}: the model reads {max_positions} tokens; set --window to at most that")
    ids = tokenizer.encode(read_text(path))
    used = ids[:max_tokens]
    if len(used) < 2:
        raise ValueError(f"{path}: {len(used)} tokens to score, expected at least 2")
    rows = windows(used, window, stride)
    scored = sum(int(mask[1:].sum()) for _, mask in rows)
    apart = "" if stride is None else f", {stride} apart"
    return TextTask(title=f"{path}: {len(rows)} windows of {window} tokens{apart}, {scored:,} scored", rows=rows)


def rows_task(
    path: str,
    tokenizer: Tokenizer,
    *,
    max_rows: int | None,
    max_positions: int,
    answer_start: str | None = None,
    named: Mapping[str, str] | None = None,
) -> RowsTask:
    """The rows of a file in a form of training data; what a training run would learn is scored.

    Args:
      answer_start: how every answer begins; it is given to the model, and what follows it is scored.
      named: see `columns.read_named`.

    Raises:
      ValueError: rows that can't be scored, all of them.
    """
    rows: Sequence[Row] = read_named(path, "rows", named, max_rows)
    form = detect_format(path, rows)
    check_rows(path, rows, form)
    rows, form = expand_examples(rows, form)
    scored = [(row.ids, row.supervised) for row in encode_rows(path, rows, form, tokenizer)]
    title = f"{path}: answers of {len(rows)} rows"
    if answer_start is not None:
        scored = _after_start(path, rows, scored, tokenizer, answer_start)
        title += f", after {answer_start!r}"
    _check_lengths(path, rows, [[one] for one in scored], max_positions)
    return RowsTask(title=title, rows=scored)


def _after_start(
    path: str, rows: Sequence[Row], scored: Sequence[ScoredIds], tokenizer: Tokenizer, answer_start: str
) -> list[ScoredIds]:
    """The same rows without the tokens of `answer_start`, with which the scored part of each has to begin."""
    start = np.array(tokenizer.encode(answer_start), np.int32)
    after: list[ScoredIds] = []
    problems: list[Problem] = []
    for row, (ids, supervised) in zip(rows, scored, strict=True):
        places = np.flatnonzero(supervised)
        if not np.array_equal(ids[places[: len(start)]], start):
            found = tokenizer.decode(ids[places[: len(start)]].tolist())
            problems.append((row.place, f"the answer begins with {found!r}, expected {answer_start!r}"))
        rest = supervised.copy()
        rest[places[: len(start)]] = False
        after.append((ids, rest))
    raise_problems(path, problems, len(rows))
    return after


def choice_task(
    path: str,
    tokenizer: Tokenizer,
    *,
    max_rows: int | None,
    max_positions: int,
    named: Mapping[str, str] | None = None,
) -> ChoiceTask:
    """The questions of a file: an option's likelihood is that of its text as the reply to the question.

    Args:
      named: see `columns.read_named`.
    """
    rows = read_named(path, "choices", named, max_rows)
    questions = read_each(path, rows, lambda row: read_question(row.data))
    options = [_encoded_options(question, tokenizer) for question in questions]
    _check_lengths(path, rows, options, max_positions)
    choices = [Choice(options=o, answer=question.answer) for o, question in zip(options, questions, strict=True)]
    return ChoiceTask(title=f"{path}: {len(choices)} questions", choices=choices)


def _encoded_options(question: Question, tokenizer: Tokenizer) -> list[ScoredIds]:
    if tokenizer.chat_template is None:
        prompt, options = f"Question: {question.prompt}\nAnswer:", [f" {option}" for option in question.options]
    else:
        messages = [{"role": "user", "content": question.prompt}]
        prompt, options = tokenizer.render(messages, add_generation_prompt=True), question.options
    # A template writes its own bos; plain text has one where the tokenizer asks for it.
    bos = [tokenizer.bos_id] if tokenizer.add_bos_token and tokenizer.chat_template is None else []
    encodings = tokenizer.encode_spans([prompt + option for option in options])
    encoded = [
        encode_segments(tokenizer, [Segment(prompt, False), Segment(option, True)], encoding)
        for option, encoding in zip(options, encodings, strict=True)
    ]
    return [
        (np.array([*bos, *row.ids], np.int32), np.concatenate([np.zeros(len(bos), bool), row.supervised]))
        for row in encoded
    ]


def _check_lengths(path: str, rows: Sequence[Row], scored: Sequence[Sequence[ScoredIds]], max_positions: int) -> None:
    """Raises one ValueError that names every row longer than the model reads, or with nothing to score."""
    problems: list[Problem] = []
    for row, parts in zip(rows, scored, strict=True):
        longest = max(len(ids) for ids, _ in parts)
        if longest > max_positions:
            problems.append((row.place, f"{longest} tokens, and the model reads {max_positions}; shorten it"))
        elif not all(supervised[1:].any() for _, supervised in parts):
            problems.append((row.place, "no token to score"))
    raise_problems(path, problems, len(rows))
