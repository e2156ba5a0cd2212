"""The figures at the top of the pages that show a run: their names and values as text."""

from collections.abc import Sequence

from qlora_jax.config.sizes import format_duration
from qlora_jax.training.metrics.metrics_file import Record
from qlora_jax.training.metrics.record_summaries import (
    ACCURACY,
    PREFERENCE_LABELS,
    TrainingSummary,
    preference_summary,
    question_summary,
    training_summary,
)


def result_tiles(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Returns the results of a run so far; empty before the first step."""
    done = training_summary(records)
    if not done:
        return []
    return [
        ("steps", f"{done['steps']:,}"),
        *_held_out(done),
        *_preferences(records),
        *_questions(records),
        ("last training loss", "not finite" if done["last_loss"] is None else f"{done['last_loss']:.3f}"),
        ("tokens per second", f"{done['tokens_per_second']:,.0f}"),
        *([] if done["mfu"] is None else [("MFU", f"{done['mfu']:.1%}")]),
        ("time in steps", format_duration(done["seconds"])),
        ("training tokens", f"{done['tokens']:,}"),
        ("supervised of them", f"{done['supervised_tokens']:,}"),
    ]


def _questions(records: Sequence[Record]) -> list[tuple[str, str]]:
    return [
        (one["share"], f"{one['first']['value']:.1%} → {one['last']['value']:.1%}") for one in question_summary(records)
    ]


def _preferences(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Returns the held-out metrics of preferences before and after, the last with its interval."""
    found = []
    for name, (first, last) in preference_summary(records).items():
        form = "{:.1%}" if name == ACCURACY else "{:.3f}"
        change = f"{form.format(first['value'])} → {form.format(last['value'])}"
        found.append((f"held out: {PREFERENCE_LABELS[name]}", f"{change} {_interval(last['interval'], form)}"))
    return found


def _interval(ends: Sequence[float], form: str) -> str:
    """Returns an interval as text without a place where a line may break."""
    return "[{}]".format(",\N{NO-BREAK SPACE}".join(form.format(value) for value in ends))


def _held_out(done: TrainingSummary) -> list[tuple[str, str]]:
    first, last, best = done["first_eval"], done["last_eval"], done["best_eval"]
    if first is None or last is None or best is None:
        return []
    interval = f" {_interval(last['interval'], '{:.3f}')}" if last["interval"] else ""
    tiles = [("held-out loss", f"{first['loss']:.3f} → {last['loss']:.3f}{interval}")]
    if first["perplexity"] is not None and last["perplexity"] is not None:
        tiles.append(("perplexity", f"{first['perplexity']:.3f} → {last['perplexity']:.3f}"))
    if best["step"] == last["step"]:
        return tiles
    return [*tiles, (f"lowest held-out loss, at step {best['step']:,}", f"{best['loss']:.3f}")]
