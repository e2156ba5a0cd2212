"""The display of a run: a banner, then a live line in a terminal, or plain lines in a file or pipe."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from qlora_jax.config import QUESTION_KINDS
from qlora_jax.config.sizes import format_bytes, format_duration
from qlora_jax.training.loss_scale import LOSS_SCALE, SKIPPED
from qlora_jax.training.metrics.metrics_file import Record
from qlora_jax.training.metrics.record_summaries import (
    ACCURACY,
    DEAD,
    EVAL,
    HIGH,
    LOW,
    MARGIN,
    MAX_LOAD,
    PREFERENCE_LABELS,
    REWARD,
    loss_interval,
    task_metrics,
)

_WINDOW = 20  # steps over which speed and remaining time are averaged
_SAMPLE_CHARACTERS = 160
_SHORTEST_BAR = 2  # columns of the live line


def print_banner(title: str, rows: Mapping[str, str], console: Console) -> None:
    """Prints the title and an aligned `name  value` line per row; long values wrap only in a terminal."""
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


class Throughput:
    """Averages tokens per second, MFU and seconds per step over the last steps.

    The first step of each length compiles and is not counted, so all are None before the second step of a length.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, Record]] = deque(maxlen=_WINDOW)  # wall clock, record
        self._lengths: set[int] = set()
        self._last = 0.0

    def add(self, record: Record, now: float) -> None:
        """Adds a step that ended at `now`; the time since the previous step counts for the remaining time."""
        if record["length"] in self._lengths:
            self._steps.append((now - self._last, record))
        self._lengths.add(record["length"])
        self._last = now

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens without padding, per second spent in steps."""
        return self._in_steps(lambda record: record["tokens"])

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilization; None also if the device's peak is not known."""
        if not all("mfu" in record for _, record in self._steps):
            return None
        return self._in_steps(lambda record: record["mfu"] * record["seconds"])

    @property
    def seconds_per_step(self) -> float | None:
        """Wall-clock seconds, including evaluations and checkpoints between steps."""
        return sum(wall for wall, _ in self._steps) / len(self._steps) if self._steps else None

    def _in_steps(self, done: Callable[[Record], float]) -> float | None:
        seconds = sum(record["seconds"] for _, record in self._steps)
        return sum(done(record) for _, record in self._steps) / seconds if seconds else None


def status_fields(record: Record, pace: Throughput, steps_left: int) -> list[str]:
    """Formats a step: `loss 2.345`, `812 tok/s`, `MFU 41.0%`, `1:23 left`, `lr 2.0e-04`, `grad 0.31`, then memory.

    The most important numbers come first, because a narrow terminal shows only the first fields.
    """
    speed, step_time, mfu = pace.tokens_per_second, pace.seconds_per_step, pace.mfu
    parts = [
        f"loss {record['loss']:.3f}",
        _reward_text(record),
        "" if speed is None else _speed_text(speed, record.get("devices", 1)),
        "" if mfu is None else f"MFU {mfu:.1%}",
        "" if step_time is None else f"{format_duration(steps_left * step_time)} left",
        f"lr {record['learning_rate']:.1e}",
        _gradient_text(record),
        _router_text(record),
        _paging_text(record),
        *_memory_texts(record),
    ]
    return [*filter(None, parts)]


def _gradient_text(record: Record) -> str:
    """Formats the norm of a step's gradients; of a step that changed nothing why."""
    if SKIPPED in record:
        return f"skipped: gradients overflow float16, loss scale {record[LOSS_SCALE]:g} is halved"
    return f"grad {record['grad_norm']:.2f}"


def _reward_text(record: Record) -> str:
    """Formats rewards: `right 81.2%, margin 0.413` of pairs, `reward 0.250, 12% cut` of replies; empty without them."""
    if REWARD in record:
        return f"reward {record[REWARD]:.3f}" + (f", {cut:.0%} cut" if (cut := record["replies_cut"]) else "")
    right = f"right {record[ACCURACY]:.1%}" if ACCURACY in record else ""
    margin = f"margin {record[MARGIN]:.3f}" if MARGIN in record else ""
    return ", ".join(filter(None, (right, margin)))


def _speed_text(tokens_per_second: float, devices: int) -> str:
    share = "" if devices == 1 else f" ({tokens_per_second / devices:.0f} per device)"
    return f"{tokens_per_second:.0f} tok/s{share}"


def _router_text(record: Record) -> str:
    """Formats the least balanced layer of a mixture: `router max load 2.1x, 3 dead experts`; empty without experts."""
    if MAX_LOAD not in record:
        return ""
    dead, plural = f"{record[DEAD]:.0f}", "" if record[DEAD] == 1 else "s"
    return f"router max load {record[MAX_LOAD]:.1f}x" + (f", {dead} dead expert{plural}" if record[DEAD] else "")


def _paging_text(record: Record) -> str:
    """Formats paging: `state 1.50 GiB resident, 96.00 MiB in, 96.00 MiB out`; empty without paging."""
    if "resident_bytes" not in record:
        return ""
    resident, paged_in, paged_out = (
        format_bytes(record[key]) for key in ("resident_bytes", "paged_in_bytes", "paged_out_bytes")
    )
    return f"state {resident} resident, {paged_in} in, {paged_out} out"


