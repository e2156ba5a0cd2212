"""`python -m qlora_jax.evaluate`: a base unquantized and quantized, and a run's checkpoint, scored side by side."""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlora_jax import allocator
from qlora_jax.config import read_command_line, run_main
from qlora_jax.inference.settings import EvaluateArgs, check_evaluate

if TYPE_CHECKING:
    from qlora_jax.inference.decode import Parts
    from qlora_jax.inference.tasks import Task
    from qlora_jax.io.opened import Opened

PROG = "python -m qlora_jax.evaluate"
SWITCHES = {"raw": "no chat template: questions and rows are plain text"}


def main(argv: list[str]) -> None:
    """Settings, tasks, models one after the other, tables; raises ValueError or OSError for bad input."""
    args, given = read_command_line(argv, PROG, SWITCHES, EvaluateArgs, check_evaluate)
    # After the settings: jax starts when these are imported, and a typing error should not wait for it.
    from qlora_jax import runtime
    from qlora_jax.inference.tables import Scored, as_data, show
    from qlora_jax.io.opened import open_base_or_run

    runtime.start()
    opened = open_base_or_run(args.model, args.run, step=args.step, chat_template=args.chat_template)
    tasks = _tasks(args, opened, raw="raw" in given)
    columns = _columns(args, opened)
    labels = {name: label for name, (_, label) in columns.items()}
    messages = Console(stderr=True)
    scores: dict[str, dict[str, Any]] = {task.name: {} for task in tasks}
    for column, parts in _models(args, opened, columns, messages):
        for task in tasks:
            scores[task.name][column] = _score(task, parts, labels[column], messages)
        del parts  # before the next one is loaded
    scored = [Scored(task, scores[task.name]) for task in tasks]
    console = Console() if sys.stdout.isatty() else Console(width=120)
    for one in scored:
        show(one, labels, console)
    if args.json is not None:
        data = {
            "settings": dataclasses.asdict(args),
            "labels": labels,
            "tasks": {s.task.name: as_data(s) for s in scored},
        }
        Path(args.json).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _tasks(args: EvaluateArgs, opened: "Opened", *, raw: bool) -> list["Task"]:
    from qlora_jax.inference import letter_files, task_files
    from qlora_jax.inference.harness_task import HarnessTask

    tokenizer = dataclasses.replace(opened.tokenizer, chat_template=None) if raw else opened.tokenizer
    limit = opened.features.max_positions
    tasks: list[Task] = []
    if args.text is not None:
        sizes = {"window": args.window, "stride": args.stride, "max_tokens": args.max_tokens, "max_positions": limit}
        tasks.append(task_files.text_task(args.text, tokenizer, **sizes))
    if args.choices is not None:
        tasks.append(task_files.choice_task(args.choices, tokenizer, max_rows=args.max_rows, max_positions=limit))
    if args.letters is not None:
        exemplars = {"shots": args.shots, "num_shots": args.num_shots}
        limits = {"max_rows": args.max_rows, "max_positions": limit}
        tasks.append(letter_files.letters_task(args.letters, tokenizer, **exemplars, **limits))
    if args.rows is not None:
        tasks.append(
            task_files.rows_task(
                args.rows, tokenizer, max_rows=args.max_rows, max_positions=limit, answer_start=args.answer_start
            )
        )
    if args.harness is not None:
        which = {"tasks": args.harness, "folder": args.harness_folder, "limit": args.max_rows}
        tasks.append(HarnessTask(tokenizer=tokenizer, **which))
    return tasks


def _columns(args: EvaluateArgs, opened: "Opened") -> dict[str, tuple[str, str]]:
    """Column -> (the base's quant_type, what people are told), in the order to show them."""
    trained, asked = opened.args.quant_type, args.quant_type
    quant_type = trained if asked == "auto" else asked
    columns = {"unquantized": ("none", "unquantized")}
    if quant_type != "none":
        columns["quantized"] = (quant_type, quant_type)
    if opened.run is not None:
        on_another = "" if quant_type == trained else f", on {quant_type} (trained on {trained})"
        columns["checkpoint"] = (quant_type, f"{opened.run.label}{on_another}")
    missing = set(args.columns or []) - columns.keys()
    if missing:
        raise ValueError(f"columns: {', '.join(sorted(missing))} not there: the base is not quantized")
    return {name: column for name, column in columns.items() if args.columns is None or name in args.columns}


def _models(
    args: EvaluateArgs, opened: "Opened", columns: Mapping[str, tuple[str, str]], console: Console
) -> Iterator[tuple[str, "Parts"]]:
    """Each column's model, one at a time; columns of one quant_type share their base."""
    from qlora_jax.io.opened import adapted, held_as, load_base, unadapted
    from qlora_jax.io.progress import loading

    for quant_type, group in itertools.groupby(columns, key=lambda name: columns[name][0]):
        with loading(console) as progress:
            model = load_base(opened, held_as(opened, quant_type, args.compute_dtype), progress)
        for name in group:
            yield (
                name,
                adapted(model, opened.run) if name == "checkpoint" and opened.run else unadapted(model, opened.run),
            )
        del model  # before the next one is loaded


def _score(task: "Task", parts: "Parts", label: str, console: Console) -> Any:
    from rich.progress import Progress

    started = time.perf_counter()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task(f"{label}: {task.name}", total=task.size)
        scores = task.score(parts, lambda done: bar.update(line, completed=done))
    seconds = time.perf_counter() - started
    console.print(f"{label}: {task.name} scored in {seconds:.0f} s", style="dim", markup=False, highlight=False)
    return scores


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
