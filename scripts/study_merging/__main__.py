"""Measures how much of the gain of training survives in 4-bit files, with and without `lora.merge_into`.

    python -m scripts.study_merging --model FILE.gguf --output DIR [--until HH:MM]

The design was written down before the first run. The base is the file's dequantized weights in 16 bits. Each run is
20 steps of 4 rows, at most 128 tokens each, with seeds 0 to 2 and two tasks: the title of a passage, and the right one
of four answers. Losses are of the answers in 64 held-out rows, in bfloat16. All losses of files are those of the written
file, read back as stored codes. For a file of a format:

    survival = (loss of the rounded base - loss of the file) / (loss of the base - loss of LoRA on 16 bits, unrounded)

The loss of the rounded base is that of the base in the same format. The denominator is that of the same task and seed,
and the same for all arms, so that their survivals compare. A second column has the arm's unrounded model in place of
LoRA on 16 bits, where it has one. Means have Student's 95 % intervals over tasks and seeds, six in all.

Files of plain runs are rounded from merged weights in f32, each block alike: llama.cpp's quantizer without importance.
Runs are in the order of STAGES, so that the main comparison is complete first; finished ones are not repeated.
"""

import argparse
import contextlib
import datetime
import gzip
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from qlora_jax import runtime
from qlora_jax.api.export import write_export
from qlora_jax.atomic_files import write_text
from qlora_jax.config import LoraArgs, ModelArgs
from qlora_jax.config.exports import ExportOptions
from qlora_jax.evaluation.tasks.rows import RowsTask, rows_task
from qlora_jax.inference.result_cache import NO_CACHE
from qlora_jax.io.export.gguf_metadata import export_spec, with_merge_types
from qlora_jax.io.export.merged_codes import TrainedCodes
from qlora_jax.io.gguf.writer import write_gguf
from qlora_jax.io.hf.model_writer import write_tokenizer
from qlora_jax.io.hf.quantized_folder import write_quantized_folder
from qlora_jax.io.pretrained import OpenedModel, apply_adapter, load_base, open_base, open_finetuned
from qlora_jax.io.tensor_map import slots_of
from qlora_jax.measures.statistics import t_quantile
from qlora_jax.methods.merge_into import train_merged
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.partition import ModelParts, partition
from qlora_jax.train import main as train
from qlora_jax.training.metrics.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ("q4_0", "q4_k_m", "nf4")
TASKS, SEEDS = ("titles", "answers"), (0, 1, 2)
STEPS, ROWS, TOKENS, HELD_OUT = 20, 4, 128, 64
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
ON_16_BITS = {"model.quant_type": "none", "optim.learning_rate": 1e-3}
ARMS: Mapping[str, Mapping[str, object]] = {
    "LoRA on 16 bits": ON_16_BITS,
    "QLoRA": {"model.quant_type": "nf4", "optim.learning_rate": 1e-3},
    **{f"merge_into {name}": ON_16_BITS | {"lora.merge_into": name} for name in FORMATS},
    **{f"merge_into {name} from 0.7": ON_16_BITS | {"lora.merge_into": name, "lora.merge_from": 0.7} for name in FORMATS},
    **{
        f"merge_into {name}, rate 2e-3": ON_16_BITS | {"lora.merge_into": name, "optim.learning_rate": 2e-3}
        for name in FORMATS
    },
    "full finetuning": {"model.quant_type": "none", "lora.method": "full", "optim.learning_rate": 2e-4},
}
# The arms of each stage, with the formats into which finished models are rounded.
STAGES: Sequence[Mapping[str, Sequence[str]]] = (
    {"LoRA on 16 bits": (), "QLoRA": FORMATS, **{f"merge_into {name}": () for name in FORMATS}},
    {f"merge_into {name} from 0.7": () for name in FORMATS},
    {"LoRA on 16 bits": FORMATS, "full finetuning": FORMATS},
    {f"merge_into {name}, rate 2e-3": () for name in FORMATS},
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
    for arms, seed, task, arm in study.plan():
        if args.until is None or datetime.datetime.now().strftime("%H:%M") < args.until:
            study.perform(arm, task, seed, arms[arm])
    print(study.tables())


def write_rows(folder: Path) -> None:
    """Writes train.jsonl and heldout.jsonl of each task: the rows that fit into TOKENS with few exceptions."""
    chat = [json.loads(line)["messages"] for line in gzip.open(ROOT / "examples/titles/train.jsonl.gz", "rt")]
    questions = gzip.open(ROOT / "examples/multiple_choice/openbookqa_500.jsonl.gz", "rt")
    asked = [
        [
            {"role": "user", "content": f"{row['question']}\n{row['options']}"},
            {"role": "assistant", "content": row["answer"]},
        ]
        for row in map(json.loads, questions)
    ]
    for task, rows in {"titles": chat, "answers": asked}.items():
        short = [{"messages": row} for row in rows if len(row[0]["content"]) < 320]
        (folder / task).mkdir(parents=True, exist_ok=True)
        for name, part in {"heldout": short[:HELD_OUT], "train": short[HELD_OUT:]}.items():
            write_text(folder / task / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))


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
        base = open_base(ModelArgs(path=model))
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

    def plan(self) -> Iterator[tuple[Mapping[str, Sequence[str]], int, str, str]]:
        """Yields (arms of the stage, seed, task, arm) in order."""
        for arms in STAGES:
            yield from ((arms, seed, task, arm) for seed in SEEDS for task in TASKS for arm in arms)

    def perform(self, arm: str, task: str, seed: int, formats: Sequence[str]) -> None:
        """Trains a run if it is not finished, and measures what is missing."""
        self._measure_base(task)
        run = self._output / "runs" / f"{task}-{seed}-{arm.replace(' ', '_').replace(',', '')}"
        place = f"{task}/{seed}/{arm}"
        if not (run / "trained").exists():
            self._train(run, arm, task, seed, place)
        merge_into = ARMS[arm].get("lora.merge_into")
        if merge_into is not None:
            self._measure(f"{place}/{merge_into}", task, lambda folder: self._exported(run, str(merge_into), folder))
            return
        self._measure(f"{place}/unrounded", task, lambda _: _trained_parts(run))
        bases = {"": None, " into 16 bits": self._model} if arm == "QLoRA" else {"": None}
        for suffix, base in bases.items():
            missing = [name for name in formats if f"{place}{suffix}/{name}" not in self._found]
            with _temporary(self._output / "whole") as whole:
                if missing:
                    write_export(open_finetuned(run), whole, "gguf", ExportOptions(dtype="float32", base=base))
                for name in missing:
                    model = whole / "model-float32.gguf"
                    self._measure(f"{place}{suffix}/{name}", task, lambda folder: self._rounded(model, name, folder))

    def _train(self, run: Path, arm: str, task: str, seed: int, place: str) -> None:
        shutil.rmtree(run, ignore_errors=True)
        types = {"lora.merge_types": self._types} if ARMS[arm].get("lora.merge_into") == "q4_k_m" else {}
        rows = self._output / "rows" / task / "train.jsonl"
        settings = FIXED | ARMS[arm] | types | {"data.train": rows, "train.seed": seed, "output": run}
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

    def _measure_base(self, task: str) -> None:
        for quant_type in ("none", "nf4"):
            self._measure(f"{task}/base/{quant_type}", task, lambda _: _base_parts(Path(self._model), quant_type))
        for name in FORMATS:
            self._measure(
                f"{task}/base/file {name}", task, lambda folder: self._rounded(Path(self._model), name, folder)
            )

    def _measure(self, key: str, task: str, parts: object) -> None:
        if key in self._found:
            return
        with _temporary(self._output / "written") as folder:
            scores = self._tasks[task].score(parts(folder), lambda _: None, NO_CACHE)  # pyright: ignore
        self._record(key, scores.mean_nll)

    def _record(self, key: str, value: float) -> None:
        self._found[key] = value
        write_text(self._results, json.dumps(self._found, indent=1) + "\n")
        print(f"{datetime.datetime.now():%H:%M:%S} {key}: {value:.5g}", flush=True)

    def _exported(self, run: Path, merge_into: str, folder: Path) -> ModelParts:
        """Returns the file that `qlora-jax export` writes, which checks its codes."""
        form = "hf" if merge_into == "nf4" else "gguf"
        result = write_export(open_finetuned(run), folder, form, ExportOptions())
        assert "are those that training computed with" in str(result)
        return _base_parts(folder if form == "hf" else folder / f"model-{merge_into}.gguf", "stored")

    def _rounded(self, model: Path, name: str, folder: Path) -> ModelParts:
        """Returns a file with the model's weights in a format."""
        args = ModelArgs(path=str(model), quant_type="none", compute_dtype="float32")
        opened = open_base(args)
        whole = load_base(opened, args)
        lora = LoraArgs(merge_into=name, merge_types=self._types if name == "q4_k_m" else {})  # pyright: ignore
        slots = slots_of(whole)
        train_merged(whole, lora)
        codes = TrainedCodes(whole, slots, lora)
        folder.mkdir()
        if name == "nf4":
            weights = WeightFormat(quant_type=name, dtype="bfloat16")
            write_quantized_folder(folder, opened.source, weights, lambda *_: None, codes.tensor)
            write_tokenizer(folder, opened.tokenizer, opened.source, opened.stop_ids)
            return _base_parts(folder, "stored")
        path = folder / f"model-{name}.gguf"
        names = [each for slot in codes.slots for each in slot.names]
        write_gguf(path, export_spec(opened).spec, names, codes.tensors(), name, codes.types)
        return _base_parts(path, "stored")

    def tables(self) -> str:
        """Returns the tables of survivals and of costs, in Markdown."""
        lines = [
            "| format | arm | n | survival | of its own gain | loss of titles | loss of answers |",
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
                lines += [
                    f"| {arm} | {len(times)} | {np.median(times):.0f} | {np.median(steps):.2f} | {peak:.0f} |"
                ]
        return "\n".join(lines)

    def _all(self, end: str) -> dict[tuple[str, int], float]:
        keys = {(task, seed): f"{task}/{seed}/{end}" for task in TASKS for seed in SEEDS}
        return {place: self._found[key] for place, key in keys.items() if key in self._found}

    def _line(self, arm: str, name: str) -> str | None:
        losses = self._all(f"{arm}/{name}")
        if not losses:
            return None
        plain, own = self._all("LoRA on 16 bits/unrounded"), self._all(f"{arm.removesuffix(' into 16 bits')}/unrounded")
        gains = {
            (task, seed): self._found[f"{task}/base/file {name}"] - loss for (task, seed), loss in losses.items()
        }
        of = [
            _interval([gains[at] / (self._found[f"{at[0]}/base/none"] - unrounded[at]) for at in gains])
            if unrounded.keys() >= gains.keys()
            else ""
            for unrounded in (plain, own)
        ]
        means = [f"{np.mean([loss for at, loss in losses.items() if at[0] == task]):.3f}" for task in TASKS]
        return f"| {name} | {arm} | {len(losses)} | {of[0]} | {of[1]} | {' | '.join(means)} |"


def _interval(values: Sequence[float]) -> str:
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.2f}"
    half = t_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """Yields a folder that does not exist, and removes what was written."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _base_parts(path: Path, quant_type: str) -> ModelParts:
    args = ModelArgs(path=str(path), quant_type=quant_type)  # pyright: ignore
    return partition(load_base(open_base(args), args))


def _trained_parts(run: Path) -> ModelParts:
    opened: OpenedModel = open_finetuned(run)
    assert opened.run is not None
    return apply_adapter(load_base(opened, opened.args), opened.run)


if __name__ == "__main__":
    main()
