"""Runs of two steps of every objective, with packing, methods, optimizers, paging and meshes; resumed to the bit."""

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console

from qlora_jax.config import Config, MeshArgs
from qlora_jax.training.metrics.metrics_file import read_metrics
from qlora_jax.training.run import train
from tests.e2e.project import project
from tests.e2e.run_records import comparable_records
from tests.e2e.test_sequence_heads import rows_of as head_rows
from tests.marks import some_in_ci

ROWS = 12
# Projections and adapters divide by two, and adapters of rank 64 have blocks of 8-bit state.
SIZES = dict(hidden_size=64, intermediate_size=128)


class Case(NamedTuple):
    """The settings that a run of two steps combines; `optim` is the optimizer's section."""

    objective: str
    packing: bool
    method: str
    optim: dict[str, Any]
    mesh: MeshArgs = MeshArgs(fsdp=1)

    def __str__(self) -> str:
        packed = "packed" if self.packing else "padded"
        devices = self.mesh.data * self.mesh.fsdp if isinstance(self.mesh.fsdp, int) else 1
        return f"{self.objective}-{packed}-{self.method}-{'-'.join(map(str, self.optim.values()))}-{devices}"


# Budgets hold one page and not two.
PAGED = {"name": "adamw_32bit", "paging": "on", "paging_budget": "300KiB"}
PAGED_8BIT = {"name": "paged_adamw_8bit", "paging": "on", "paging_budget": "170KiB"}
ADAMW, ADAMW_8BIT, LION, LION_8BIT = ({"name": n} for n in ("adamw_32bit", "adamw_8bit", "lion_32bit", "lion_8bit"))
TWO, CUT = MeshArgs(data=2, fsdp=1), MeshArgs(data=1, fsdp=2)
# The first one runs in CI.
CASES = [
    Case("classification", True, "dora", PAGED_8BIT),
    Case("classification", True, "lora_fa", PAGED),
    Case("classification", True, "dora", PAGED_8BIT, TWO),
    Case("reward", True, "lora_fa", ADAMW, TWO),
    Case("reward", False, "full", ADAMW_8BIT),
    Case("reward", True, "lora", LION_8BIT, TWO),
    Case("multi_label", True, "full", PAGED),
    Case("multi_label", False, "lora", ADAMW_8BIT, TWO),
    Case("regression", False, "lora", PAGED_8BIT),
    Case("regression", True, "dora", LION, CUT),
    Case("embedding", True, "lora_fa", ADAMW, TWO),
    Case("embedding", False, "dora", PAGED, CUT),
    Case("embedding", True, "full", ADAMW_8BIT),
    Case("sft", True, "lora_fa", ADAMW),
    Case("dpo", True, "lora_fa", ADAMW, TWO),
    Case("dpo", False, "full", PAGED_8BIT),
    Case("kto", True, "dora", PAGED_8BIT),
    Case("kto", False, "lora", LION_8BIT, CUT),
    Case("orpo", False, "lora_fa", ADAMW),
    Case("orpo", True, "full", LION),
    Case("orpo", False, "full", PAGED),
    Case("cpo", True, "dora", ADAMW_8BIT, CUT),
    Case("simpo", True, "lora", PAGED | {"paging_budget": "520KiB"}),
]
IN_CI = 1


def rows_of(objective: str) -> list[dict[str, Any]]:
    """Rows of the objective, of few lengths."""
    if objective == "sft":
        return [{"prompt": f"say {index}", "completion": "sun"} for index in range(ROWS)]
    if objective == "kto":
        return [{"prompt": f"say {n}", "completion": "sun moon"[: 3 + n % 4], "label": n % 2} for n in range(ROWS)]
    return head_rows("reward" if objective in ("dpo", "orpo", "cpo", "simpo") else objective, ROWS)


def config_of(case: Case, folder: Path) -> Config:
    """The settings of two steps of two micro-batches."""
    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(case.objective)))
    full = case.method == "full"
    held_out = 0.4 if case.objective in ("dpo", "kto") else 0.0  # compared with the reference
    lora = dict(method=case.method) if full else dict(method=case.method, rank=64)
    config = project(
        folder,
        base=SIZES,
        model=dict(quant_type="none" if full else "nf4"),
        lora=lora | dict(dropout=0.0, **({"rank": 16} if full else {})),
        data=dict(train=str(data), eval_fraction=held_out, max_length=64, packing=case.packing, buckets=1),
        optim=dict(schedule="constant", warmup_start="first", learning_rate=1e-3) | case.optim,
        train=dict(steps=2, micro_batch_size=2, accumulation=2, save_every=1, eval_every=0),
        mesh=dataclasses.asdict(case.mesh),
    )
    return dataclasses.replace(config, objective=case.objective)


def run(config: Config, resume: bool = False) -> None:
    assert train(
        config, Path(config.output), resume=resume, oversized=False, console=Console(file=io.StringIO())
    ).finished


def arrays_of(run: Path, step: int) -> list[np.ndarray]:
    folder, checkpointer = run / "checkpoints" / str(step), ocp.StandardCheckpointer()
    return jax.tree.leaves([checkpointer.restore((folder / item).absolute()) for item in ("lora", "optimizer")])


@pytest.mark.parametrize("case", some_in_ci([(c,) for c in CASES], lambda i: i < IN_CI), ids=str)
def test_two_steps_and_the_second_one_resumed(case: Case, tmp_path: Path) -> None:
    config = config_of(case, tmp_path / "whole")
    run(config)
    whole, again = Path(config.output), tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints/2")
    resumed = dataclasses.replace(config, output=str(again))
    run(resumed, resume=True)
    records = comparable_records(whole / "metrics.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 2 and np.isfinite(losses).all() and losses[0] != losses[1]
    assert comparable_records(again / "metrics.jsonl") == records
    moved = [record["paged_in_bytes"] for record in read_metrics(whole / "metrics.jsonl") if "paged_in_bytes" in record]
    assert any(moved) == ("paging" in case.optim)
    first, last, same = arrays_of(whole, 1), arrays_of(whole, 2), arrays_of(again, 2)
    assert any((a != b).any() for a, b in zip(first, last, strict=True))
    for a, b in zip(last, same, strict=True):
        np.testing.assert_array_equal(a, b)
