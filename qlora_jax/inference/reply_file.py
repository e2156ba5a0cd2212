"""Writes the replies to a file of prompts as JSON Lines."""

import json
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import Progress

from qlora_jax.data.readers.files import Row
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.decode import DecodeStep


def write_replies(
    rows: Sequence[Row],
    steps: Iterator[DecodeStep],
    tokenizer: Tokenizer,
    write: Callable[[str], object],
    console: Console,
) -> None:
    """Writes one line per row, in order, as soon as its reply and all replies before it are complete.

    A line has the row's columns, and `reply`, `end` (see DecodeStep) and `reply_tokens`.

    Args:
      write: called with each line, including its line break.
      console: shows a progress bar if it is a terminal.
    """
    ids: list[list[int]] = [[] for _ in rows]
    ends: dict[int, str] = {}
    written = 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("replies", total=len(rows))
        for step in steps:
            ids[step.row] += [] if step.token is None else [step.token]
            if step.end is None:
                continue
            ends[step.row] = step.end
            while written in ends:
                write(_line(rows[written], tokenizer.decode(ids[written]), ends[written], len(ids[written])))
                written += 1
            bar.update(task, completed=len(ends))


def _line(row: Row, reply: str, end: str, tokens: int) -> str:
    return json.dumps({**row.data, "reply": reply, "end": end, "reply_tokens": tokens}, ensure_ascii=False) + "\n"
