"""What a run shows while it goes: a banner, then a live line in a terminal, or plain lines in a file or a pipe."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from qlora_jax.config import QUESTION_KINDS
from qlora_jax.config.sizes import format_bytes
from qlora_jax.training.eval_metrics import loss_interval, task_metrics

_WINDOW = 20  # steps that speed and time left are averaged over
_SAMPLE_CHARACTERS = 160


def print_banner(title: str, rows: Mapping[str, str], console: Console) -> None:
    """Prints the title and one aligned `name  value` row each; long values wrap in a terminal and nowhere else."""
    if not console.is_terminal:
        width = max(map(len, rows))
        lines = [title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(f"  {name}", style="cyan"), Text(value))
    console.print(Text(title, style="bold"))
    console.print(table)


def format_duration(seconds: float) -> str:
    """`75.2` -> `1:15`, `3675` -> `1:01:15`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Throughput:
    """Tokens a second, MFU and seconds a step over the last steps; the first of a length compiles and does not count.

    All are None before the second step of a length.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, Mapping[str, Any]]] = deque(maxlen=_WINDOW)  # wall clock, record
        self._lengths: set[int] = set()
        self._last = 0.0

    def add(self, record: Mapping[str, Any], now: float) -> None:
        """One step that ended at `now`; the time since the last one counts for the time left."""
        if record["length"] in self._lengths:
            self._steps.append((now - self._last, record))
        self._lengths.add(record["length"])
        self._last = now

    @property
    def tokens_per_second(self) -> float | None:
        """Of what is no padding, over the time in steps."""
        return self._in_steps(lambda record: record["tokens"])

    @property
    def mfu(self) -> float | None:
        """None also where the device's peak is not known."""
        if not all("mfu" in record for _, record in self._steps):
            return None
        return self._in_steps(lambda record: record["mfu"] * record["seconds"])

    @property
    def seconds_per_step(self) -> float | None:
        """Of the wall clock, evaluations and checkpoints between steps included."""
        return sum(wall for wall, _ in self._steps) / len(self._steps) if self._steps else None

    def _in_steps(self, done: Callable[[Mapping[str, Any]], float]) -> float | None:
        seconds = sum(record["seconds"] for _, record in self._steps)
        return sum(done(record) for _, record in self._steps) / seconds if seconds else None


def status_line(record: Mapping[str, Any], pace: Throughput, steps_left: int) -> str:
    """One step's numbers in words: `loss 2.345  812 tok/s  MFU 41.0%  1:23 left  lr 2.0e-04  grad 0.31`, and memory.

    What a person looks for first comes first: a narrow terminal cuts the end.
    """
    speed, step_time, mfu = pace.tokens_per_second, pace.seconds_per_step, pace.mfu
    parts = [
        f"loss {record['loss']:.3f}",
        "" if speed is None else f"{speed:.0f} tok/s",
        "" if mfu is None else f"MFU {mfu:.1%}",
        "" if step_time is None else f"{format_duration(steps_left * step_time)} left",
        f"lr {record['learning_rate']:.1e}",
        f"grad {record['grad_norm']:.2f}",
        _moved(record),
        _held(record),
    ]
    return "  ".join(filter(None, parts))


def _moved(record: Mapping[str, Any]) -> str:
    """`state 1.50 GiB resident, 96.00 MiB in, 96.00 MiB out`; empty where nothing is paged."""
    if "resident_bytes" not in record:
        return ""
    resident, came, went = (
        format_bytes(record[key]) for key in ("resident_bytes", "paged_in_bytes", "paged_out_bytes")
    )
    return f"state {resident} resident, {came} in, {went} out"


def _held(record: Mapping[str, Any]) -> str:
    """`device 10.20 GiB  host 1.50 GiB`, of what is known."""
    places = ("device", "host")
    return "  ".join(f"{place} {format_bytes(record[key])}" for place in places if (key := f"{place}_bytes") in record)


def evaluation_lines(record: Mapping[str, Any]) -> list[str]:
    """`held-out loss 1.250 [1.201, 1.304], perplexity 3.490`, and a line for each kind of questions that was asked."""
    lines = []
    if "eval_loss" in record:
        interval = " [{:.3f}, {:.3f}]".format(*ends) if (ends := loss_interval(record)) else ""
        lines.append(f"held-out loss {record['eval_loss']:.3f}{interval}, perplexity {record['eval_perplexity']:.3f}")
    for task in QUESTION_KINDS:
        told = [f"{s.words} {s.value:.1%} [{100 * s.low:.1f}, {100 * s.high:.1f}]" for s in task_metrics(record, task)]
        lines += [f"{task}: {', '.join(told)}"] if told else []
    return lines


class Display:
    """Shows the steps and evaluations of a run; use as a context manager, so that a terminal is left as it was.

    Records are those of metrics.jsonl: `step`, `loss`, `learning_rate`, `grad_norm`, `tokens`, `length`, `seconds` of a
    step; `mfu`, `host_bytes`, `device_bytes` where they are known; `resident_bytes`, `paged_in_bytes`,
    `paged_out_bytes`, `paging_problems` where state is paged; `step`, `eval_loss` with its interval and
    `eval_perplexity` where rows are held out, and figures.py's of questions, of an evaluation.
    """

    def __init__(self, total_steps: int, first_step: int, log_every: int, console: Console):
        """`first_step` steps are done; without a terminal, every `log_every`-th step and the last have a line."""
        self._total, self._log_every, self._console = total_steps, log_every, console
        self._pace = Throughput()
        self._told: set[str] = set()
        step = f"step {total_steps}/{total_steps}"
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}", table_column=Column(min_width=len(step), no_wrap=True)),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task(
            "", total=total_steps, completed=first_step, status="compiling the first step"
        )

    def step(self, record: Mapping[str, Any]) -> None:
        """Shows one optimizer step."""
        step = record["step"]
        for problem in set(record.get("paging_problems", ())) - self._told:
            self._told.add(problem)  # each once: what fails at one step fails at the next
            self.message(f"step {step}: {problem}")
        self._pace.add(record, time.monotonic())
        text = status_line(record, self._pace, self._total - step)
        self._progress.update(self._task, completed=step, status=text)
        if not self._console.is_terminal and (step % self._log_every == 0 or step == self._total):
            self.message(f"step {step}/{self._total}  {text}")

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Shows a held-out loss, and a line for each kind of questions; they stay in the terminal, above the live
        line."""
        for words in evaluation_lines(record):
            self.message(f"step {record['step']}/{self._total}  {words}")

    def evaluation_progress(self, words: str) -> None:
        """Shows in a terminal how far an evaluation is."""
        self._progress.update(self._task, status=words)

    def samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Shows the first reply of a step, on one line."""
        reply, most = " ".join(records[0]["reply"].split()), _SAMPLE_CHARACTERS
        told = reply if len(reply) <= most else f"{reply[:most]} ..."
        self.message(f"step {records[0]['step']}/{self._total}  sample: {told}")

    def message(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()
