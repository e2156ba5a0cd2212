"""Prints the data report: a table and a highlighted example on a terminal, plain lines elsewhere."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qlora_jax.data.batching.mixture import Mixture
from qlora_jax.data.formats.columns import LOOKALIKES
from qlora_jax.data.formats.preference import DIFFERENT_PROMPTS, EQUAL_ANSWERS
from qlora_jax.data.report.stats import (
    ONE_TEXT,
    DataReport,
    RowParts,
    ShownText,
    SourceReport,
    SplitReport,
    decode_row,
    row_label,
)
from qlora_jax.data.row_counts import PERCENTILES, percentiles
from qlora_jax.data.rows import TokenRows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.terminal.visible import visible

# Marks around supervised text, for displays without colour.
_MARKS, _ASCII_MARKS = ("⟦", "⟧"), ("[[", "]]")
_SUPERVISED_STYLE = "bold green"
_CONTEXT_CHARS, _SUPERVISED_CHARS = 600, 900
_LABELS_SHOWN = 20
_MUCH_PADDING = 0.3  # share of positions from which packing is advised
_CUT = "rows with a token across the start or end of an answer; its parts are encoded separately"
_MOVED = "rows whose answers begin before the end of the prompt, because a token or the chat template crosses it"


def print_report(report: DataReport, console: Console) -> None:
    """Prints the report's lines and its example, without colours, boxes and wrapping if `console` is not a terminal."""
    marks = _ASCII_MARKS if console.options.ascii_only else _MARKS
    example, title = format_example(report.example, marks), _example_title(report, marks)
    if console.is_terminal:
        table = Table.grid(padding=(0, 2))
        for name, value in report_lines(report):
            table.add_row(Text(name, "bold"), Text(value))
        console.print(Panel(table, title="data", title_align="left"))
        console.print(Panel(example, title=Text(title), title_align="left"))
        return
    for name, value in report_lines(report):
        console.print(f"data: {name}: {value}", soft_wrap=True, markup=False, highlight=False)
    console.print(f"data: example: {title}", soft_wrap=True, markup=False, highlight=False)
    for line in example.plain.split("\n"):
        console.print(f"  | {line}", soft_wrap=True, markup=False, highlight=False)


def _example_title(report: DataReport, marks: tuple[str, str]) -> str:
    label = f"label {_on_one_line(report.example_label)}" if report.example_label else ""
    return ", ".join(filter(None, (report.example_place, label, legend(report, marks))))


def report_lines(report: DataReport) -> list[tuple[str, str]]:
    """Returns (name, value) of every line of the report."""
    return [
        *_source_lines(report.sources),
        *_split_lines("train", report.train, report),
        *_unseen(report.unseen),
        ("steps per epoch", _steps(report)),
        ("positions used", _positions(report)),
        *(_split_lines("held out", report.eval, report) if report.eval else [("held out", "none")]),
        *_warning(report.shared, "held-out rows that are also trained on, so their loss is not that of new data"),
    ]


def _steps(report: DataReport) -> str:
    by_window = f", in {report.windows:,} windows" if report.windows > 1 else ""
    if report.packs is not None:
        drawn = "" if report.rows_per_epoch == report.train.kept else " per epoch, by weight"
        rows = f"{report.rows_per_epoch:,} rows{drawn} in {report.packs:,} packs of {report.buckets[0]:,} positions"
        return f"{report.steps_per_epoch:,} of {report.rows_per_step} packs{by_window}; {rows}"
    by_length = ", ".join(f"{length}: {steps:,}" for length, steps in zip(report.buckets, report.steps, strict=True))
    return f"{report.steps_per_epoch:,} of {report.rows_per_step} rows{by_window}; by padded length {by_length}"


def _positions(report: DataReport) -> str:
    used = f"{1 - report.padding_share:.1%} of those in an epoch's batches; the rest is padding"
    if report.packs is not None or report.parts != ONE_TEXT or report.padding_share < _MUCH_PADDING:
        return used
    return f"{used}. With data.packing=true rows share the positions of a pack, so a step has more rows"


def _source_lines(sources: Sequence[SourceReport]) -> list[tuple[str, str]]:
    """Returns a line for each of several files."""
    if len(sources) == 1 and sources[0].weight == 1:
        return []
    seen = [weight * split.supervised for split, weight in sources]
    return [
        (
            "source",
            f"{split.path}, format {split.form}: {split.kept:,} rows, weight {weight:g}, "
            f"{share / sum(seen):.1%} of the supervised targets{_ignored(split)}",
        )
        for (split, weight), share in zip(sources, seen, strict=True)
    ]


def _ignored(split: SplitReport) -> str:
    return f"; columns not used: {', '.join(split.ignored_columns)}" if split.ignored_columns else ""


