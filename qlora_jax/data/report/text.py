"""The data report as text: a table and a marked example on a terminal, plain lines elsewhere."""

from collections.abc import Sequence

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qlora_jax.data.loss_mask.spans import Segment
from qlora_jax.data.report.stats import DataReport, SourceReport, SplitReport
from qlora_jax.data.row_counts import PERCENTILES

# Around what the loss sees, so that it can be told without colour.
_MARKS, _ASCII_MARKS = ("⟦", "⟧"), ("[[", "]]")
_SEEN_STYLE = "bold green"
_CONTEXT_CHARS, _SEEN_CHARS = 600, 900

# Escape sequences in someone's data must not reach the terminal, nor what HTML can't hold a page.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
VISIBLE |= {code: 0xFFFD for code in range(0x80, 0xA0)}
# Marks that turn the direction of what follows, past the end of their own row too.
VISIBLE |= {code: f"<U+{code:04X}>" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def print_report(report: DataReport, console: Console) -> None:
    """Prints facts and example; without colours, boxes and wrapping where `console` is no terminal."""
    marks = _ASCII_MARKS if console.options.ascii_only else _MARKS
    example, title = format_example(report.example, marks), f"{report.example_place}, {legend(marks)}"
    if console.is_terminal:
        table = Table.grid(padding=(0, 2))
        for name, value in facts(report):
            table.add_row(Text(name, "bold"), Text(value))
        console.print(Panel(table, title="data", title_align="left"))
        console.print(Panel(example, title=Text(title), title_align="left"))
        return
    for name, value in facts(report):
        console.print(f"data: {name}: {value}", soft_wrap=True, markup=False, highlight=False)
    console.print(f"data: example: {title}", soft_wrap=True, markup=False, highlight=False)
    for line in example.plain.split("\n"):
        console.print(f"  | {line}", soft_wrap=True, markup=False, highlight=False)


def facts(report: DataReport) -> list[tuple[str, str]]:
    """(name, value) of every line of the report."""
    return [
        *_source_facts(report.sources),
        *_side_facts("train", report.train, report.max_length),
        *_unseen(report.unseen),
        ("steps an epoch", _steps(report)),
        ("places used", f"{1 - report.padding_share:.1%} of those in an epoch's batches; the rest is padding"),
        *(_side_facts("held out", report.eval, report.max_length) if report.eval else [("held out", "none")]),
        *_warning(report.shared, "held-out rows that are also trained on, so that their score says little"),
    ]


def _steps(report: DataReport) -> str:
    by_window = f", in {report.windows:,} windows" if report.windows > 1 else ""
    if report.packs is not None:
        drawn = "" if report.rows_per_epoch == report.train.kept else " that an epoch draws by weight"
        rows = f"{report.rows_per_epoch:,} rows{drawn} in {report.packs:,} packs of {report.buckets[0]:,} places"
        return f"{report.steps_per_epoch:,} of {report.rows_per_step} packs{by_window}; {rows}"
    by_length = ", ".join(f"{length}: {steps:,}" for length, steps in zip(report.buckets, report.steps, strict=True))
    return f"{report.steps_per_epoch:,} of {report.rows_per_step} rows{by_window}; by padded length {by_length}"


def _source_facts(sources: Sequence[SourceReport]) -> list[tuple[str, str]]:
    """What each of several files has of an epoch."""
    if len(sources) == 1 and sources[0].weight == 1:
        return []
    seen = [weight * side.supervised for side, weight in sources]
    return [
        (
            "source",
            f"{side.path}, form {side.form}: {side.kept:,} rows, weight {weight:g}, "
            f"{share / sum(seen):.1%} of the targets that are learned{_ignored(side)}",
        )
        for (side, weight), share in zip(sources, seen, strict=True)
    ]


def _ignored(side: SplitReport) -> str:
    return f"; columns not used: {', '.join(side.ignored_columns)}" if side.ignored_columns else ""


def _side_facts(name: str, side: SplitReport, max_length: int) -> list[tuple[str, str]]:
    quantiles = ", ".join(f"{_quantile_name(p)} {n:,}" for p, n in zip(PERCENTILES, side.percentiles, strict=True))
    return [
        (name, f"{side.kept:,} of {side.rows:,} rows of {side.path}, form {side.form}{_ignored(side)}"),
        ("tokens a row", quantiles),
        ("supervised", f"{side.supervised_share:.1%} of {side.tokens:,} targets ({side.supervised:,})"),
        ("too long", _too_long(side, max_length)),
        *_warning(side.cut, "rows with a token cut where an answer starts or ends, as generation cuts it"),
        *_warning(side.lossy, "rows with characters that the tokenizer leaves out or rewrites"),
        *_warning(side.doubled_bos, "rows that begin with bos twice"),
        *_warning(
            side.without_bos, "rows without bos, which the tokenizer asks for and the chat template does not write"
        ),
        *_warning(side.special_text, "rows that spell a special token in their own text; it counts as that token"),
    ]


def _unseen(tokens: Sequence[str]) -> list[tuple[str, str]]:
    if not tokens:
        return []
    told = f"{', '.join(map(repr, tokens))}; nothing is learned of what they mean"
    return [("note", f"new tokens that no training row has: {told}")]


def _quantile_name(percentile: int) -> str:
    return {50: "median", 100: "longest"}.get(percentile, f"{percentile}%")


def _too_long(side: SplitReport, max_length: int) -> str:
    counts = {
        "truncated": side.truncated,
        "dropped": side.overlong,
        "dropped with no answer left": side.unsupervised,
    }
    told = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) or "none"
    return f"{told} (data.max_length {max_length:,})"


def _warning(count: int, what: str) -> list[tuple[str, str]]:
    return [("note", f"{what}: {count:,}")] if count else []


def legend(marks: tuple[str, str]) -> str:
    """What the marks mean, in a few words."""
    return f"the loss sees what is in {marks[0]} {marks[1]}"


def format_example(segments: Sequence[Segment], marks: tuple[str, str] = _MARKS) -> Text:
    """The example with what the loss sees in colour and between marks; long runs are shortened in their middle."""
    text = Text()
    for segment in segments:
        shown = _shorten(segment.text, _SEEN_CHARS if segment.supervised else _CONTEXT_CHARS).translate(VISIBLE)
        if segment.supervised:
            text.append(f"{marks[0]}{shown}{marks[1]}", style=_SEEN_STYLE)
        else:
            text.append(shown)
    return text


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ...({len(text) - 2 * half:,} characters)... {text[-half:]}"
