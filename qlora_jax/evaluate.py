"""`python -m qlora_jax.evaluate`: a base unquantized and quantized, and one or two runs' checkpoints, side by side."""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from qlora_jax import allocator
from qlora_jax.config import Command, run_main
from qlora_jax.evaluation.settings import EvaluateArgs, check_evaluate

if TYPE_CHECKING:
    from qlora_jax.data.tokenizer.tokenizer import Tokenizer
    from qlora_jax.evaluation.tasks.task import Task
    from qlora_jax.inference.result_cache import Kept
    from qlora_jax.io.pretrained import OpenedModel
    from qlora_jax.models.partition import ModelParts

PLAIN: dict[str, Any] = {"style": "dim", "markup": False, "highlight": False}  # messages
COMMAND = Command(
    name="evaluate",
    summary="Scores a model unquantized, quantized and finetuned, side by side.",
    example="--run runs/mine --rows heldout.jsonl",
    schema=EvaluateArgs,
    check=check_evaluate,
    flags={"raw": "no chat template: questions and rows are plain text"},
)


class Column(NamedTuple):
    """A model to score.

    Fields:
      opened: its base, and the run that it belongs to.
      tasks: made for it: with its tokenizer, and as long as it reads.
      quant_type: of the base.
      label: what people are told that it is.
      adapted: the run's adapter is on it.
    """

    opened: "OpenedModel"
    tasks: "Sequence[Task]"
    quant_type: str
    label: str
    adapted: bool


def main(argv: list[str]) -> None:
    """Settings, tasks, models one after the other, tables; raises ValueError or OSError for bad input."""
    args, flags = COMMAND.read(argv)
    # After the settings: jax starts when these are imported, and a typing error should not wait for it.
    from qlora_jax import runtime
    from qlora_jax.evaluation.lm_eval.preflight import check_ready
    from qlora_jax.evaluation.tables import Scored, as_data, show
    from qlora_jax.inference.result_cache import kept_for
    from qlora_jax.io.pretrained import open_pretrained

    runtime.start()
    opened = open_pretrained(model=args.model, run=args.run, step=args.step, chat_template=args.chat_template)
    tasks = _tasks(args, opened, raw="raw" in flags)
    columns = _columns(args, opened, tasks)
    if args.against is not None:
        columns["against"] = _against(args, opened, tasks, raw="raw" in flags)
    columns = {name: column for name, column in columns.items() if args.columns is None or name in args.columns}
    labels = {name: column.label for name, column in columns.items()}
    messages = Console(stderr=True)
    if args.harness is not None:
        check_ready(args.harness, args.harness_folder, lambda text: messages.print(text, **PLAIN))
    scores: dict[str, dict[str, Any]] = {task.name: {} for task in tasks}
    for name, parts in _models(args, columns, messages):
        kept = kept_for(args.keep, parts)  # hashes the model: once for all tasks
        for task in columns[name].tasks:
            scores[task.name][name] = _score(task, parts, kept, labels[name], messages)
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


def _tokenizer(opened: "OpenedModel", *, raw: bool) -> "Tokenizer":
    return dataclasses.replace(opened.tokenizer, chat_template=None) if raw else opened.tokenizer


def _tasks(args: EvaluateArgs, opened: "OpenedModel", *, raw: bool) -> list["Task"]:
    from qlora_jax.evaluation.lm_eval.task import HarnessTask
    from qlora_jax.evaluation.tasks import text
    from qlora_jax.evaluation.tasks.registry import question_tasks

    tokenizer = _tokenizer(opened, raw=raw)
    limit = opened.features.max_positions
    limits = {"max_rows": args.max_rows, "max_positions": limit, "named": args.file_columns}
    tasks: list[Task] = []
    if args.text is not None:
        sizes = {"window": args.window, "stride": args.stride, "max_tokens": args.max_tokens, "max_positions": limit}
        tasks.append(text.text_task(args.text, tokenizer, **sizes))
    stops = opened.source.tokenizer["stop_token_ids"]
    tasks += question_tasks(args, tokenizer, named_stop_ids=stops, max_positions=limit)
    if args.rows is not None:
        tasks.append(text.rows_task(args.rows, tokenizer, answer_start=args.answer_start, **limits))
    if args.harness is not None:
        which = {"tasks": args.harness, "folder": args.harness_folder, "limit": args.max_rows}
        tasks.append(HarnessTask(tokenizer=tokenizer, max_positions=limit, **which))
    return tasks