def _split_lines(name: str, split: SplitReport, report: DataReport) -> list[tuple[str, str]]:
    return [
        (
            name,
            f"{split.kept:,} of {split.rows + split.bad:,} rows of {split.path}, format {split.form}{_ignored(split)}",
        ),
        *_bad_rows(split),
        ("tokens per text" if split.text_lengths else "tokens per row", _quantiles(split.percentiles)),
        *[(f"tokens of {part}", _quantiles(percentiles(counts))) for part, counts in split.text_lengths.items()],
        _supervised(split),
        ("too long", _too_long(split, report)),
        *_pairs(split),
        *_labels(split),
        *_lookalikes(split),
        *_warning(split.cut, _MOVED if split.text_lengths else _CUT),
        *_branches(split),
        *_warning(split.lossy, "rows with characters that the tokenizer drops or rewrites"),
        *_warning(split.doubled_bos, "rows that begin with bos twice"),
        *_warning(
            split.without_bos, "rows without bos, which the tokenizer asks for but the chat template does not write"
        ),
        *_warning(
            split.special_text, "rows whose text contains the text of a special token; it is encoded as that token"
        ),
    ]


def _quantiles(values: Sequence[int]) -> str:
    return ", ".join(f"{_quantile_name(p)} {n:,}" for p, n in zip(PERCENTILES, values, strict=True))


def _supervised(split: SplitReport) -> tuple[str, str]:
    if "prompt" in split.text_lengths and len(split.text_lengths) == 1:
        return ("replies", f"sampled after the last token of {split.supervised:,} prompts")
    if split.head_texts:
        return ("read by the head", f"the last position of {split.supervised:,} texts")
    return ("supervised", f"{split.supervised_share:.1%} of {split.tokens:,} targets ({split.supervised:,})")


def _pairs(split: SplitReport) -> list[tuple[str, str]]:
    """Returns the lines about pairs: those dropped, and the length bias."""
    if "rejected" not in split.text_lengths:
        return []
    dropped = {
        "identical": _with_reason(split, EQUAL_ANSWERS),
        "with prompts that differ": _with_reason(split, DIFFERENT_PROMPTS),
        "made identical by truncation": split.truncated_equal,
    }
    longer = {"chosen": split.longer_chosen, "rejected": split.longer_rejected}
    longer["neither"] = split.rows - sum(longer.values())
    shares = ", ".join(f"{name} {count / split.rows:.1%}" for name, count in longer.items())
    extra = split.extra_tokens / split.rows
    difference = f"chosen is {abs(extra):.1f} tokens {'shorter' if extra < 0 else 'longer'} on average"
    return [
        ("dropped pairs", ", ".join(f"{count:,} {what}" for what, count in dropped.items())),
        ("longer answer", f"{shares}; {difference}"),
    ]


def _with_reason(split: SplitReport, problem: str) -> int:
    return sum(count for reason, count in split.bad_reasons.items() if reason.startswith(problem))


def _labels(split: SplitReport) -> list[tuple[str, str]]:
    """Returns a line with the most frequent labels, or with the range and the mean of numbers."""
    if (numbers := split.label_numbers) is not None:
        mean = numbers.total / numbers.count
        return [("labels", f"min {numbers.smallest:g}, mean {mean:g}, max {numbers.largest:g}")]
    if not split.labels:
        return []
    most = sorted(split.labels.items(), key=lambda label: -label[1])[:_LABELS_SHOWN]
    listed = ", ".join(f"{_on_one_line(name)} {count:,} ({count / split.rows:.1%})" for name, count in most)
    more = len(split.labels) - len(most)
    return [("labels", f"{listed} and {more:,} more" if more else listed)]


def _branches(split: SplitReport) -> list[tuple[str, str]]:
    """Returns lines on rows with turns that the template writes differently later, and on reasoning that it drops."""
    turns = 0 if split.text_lengths else split.branched  # the branches of pairs are their answers
    lines = _warning(turns, "rows with turns that the chat template writes differently in later prompts")
    lines += _warning(split.lost_branches, "such turns that are lost because truncation left no room for them")
    if split.unseen_reasoning:
        what = (
            "rows with reasoning that the chat template does not write, so the model never sees it. Remove "
            "enable_thinking: false if it is set; otherwise write the reasoning into the content as "
            "<think>...</think>, or set data.chat_template to one that reads reasoning_content"
        )
        lines.append(("note", f"{what}: {split.unseen_reasoning:,}, the first is {split.unseen_rows[0].where}"))
    return lines


def _bad_rows(split: SplitReport) -> list[tuple[str, str]]:
    """Returns a line with the rows that data.bad_rows dropped, and one for each of the first."""
    if not split.bad:
        return []
    reasons = "; ".join(f"{count:,}: {_on_one_line(reason)}" for reason, count in split.bad_reasons.items())
    listed = [("bad row", _on_one_line(f"{row.where}: {row.problem}")) for row in split.bad_rows]
    more = split.bad - len(listed)
    return [
        ("bad rows", f"{split.bad:,} dropped (data.bad_rows drop). {reasons}"),
        *listed,
        *([("bad row", f"... and {more:,} more")] if more else []),
    ]


def _on_one_line(text: str) -> str:
    return visible(text).replace("\n", "␊")


