"""Whole runs on preference pairs: the reference pass, its metrics, and resuming to the bit."""

import contextlib
import dataclasses
import io
import itertools
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console

from qlora_jax.api.evaluate import evaluate_side_by_side
from qlora_jax.config import Config, MeshArgs
from qlora_jax.config.sizes import format_bytes
from qlora_jax.evaluation.settings import EvaluateArgs
from qlora_jax.training import reference_logps
from qlora_jax.training.metrics.metrics_file import read_metrics
from qlora_jax.training.run import dry_run, train
from qlora_jax.training.session import Session, prepare
from qlora_jax.training.step import compared_outputs, evaluation_outputs
from tests.e2e.project import project, stop_after
from tests.e2e.run_records import comparable_records

BACKEND_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def write_pairs(path: Path, count: int = 24) -> Path:
    words = ["sun", "moon", "rain"]
    rows = [
        {"prompt": f"say {word} {n}" + " now" * 15 * (n % 4 == 0), "chosen": "yes", "rejected": f"no {word} at all"}
        for n, word in zip(range(count), itertools.cycle(words), strict=False)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs_project(folder: Path, **changes) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    data = {"train": str(write_pairs(folder / "pairs.jsonl")), "eval_fraction": 0.3, "max_length": 128, "buckets": 2}
    steps = {"steps": 6, "micro_batch_size": 2, "save_every": 2, "eval_every": 3}
    settings = {"lora": {"dropout": 0.0}, "optim": {"learning_rate": 3e-3}, "data": data, "train": steps}
    merged = {section: values | changes.get(section, {}) for section, values in settings.items()}
    return dataclasses.replace(project(folder, **merged), objective="dpo")


def run(config: Config, resume: bool = False) -> str:
    out = io.StringIO()
    train(config, Path(config.output), resume=resume, oversized=False, console=Console(file=out, width=200))
    return out.getvalue()


def lora_at(config: Config, step: int) -> list[np.ndarray]:
    folder = Path(config.output) / "checkpoints" / str(step)
    return jax.tree.leaves(ocp.StandardCheckpointer().restore((folder / "lora").absolute()))


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[str]]:
    """Names of the programs that the finished run compiled before and after it started to load weights."""
    return {"before": [], "after": []}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled) -> tuple[Config, str]:
    """A run of 6 steps, uninterrupted, and its output."""
    config = pairs_project(tmp_path_factory.mktemp("finished"))
    names = compiled["before"]

    def listen(event: str, seconds: float, fun_name: str = "", **_: object) -> None:
        if event == BACKEND_COMPILE_EVENT:
            names.append(fun_name.removeprefix("jit(").removesuffix(")"))

    def load(*args, **kwargs) -> Session:
        nonlocal names
        names = compiled["after"]
        return prepare(*args, **kwargs)

    for function in (evaluation_outputs, compared_outputs):
        function.plain.clear_cache()
    jax.monitoring.register_event_duration_secs_listener(listen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_jax.training.run.prepare", load)
        output = run(config)
    jax.monitoring.unregister_event_duration_listener(listen)
    return config, output


def test_no_program_of_the_model_is_compiled_next_to_the_weights(finished, compiled):
    lengths = json.loads((Path(finished[0].output) / "report.json").read_text())["data"]["buckets"]
    programs = ("gradients", "evaluation_outputs", "compared_outputs")
    assert {name: compiled["before"].count(name) for name in programs} == dict.fromkeys(programs, len(lengths))
    assert not set(programs) & set(compiled["after"]) and "update" in compiled["after"]


def test_a_run_starts_at_its_reference_and_learns_the_preference(finished):
    config, output = finished
    records = read_metrics(Path(config.output) / "metrics.jsonl")
    held = [record for record in records if "eval_loss" in record]
    first, last = held[0], held[-1]
    assert first["eval_loss"] == pytest.approx(np.log(2)) and first["eval_rewards_accuracy"] == 0.5
    assert first["eval_log_ratio_per_token"] == first["eval_rewards_margin"] == first["eval_kl_chosen"] == 0
    assert 0 < last["eval_kl_rejected_low"] < last["eval_kl_rejected"] < last["eval_kl_rejected_high"]
    assert last["eval_rewards_accuracy"] == 1 and last["eval_loss"] < 0.6 < first["eval_loss"]
    assert last["eval_rewards_margin_low"] < last["eval_rewards_margin"] < last["eval_rewards_margin_high"]
    (step,) = (record for record in records if record.get("step") == 6 and "loss" in record)
    assert step["rewards_margin"] == pytest.approx(step["rewards_chosen"] - step["rewards_rejected"], abs=1e-6)
    assert f"reference: log p of {rows_of(config)} rows" in output
    assert "right by reward 100.0%" in output
    page = (Path(config.output) / "report.html").read_text()
    assert "KL divergence from the reference, nats per token" in page
    assert "held out: KL to the reference per token of rejected" in page
    documented = set(re.findall(r"`([\w*]+)`", Path("docs/training.md").read_text()))
    known = {key for key in documented if not key.endswith("*")}
    starts = tuple(key.removesuffix("*") for key in documented if key.endswith("*"))
    keys = {re.sub("_(low|high)$", "", key) for record in records for key in record}
    assert not [key for key in keys if key not in known and not key.startswith(starts)]


def rows_of(config: Config) -> int:
    return json.loads((Path(config.output) / "report.json").read_text())["data"]["train"]["kept"]


@pytest.mark.slow
def test_a_resumed_run_has_the_same_reference_to_the_bit(finished, tmp_path):
    config, _ = finished
    parted = pairs_project(tmp_path / "parted")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, parted, 3)
        run(parted)
    shutil.rmtree(Path(parted.output) / "reference")  # computed once more
    run(parted, resume=True)
    records = [comparable_records(Path(one.output) / "metrics.jsonl") for one in (config, parted)]
    assert records[0] == records[1]
    for one, two in zip(lora_at(config, 6), lora_at(parted, 6), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_a_run_that_is_stopped_in_its_reference_pass_continues_there(finished, tmp_path, monkeypatch):
    config, calls = pairs_project(tmp_path / "stopped"), []
    monkeypatch.setattr(reference_logps, "PIECE_ROWS", 2)

    def stop() -> bool:
        calls.append(1)
        return len(calls) > 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_jax.training.run.stop_on_signals", lambda report: contextlib.nullcontext(stop))
        assert "stopped after step 0" in run(config)
    stored = {file.name: file.stat().st_mtime_ns for file in (Path(config.output) / "reference").iterdir()}
    assert len(stored) == 2
    run(config, resume=True)
    after = {file.name: file.stat().st_mtime_ns for file in (Path(config.output) / "reference").iterdir()}
    assert stored.items() <= after.items() and len(after) > 2
    assert [r["step"] for r in read_metrics(Path(config.output) / "metrics.jsonl") if "loss" in r][-1] == 6


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_mesh_has_the_same_reference_and_metrics_up_to_rounding(finished, tmp_path):
    config, _ = finished
    parted = dataclasses.replace(pairs_project(tmp_path / "mesh"), mesh=MeshArgs(data=2, fsdp=1))
    run(parted)
    one, two = (read_metrics(Path(each.output) / "metrics.jsonl")[-1] for each in (config, parted))
    names = [name for name in one if name.startswith("eval_")]
    assert [two[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_the_run_is_right_by_reward_where_training_says_so(finished):
    config, _ = finished
    pairs = str(Path(config.data.train))
    done = evaluate_side_by_side(EvaluateArgs(run=config.output, pairs=pairs, columns=["quantized", "checkpoint"]))
    found = done.tasks["pairs"].metrics
    assert found["checkpoint"]["right by reward"].value == 1 and "right by reward" not in found["quantized"]
    held = [record for record in read_metrics(Path(config.output) / "metrics.jsonl") if "eval_kl_chosen" in record]
    for answer in ("chosen", "rejected"):  # all pairs here, held-out ones there
        kl = found["checkpoint"][f"KL to the reference per token, {answer}"].value
        assert kl == pytest.approx(held[-1][f"eval_kl_{answer}"], rel=0.5)
    changes = {change.name: change for change in done.tasks["pairs"].comparisons["quantized", "checkpoint"]}
    assert changes["right by likelihood"].difference >= 0 and "right by reward" not in changes


def test_a_dry_run_counts_the_reference_pass(finished, tmp_path):
    config, _ = finished
    out = io.StringIO()
    planned = dataclasses.replace(config, output=str(tmp_path / "planned"))
    dry_run(planned, tmp_path / "planned", resume=False, oversized=False, console=Console(file=out, width=200))
    report = json.loads((tmp_path / "planned" / "report.json").read_text())
    facts, train = report["memory_plan"]["reference"], report["data"]["train"]
    assert facts["rows"] == train["kept"] < 24 and facts["values"] == train["kept"] * 2 * 4
    assert f"reference pass  {facts['rows']} rows, " in out.getvalue()
    assert facts["program"] > facts["parameters"]
    adapter = sum(leaf.size * leaf.dtype.itemsize for leaf in lora_at(config, 6))
    on_host = report["memory_plan"]["device_bytes"]["reference"]  # a CPU's memory is the host's
    assert facts["parameters"] == on_host == adapter
    assert f"{format_bytes(adapter)} of parameters in host memory" in out.getvalue()
    # A forward pass of all rows, which takes a third to a half of forward and backward, against an epoch's rows.
    assert 1 / 3 < facts["epochs"] * train["tokens"] / facts["tokens"] < 1 / 2