def _columns(args: EvaluateArgs, opened: "OpenedModel", tasks: "Sequence[Task]") -> dict[str, Column]:
    """The base's columns and the run's, in the order to show them."""
    quant_type = _quant_type(args, opened)
    columns = {"unquantized": Column(opened, tasks, "none", "unquantized", False)}
    if quant_type != "none":
        columns["quantized"] = Column(opened, tasks, quant_type, quant_type, False)
    if opened.run is not None:
        columns["checkpoint"] = Column(opened, tasks, quant_type, _run_label(args, opened, quant_type), True)
    missing = set(args.columns or []) - {*columns, "against"}
    if missing:
        raise ValueError(f"columns: {', '.join(sorted(missing))} not there: the base is not quantized")
    return columns


def _against(args: EvaluateArgs, opened: "OpenedModel", tasks: "Sequence[Task]", *, raw: bool) -> Column:
    """The other run's column; ValueError where it is not asked the same as the run."""
    from qlora_jax.evaluation.comparable import check_same
    from qlora_jax.io.pretrained import open_pretrained

    other = open_pretrained(
        model=args.model, run=args.against, step=args.against_step, chat_template=args.chat_template
    )
    others = _tasks(args, other, raw=raw)
    names = (f"run {args.run}", f"against {args.against}")
    check_same(tasks, others, names, (_tokenizer(opened, raw=raw), _tokenizer(other, raw=raw)))
    quant_type = _quant_type(args, other)
    on_another = "" if _of_one_base(opened, other) else f", on {Path(other.source.path).name}"
    return Column(other, others, quant_type, _run_label(args, other, quant_type) + on_another, True)


def _of_one_base(opened: "OpenedModel", other: "OpenedModel") -> bool:
    """Runs know the base that they were trained on; of adapters from elsewhere, where it lies tells."""
    assert opened.run is not None and other.run is not None
    known = opened.run.fingerprint is not None and opened.run.fingerprint == other.run.fingerprint
    return known or opened.source.path == other.source.path


def _quant_type(args: EvaluateArgs, opened: "OpenedModel") -> str:
    return opened.args.quant_type if args.quant_type == "auto" else args.quant_type


def _run_label(args: EvaluateArgs, opened: "OpenedModel", quant_type: str) -> str:
    run, trained = opened.run, opened.args.quant_type
    assert run is not None
    like_named = args.against is not None and Path(str(args.run)).name == Path(args.against).name
    name = str(run.path.parent / run.label) if like_named else run.label
    return name if quant_type == trained else f"{name}, on {quant_type} (trained on {trained})"


def _models(args: EvaluateArgs, columns: Mapping[str, Column], console: Console) -> Iterator[tuple[str, "ModelParts"]]:
    """Each column's model, one at a time; columns of one run and one quant_type share their base."""
    from qlora_jax.io.pretrained import apply_adapter, load_base, parts_before_training, weight_settings
    from qlora_jax.io.progress import loading

    of_one_base = itertools.groupby(columns, key=lambda name: (id(columns[name].opened), columns[name].quant_type))
    for names in ([*group] for _, group in of_one_base):
        opened, _, quant_type, *_ = columns[names[0]]
        with loading(console) as progress:
            model = load_base(opened, weight_settings(opened, quant_type, args.compute_dtype), progress)
        for name in names:
            run = opened.run
            yield (
                name,
                apply_adapter(model, run) if columns[name].adapted and run else parts_before_training(model, run),
            )
        del model  # before the next one is loaded


def _score(task: "Task", parts: "ModelParts", kept: "Kept", label: str, console: Console) -> Any:
    from rich.progress import Progress

    started, found, made = time.perf_counter(), kept.found, kept.made
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task(f"{label}: {task.name}", total=task.size)
        scores = task.score(parts, lambda done: bar.update(line, completed=done), kept)
    seconds = time.perf_counter() - started
    found, made = kept.found - found, kept.made - made  # neither counts where nothing is kept
    before = f", {found} of {found + made} batches before" if found + made else ""
    console.print(f"{label}: {task.name} scored in {seconds:.0f} s{before}", **PLAIN)
    return scores


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