def _lookalikes(split: SplitReport) -> list[tuple[str, str]]:
    return [
        (
            "note",
            f"rows that look like {name} ({' / '.join(LOOKALIKES[name].tags)}), all of whose tokens are learned, those "
            f"of the human too: {count:,}. To learn answers only, set --data.format {LOOKALIKES[name].answers_only}",
        )
        for name, count in split.lookalikes.items()
    ]


def _unseen(tokens: Sequence[str]) -> list[tuple[str, str]]:
    if not tokens:
        return []
    names = ", ".join(map(repr, tokens))
    return [("note", f"new tokens in no training row, whose meaning the model cannot learn: {names}")]


def _quantile_name(percentile: int) -> str:
    return {50: "median", 100: "longest"}.get(percentile, f"{percentile}%")


def _too_long(split: SplitReport, report: DataReport) -> str:
    answers = f"{split.lost_ends:,} answer{'s' if split.lost_ends > 1 else ''}"
    counts = {
        f"truncated {report.side}" + f" ({answers} without the end)" * bool(split.lost_ends): split.truncated,
        "dropped": split.overlong,
        "dropped with no answer left": split.unsupervised,
        "dropped with equal answers left": split.truncated_equal,
    }
    listed = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) or "none"
    return f"{listed} (data.max_length {report.max_length:,})"


def _warning(count: int, what: str) -> list[tuple[str, str]]:
    return [("note", f"{what}: {count:,}")] if count else []


def legend(report: DataReport, marks: tuple[str, str]) -> str:
    """Returns the meaning of the marks, which examples for a head lack."""
    if report.parts.names == ("prompt",):
        return "as the model continues it"
    return "as the head reads it" if report.parts.head else f"the loss sees the text in {marks[0]} {marks[1]}"


def format_example(segments: Sequence[ShownText], marks: tuple[str, str] = _MARKS) -> Text:
    """Returns the example with supervised text in colour and between marks. The middle of long texts is left out.

    Each of several texts begins on a new line, with its name.
    """
    text = Text()
    for segment in segments:
        if segment.name:
            text.append(f"\n{segment.name}: " if text else f"{segment.name}: ", style="bold")
        shown = visible(_shorten(segment.text, _SUPERVISED_CHARS if segment.supervised else _CONTEXT_CHARS))
        if segment.supervised:
            text.append(f"{marks[0]}{shown}{marks[1]}", style=_SUPERVISED_STYLE)
        else:
            text.append(shown)
    return text


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ...({len(text) - 2 * half:,} characters)... {text[-half:]}"


class TextRun(NamedTuple):
    """A piece of text: one special token, one line end, or the text between them."""

    text: str
    kind: Literal["text", "special", "newline"]


class ExampleSegment(NamedTuple):
    """Text of neighbouring tokens that the loss sees, or of neighbouring tokens that it does not see.

    Fields:
      name: the text that begins with it, such as `rejected`, if the row has several.
    """

    runs: tuple[TextRun, ...]
    supervised: bool
    name: str = ""


class ExampleRow(NamedTuple):
    """A row as text.

    Fields:
      place: its `file:line`.
      label: its label; empty if it has none.
      tokens, supervised: number of its targets, and of those that the loss sees.
    """

    place: str
    label: str
    tokens: int
    supervised: int
    segments: tuple[ExampleSegment, ...]


def example_rows(
    train: TokenRows | Mixture, tokenizer: Tokenizer, count: int, parts: RowParts = ONE_TEXT
) -> tuple[ExampleRow, ...]:
    """Returns at most `count` rows of the first window, shortest first, spread evenly over its lengths.

    The joined text of a segment equals its decoded ids.
    """
    rows, indices = train.window(0, 0)
    by_length = indices[np.argsort(rows.lengths[indices], kind="stable")]
    chosen = np.unique(np.linspace(0, len(by_length) - 1, min(count, len(by_length))).round().astype(int))
    return tuple(_example_row(train, rows, int(index), tokenizer, parts) for index in by_length[chosen])


def _example_row(
    train: TokenRows | Mixture, rows: TokenRows, index: int, tokenizer: Tokenizer, parts: RowParts
) -> ExampleRow:
    _, supervised = rows.row(index)
    return ExampleRow(
        place=train.where(int(rows.numbers[index])),
        label=row_label(rows, index, parts),
        tokens=int(rows.lengths[index]),
        supervised=int(supervised[1:].sum()),  # no position predicts the first id
        segments=tuple(
            ExampleSegment(split_runs(text, tokenizer.special_text), seen, name)
            for text, seen, name in decode_row(rows, index, tokenizer, parts)
        ),
    )


def split_runs(text: str, special: re.Pattern[str]) -> tuple[TextRun, ...]:
    """Returns all of `text`, split at special tokens and line ends."""
    runs, at = [], 0
    for match in re.finditer(f"(?P<special>{special.pattern})|\n", text):
        runs += [
            TextRun(text[at : match.start()], "text"),
            TextRun(match.group(), "newline" if match["special"] is None else "special"),
        ]
        at = match.end()
    return tuple(run for run in (*runs, TextRun(text[at:], "text")) if run.text)