def _memory_texts(record: Record) -> list[str]:
    """Formats memory in use: `device 10.20 GiB`, `host 1.50 GiB`, as far as it is known."""
    places = ("device", "host")
    return [f"{place} {format_bytes(record[key])}" for place in places if (key := f"{place}_bytes") in record]


def evaluation_lines(record: Record) -> list[str]:
    """Formats an evaluation: `held-out loss 1.250 [1.201, 1.304], perplexity 3.490`, then preferences and tasks."""
    lines = []
    if "eval_loss" in record:
        interval = " [{:.3f}, {:.3f}]".format(*ends) if (ends := loss_interval(record)) else ""
        perplexity = f", perplexity {record['eval_perplexity']:.3f}" if "eval_perplexity" in record else ""
        lines.append(f"held-out loss {record['eval_loss']:.3f}{interval}{perplexity}")
    if (key := f"{EVAL}{REWARD}") in record:
        lines = ["held-out reward {:.3f} [{:.3f}, {:.3f}]".format(*(record[key + end] for end in ("", LOW, HIGH)))]
    lines += _preference_lines(record)
    for task in QUESTION_KINDS:
        metrics = [
            f"{metric.label} {metric.value:.1%} [{100 * metric.low:.1f}, {100 * metric.high:.1f}]"
            for metric in task_metrics(record, task)
        ]
        lines += [f"{task}: {', '.join(metrics)}"] if metrics else []
    return lines


def _preference_lines(record: Record) -> list[str]:
    """Formats held-out preferences: `right by reward 81.2% [74.3, 86.5], reward margin 0.413 [0.330, 0.498]` and so on.

    The labels are in pairs; each pair has a line.
    """
    pairs = itertools.batched(PREFERENCE_LABELS, 2)
    known = [[_preference_text(record, name) for name in two if f"{EVAL}{name}" in record] for two in pairs]
    return [", ".join(texts) for texts in known if texts]


def _preference_text(record: Record, name: str) -> str:
    value, low, high = (record[f"{EVAL}{name}{end}"] for end in ("", LOW, HIGH))
    if name == ACCURACY:
        return f"{PREFERENCE_LABELS[name]} {value:.1%} [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{PREFERENCE_LABELS[name]} {value:.3f} [{low:.3f}, {high:.3f}]"


def _fit(fields: Sequence[str], width: int) -> str:
    """Joins as many fields as fit into `width` columns, from the first; always the first."""
    lines = [*itertools.accumulate(fields, "{}  {}".format)]
    return next((line for line in reversed(lines) if cell_len(line) <= width), lines[0])


class Display:
    """Shows the steps and evaluations of a run; a context manager, which restores the terminal.

    Records are those of metrics.jsonl. A step has `step`, `loss`, `learning_rate`, `grad_norm`, `tokens`, `length` and
    `seconds`; `mfu`, `host_bytes` and `device_bytes` if they are known; `devices` if there are several; with paging
    `resident_bytes`, `paged_in_bytes`, `paged_out_bytes` and `paging_problems`. An evaluation has `step`; with held-out
    rows `eval_loss`, its interval and `eval_perplexity`; and the metrics of questions (step_metrics.py).
    """

    def __init__(self, total_steps: int, first_step: int, log_every: int, console: Console):
        """Starts after `first_step` steps; without a terminal, prints every `log_every`-th step and the last."""
        self._total, self._log_every, self._console = total_steps, log_every, console
        self._pace = Throughput()
        self._shown_problems: set[str] = set()
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

    def step(self, record: Record) -> None:
        """Shows one optimizer step."""
        step = record["step"]
        for problem in set(record.get("paging_problems", ())) - self._shown_problems:
            self._shown_problems.add(problem)  # once, because it will recur at every step
            self.message(f"step {step}: {problem}")
        self._pace.add(record, time.monotonic())
        fields = status_fields(record, self._pace, self._total - step)
        room = self._console.width - len(f"step {self._total}/{self._total}") - len("  ") - _SHORTEST_BAR
        self._progress.update(self._task, completed=step, status=_fit(fields, room))
        if not self._console.is_terminal and (step % self._log_every == 0 or step == self._total):
            self.message("  ".join([f"step {step}/{self._total}", *fields]))

    def evaluation(self, record: Record) -> None:
        """Shows the held-out loss and a line per question task, above the live line of a terminal."""
        for line in evaluation_lines(record):
            self.message(f"step {record['step']}/{self._total}  {line}")

    def evaluation_progress(self, text: str) -> None:
        """Shows the progress of an evaluation; only in a terminal."""
        self._progress.update(self._task, status=text)

    def samples(self, records: Sequence[Record]) -> None:
        """Shows the first sample reply of a step on one line."""
        reply, limit = " ".join(records[0]["reply"].split()), _SAMPLE_CHARACTERS
        shown = reply if len(reply) <= limit else f"{reply[:limit]} ..."
        self.message(f"step {records[0]['step']}/{self._total}  sample: {shown}")

    def message(self, text: str) -> None:
        """Prints a line that stays in a terminal."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()
