"""Measures how much of the gain of training survives in 4-bit files, with and without `lora.merge_into`.

    python -m scripts.study_merging --model FILE.gguf --output DIR [--until HH:MM]

The base is the file's dequantized weights in 16 bits. Each run is 12 steps of 4 rows, at most 128 tokens each, with
seeds 0 to 2 and two tasks: the title of a passage, and the right one of four answers. Losses are of the answers in 48
held-out rows, in bfloat16. For a file of a format:

    survival = (loss of the rounded base - loss of the file) / (loss of the base - loss of QLoRA, unrounded)

The loss of the rounded base is that of the base in the same format. Where rounding makes the base much worse, training
through the format repairs that, too, and the share may exceed 1. So the net survival has the loss of the base in 16
bits in the numerator: it says how much of the gain a file keeps over the model that one started from. The denominator
is the gain of plain training with the same task and seed, for all arms, so that they compare. Means have Student's 95 %
intervals over tasks and seeds.

The loss of a file is that of its codes, computed as the export computes them. The first run of each format with
`lora.merge_into` is also exported, and its file is read back and scored: its loss must be the same. Plain runs are
rounded with all columns alike, so llama.cpp's importance is not in these numbers.
Runs are in the order of PLAN, so that a study that is stopped has compared most arms; finished ones are not repeated.
"""

import argparse
import contextlib
import datetime
import functools
import gzip
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qlora_jax import runtime
from qlora_jax.api.export import write_export
from qlora_jax.atomic_files import write_text
from qlora_jax.config import LoraArgs, ModelArgs
from qlora_jax.config.exports import ExportOptions
from qlora_jax.evaluation.tasks.rows import RowsTask, rows_task
from qlora_jax.inference.result_cache import NO_CACHE
from qlora_jax.io.export.gguf_metadata import with_merge_types
from qlora_jax.io.pretrained import apply_adapter, load_base, open_base, open_finetuned
from qlora_jax.measures.statistics import t_quantile
from qlora_jax.methods.merge_into import multiply_by_codes, replace_by_codes
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import ModelParts, combine, partition
from qlora_jax.train import main as train
from qlora_jax.training.metrics.metrics_file import read_metrics
from qlora_jax.untrusted_json import JsonObject

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ("q4_0", "q4_k_m", "nf4")
TASKS, SEEDS = ("titles", "answers"), (0, 1, 2)
STEPS, ROWS, TOKENS, HELD_OUT = 12, 4, 128, 48
FIXED = {
    "data.max_length": TOKENS,
    "train.steps": STEPS,
    "train.micro_batch_size": ROWS,
    "train.accumulation": 1,
    "lora.rank": 16,
    "lora.alpha": 32.0,
    "optim.schedule": "linear",
    "optim.warmup_ratio": 0.1,
    "optim.max_grad_norm": 1.0,
}
RATE: Mapping[str, object] = {"optim.learning_rate": 2e-3}  # the best of earlier studies (docs/study.md)
ON_16_BITS = {"model.quant_type": "none", **RATE}
QLORA, FULL = "QLoRA", "full finetuning"
AWARE = {name: f"merge_into {name}" for name in FORMATS}
LATE = {name: f"merge_into {name} from 0.7" for name in FORMATS}
SLOWER = {name: f"merge_into {name}, rate 1e-3" for name in FORMATS}
ARMS: Mapping[str, Mapping[str, object]] = {
    QLORA: {"model.quant_type": "nf4", **RATE},
    **{arm: {**ON_16_BITS, "lora.merge_into": name} for name, arm in AWARE.items()},
    **{arm: {**ON_16_BITS, "lora.merge_into": name, "lora.merge_from": 0.7} for name, arm in LATE.items()},
    **{arm: {**ON_16_BITS, "lora.merge_into": name, "optim.learning_rate": 1e-3} for name, arm in SLOWER.items()},
    "LoRA on 16 bits": ON_16_BITS,
    FULL: {"model.quant_type": "none", "lora.method": "full", "optim.learning_rate": 2e-4},
}
PLAN: Sequence[tuple[Sequence[str], int]] = (
    *(([QLORA, *AWARE.values()], seed) for seed in (0, 1)),
    ([QLORA, AWARE["q4_0"]], 2),
    *(([LATE["q4_0"], FULL], seed) for seed in SEEDS),
    (list(AWARE.values()), 2),
    *(([*LATE.values(), *SLOWER.values(), "LoRA on 16 bits"], seed) for seed in SEEDS),
)


