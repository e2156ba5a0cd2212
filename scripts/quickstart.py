"""Finetunes a small model on data in this repository, and scores it on held-out rows before and after.

python scripts/quickstart.py [--section.key value ...]
"""

import sys
import time
from pathlib import Path

from fetch_smollm2 import fetch_smollm2
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_jax import allocator, runtime
from qlora_jax.config import Config, read_arguments, run_main
from qlora_jax.config.command_line import SIGNALLED
from qlora_jax.data.readers.files import read_rows
from qlora_jax.evaluation.results import print_table, task_result
from qlora_jax.evaluation.tasks.rows import rows_task
from qlora_jax.inference.decode import generate
from qlora_jax.inference.prompts import prompter, stop_ids
from qlora_jax.inference.result_cache import NO_CACHE
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.io.pretrained import OpenedModel, apply_adapter, load_base, open_pretrained
from qlora_jax.models.partition import ModelParts, partition
from qlora_jax.training.display.banner import next_commands
from qlora_jax.training.run import train

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = ROOT / "examples/titles/heldout.jsonl"
SAMPLES = (3, 5, 8, 13)  # held-out rows whose answers are shown; chosen before looking at any
LABELS = {"quantized": "before (NF4 base)", "checkpoint": "after (with the adapter)"}


def main(argv: list[str]) -> None:
    """Fetches the model, trains, scores and shows samples.

    Raises:
      ValueError: a setting is invalid.
      OSError: the model cannot be fetched, or a file cannot be read or written.
    """
    runtime.start()
    began, console = time.perf_counter(), Console()
    console.print("[bold]1. The model:[/] SmolLM2-135M-Instruct, 94 MiB, fetched once")
    model = fetch_smollm2()
    config = _config(argv, model)
    run = Path(config.output)
    console.print(f"[bold]2. Training[/] on {config.data.train}; Ctrl-C saves a checkpoint and stops")
    trained = train(config, run, resume=False, oversized=False, console=console)
    if not trained.finished:
        sys.exit(SIGNALLED + trained.signal)
    console.print(
        f"[bold]3. Held-out rows[/] of {HELD_OUT.relative_to(ROOT)}, not used in training: scored before and after"
    )
    opened = open_pretrained(run=config.output)
    assert opened.run is not None
    base = load_base(opened, opened.args)
    parts = {"quantized": partition(base)}
    parts["checkpoint"] = apply_adapter(base, opened.run)
    _scores(opened, parts, console)
    console.print("[bold]4. Answers[/] to held-out passages")
    rows = read_rows(str(HELD_OUT))
    chosen = [rows[index].data for index in SAMPLES]
    ask = prompter(opened.tokenizer, raw=False, system=None)
    prompts = [ask.row(row) for row in chosen]
    stops = stop_ids(opened.tokenizer, opened.source.tokenizer["stop_token_ids"], chat=True)
    answers = {
        column: [
            opened.tokenizer.decode(reply.ids)
            for reply in generate(model, prompts, sampling=Sampling(), max_new_tokens=40, stop_ids=stops)
        ]
        for column, model in parts.items()
    }
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("passage", "title", "before", "after"):
        table.add_column(heading, overflow="fold")
    for index, row in enumerate(chosen):
        messages = row["messages"]
        passage = messages[0]["content"].partition("\n\n")[0]
        cells = [f"{passage[:120]} ...", messages[-1]["content"], *(answers[column][index] for column in answers)]
        table.add_row(*map(Text, cells))
    console.print(table)
    _next_steps(config, opened, time.perf_counter() - began, console)


def _config(argv: list[str], model: Path) -> Config:
    # The script scores held-out rows before and after training, so evaluation during training is off.
    defaults = [
        "--config",
        str(ROOT / "configs/smollm2_titles.yaml"),
        "--model",
        str(model),
        "--data.eval",
        "null",
    ]
    given = {word.partition("=")[0] for word in argv}
    if "--output" not in given:
        defaults += ["--output", "runs/quickstart"]
    return read_arguments([*defaults, *argv])


def _scores(opened: OpenedModel, parts: dict[str, ModelParts], console: Console) -> None:
    # The base does not know the format "Title: ...". Both get this start, so that the format does not affect scores.
    limit = opened.features.max_positions
    task = rows_task(str(HELD_OUT), opened.tokenizer, max_rows=None, max_positions=limit, answer_start="Title:")
    scores = {}
    for column, model in parts.items():
        with console.status(f"scoring {LABELS[column]}"):
            scores[column] = task.score(model, lambda done: None, NO_CACHE)
    print_table(task_result(task, scores), LABELS, console)


def _next_steps(config: Config, opened: OpenedModel, seconds: float, console: Console) -> None:
    run, commands = config.output, next_commands(config, opened.source.config, finished=True)
    lines = [
        f"Total time: {seconds / 60:.1f} minutes. Loss plot: {run}/loss.png",
        "Next steps, after `source .venv/bin/activate`:",
        f"  {commands['try it']}",
        "  qlora-jax train --config configs/smollm2_titles.yaml --model "
        f"{config.model.path} --data.train YOUR.jsonl --data.eval null --data.eval_fraction 0.1 --output runs/mine",
        f"  {commands['export']}",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