def main() -> None:
    """Runs the study, or continues it, and prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct, a GGUF file")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--until", help="HH:MM, after which no further run starts")
    args = parser.parse_args()
    runtime.start()
    study = Study(args.model, args.output)
    for arms, seed in PLAN:
        for task, arm in itertools.product(TASKS, arms):
            if args.until is None or f"{datetime.datetime.now():%H:%M}" < args.until:
                study.perform(arm, task, seed)
    print(study.tables())


def write_rows(folder: Path) -> None:
    """Writes train.jsonl and heldout.jsonl of each task: the rows that fit into TOKENS with few exceptions."""
    chat = [row["messages"] for row in _lines("titles/train.jsonl.gz")]
    asked = [
        [
            {"role": "user", "content": f"{row['question']}\n{row['options']}"},
            {"role": "assistant", "content": row["answer"]},
        ]
        for row in _lines("multiple_choice/openbookqa_500.jsonl.gz")
    ]
    for task, rows in {"titles": chat, "answers": asked}.items():
        short = [{"messages": row} for row in rows if len(row[0]["content"]) < 320]
        (folder / task).mkdir(parents=True, exist_ok=True)
        for name, part in {"heldout": short[:HELD_OUT], "train": short[HELD_OUT:]}.items():
            write_text(folder / task / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))


def _lines(name: str) -> list[JsonObject]:
    with gzip.open(ROOT / "examples" / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class Study:
    """The runs of the study in a folder, and the losses that were measured: results.json.

    Args:
      model: the base, a GGUF file.
    """

    def __init__(self, model: str, output: Path):
        output.mkdir(parents=True, exist_ok=True)
        self._model, self._output, self._results = model, output, output / "results.json"
        self._found: dict[str, float] = json.loads(self._results.read_text()) if self._results.exists() else {}
        if not (output / "rows").exists():
            write_rows(output / "rows")
        base, self._bases = open_base(ModelArgs(path=model)), dict[str, ModelParts]()
        self._tasks: dict[str, RowsTask] = {
            task: rows_task(
                str(output / "rows" / task / "heldout.jsonl"), base.tokenizer, max_rows=None, max_positions=TOKENS * 4
            )
            for task in TASKS
        }
        mixture = LoraArgs(merge_into="q4_k_m")
        types = output / "merge_types.json"
        if not types.exists():
            write_text(types, json.dumps(with_merge_types(mixture, base.source, base.features).merge_types))
        self._types: dict[str, str] = json.loads(types.read_text())

    def perform(self, arm: str, task: str, seed: int) -> None:
        """Trains a run if it is not finished, and measures what is missing."""
        for quant_type in ("none", "nf4"):
            self._measure(f"{task}/base/{quant_type}", task, functools.partial(self._base_parts, quant_type))
        for name in FORMATS:
            self._measure(f"{task}/base/file {name}", task, functools.partial(self._rounded, None, "none", name))
        run = self._output / "runs" / f"{task}-{seed}-{arm.replace(' ', '_').replace(',', '')}"
        place = f"{task}/{seed}/{arm}"
        if not (run / "trained").exists():
            self._train(run, arm, task, seed, place)
        if (merge_into := ARMS[arm].get("lora.merge_into")) is not None:
            self._measure(f"{place}/{merge_into}", task, functools.partial(self._of_training, run))
            if seed == 0 and task == TASKS[0]:
                exported = functools.partial(self._exported, run, str(merge_into))
                self._measure(f"{place}/{merge_into} file", task, exported)
                assert self._found[f"{place}/{merge_into} file"] == self._found[f"{place}/{merge_into}"]
            return
        kind = str(ARMS[arm]["model.quant_type"])
        self._measure(f"{place}/unrounded", task, lambda: partition(self._trained(run, kind)))
        for name in FORMATS:
            self._measure(f"{place}/{name}", task, functools.partial(self._rounded, run, kind, name))
            if arm == QLORA:
                into = functools.partial(self._rounded, run, "none", name)
                self._measure(f"{place} into 16 bits/{name}", task, into)

    def _train(self, run: Path, arm: str, task: str, seed: int, place: str) -> None:
        shutil.rmtree(run, ignore_errors=True)
        types = {"lora.merge_types": self._types} if ARMS[arm].get("lora.merge_into") == "q4_k_m" else {}
        rows = self._output / "rows" / task / "train.jsonl"
        settings = {**FIXED, **ARMS[arm], **types, "data.train": rows, "train.seed": seed, "output": run}
        words = [
            word
            for key, value in {"model": self._model, **settings}.items()
            for word in (f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value))
        ]
        start = time.process_time()
        with open(self._output / "log.txt", "a") as log, contextlib.redirect_stdout(log):
            train(words)
        steps = [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
        later = [record["seconds"] for record in steps[1:]]
        plan = json.loads((run / "report.json").read_text())["memory_plan"]
        self._record(f"{place}/processor seconds", time.process_time() - start)
        self._record(f"{place}/seconds per step", float(np.median(later)))
        self._record(f"{place}/peak bytes", plan["peak_bytes"])
        write_text(run / "trained", "")

    def _measure(self, key: str, task: str, parts: Callable[[], ModelParts]) -> None:
        if key not in self._found:
            self._record(key, self._tasks[task].score(parts(), lambda _: None, NO_CACHE).mean_nll)

    def _record(self, key: str, value: float) -> None:
        self._found[key] = value
        write_text(self._results, json.dumps(self._found, indent=1) + "\n")
        print(f"{datetime.datetime.now():%H:%M:%S} {key}: {value:.5g}", flush=True)

    def _base_parts(self, quant_type: str) -> ModelParts:
        """Returns the base in a format, which is loaded once."""
        if quant_type not in self._bases:
            self._bases[quant_type] = _loaded(self._model, quant_type)
        return self._bases[quant_type]

    def _trained(self, run: Path | None, quant_type: str) -> CausalLM:
        """Returns the base in a format, with what a run has trained if there is one."""
        if run is None:
            return combine(self._base_parts(quant_type))
        opened = open_finetuned(run)
        assert opened.run is not None
        if opened.run.lora_args.method != "full":
            return combine(apply_adapter(combine(self._base_parts(quant_type)), opened.run))
        whole = run / "whole"
        if not whole.exists():
            write_export(opened, whole, "gguf", ExportOptions(dtype="float32"))
        return combine(_loaded(whole / "model-float32.gguf", "none"))

    def _rounded(self, run: Path | None, quant_type: str, name: str) -> ModelParts:
        """Returns the model in codes of a format."""
        model = self._trained(run, quant_type)
        lora = LoraArgs(merge_into=name, merge_types=self._types if name == "q4_k_m" else {})  # pyright: ignore
        multiply_by_codes(model, lora)
        replace_by_codes(model)
        return partition(model)

    def _of_training(self, run: Path) -> ModelParts:
        """Returns the model in the codes of a run with `lora.merge_into`."""
        model = self._trained(run, "none")
        replace_by_codes(model)
        return partition(model)

    def _exported(self, run: Path, merge_into: str) -> ModelParts:
        """Returns the file that `qlora-jax export` writes, which checks its codes."""
        form = "hf" if merge_into == "nf4" else "gguf"
        folder = self._output / "written"
        shutil.rmtree(folder, ignore_errors=True)
        result = write_export(open_finetuned(run), folder, form, ExportOptions())
        assert "are those that training computed with" in str(result)
        path = folder if form == "hf" else folder / f"model-{merge_into}.gguf"
        return _loaded(path, "stored")

    def tables(self) -> str:
        """Returns the tables of survivals and of costs, in Markdown."""
        lines = [
            "| format | arm | runs | survival | net survival | titles: loss above QLoRA's | answers |",
            "|---|---|---|---|---|---|---|",
        ]
        arms = [*ARMS, "QLoRA into 16 bits"]
        for name in FORMATS:
            lines += [line for arm in arms if (line := self._line(arm, name)) is not None]
        lines += ["", "| arm | n | processor seconds | seconds per step | planned MiB |", "|---|---|---|---|---|"]
        for arm in ARMS:
            found = {
                what: self._all(f"{arm}/{what}") for what in ("processor seconds", "seconds per step", "peak bytes")
            }
            times, steps, peaks = ([*each.values()] for each in found.values())
            if times:
                peak = np.median(peaks) / 2**20
                lines += [f"| {arm} | {len(times)} | {np.median(times):.0f} | {np.median(steps):.2f} | {peak:.0f} |"]
        return "\n".join(lines)

    def _all(self, end: str) -> dict[tuple[str, int], float]:
        keys = {(task, seed): f"{task}/{seed}/{end}" for task in TASKS for seed in SEEDS}
        return {place: self._found[key] for place, key in keys.items() if key in self._found}

    def _line(self, arm: str, name: str) -> str | None:
        losses, plain = self._all(f"{arm}/{name}"), self._all(f"{QLORA}/unrounded")
        if not losses:
            return None
        shares = []
        for start in (f"file {name}", "none"):
            base = {task: self._found[f"{task}/base/{start}"] for task in TASKS}
            whole = {task: self._found[f"{task}/base/none"] for task in TASKS}
            shares += [[(base[at[0]] - loss) / (whole[at[0]] - plain[at]) for at, loss in losses.items()]]
        costs = {task: [loss - plain[at] for at, loss in losses.items() if at[0] == task] for task in TASKS}
        above = [f"{np.mean(each):+.3f}" if each else "" for each in costs.values()]
        return f"| {name} | {arm} | {len(losses)} | {' | '.join([*map(_interval, shares), *above])} |"


def _interval(values: Sequence[float]) -> str:
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.2f}"
    half = t_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"


def _loaded(path: str | Path, quant_type: str) -> ModelParts:
    args = ModelArgs(path=str(path), quant_type=quant_type)  # pyright: ignore
    return partition(load_base(open_base(args), args))


if __name__ == "__main__":
    main()
