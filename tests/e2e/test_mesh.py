"""Runs on meshes of eight virtual devices: the same numbers as on one, stopped and resumed, and refused in time."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import qlora_jax as q
from qlora_jax.api.provenance import parts_of
from qlora_jax.config import Config, ConfigError, LoraArgs, MeshArgs
from qlora_jax.io.run_folder.checkpoint import open_run
from qlora_jax.training.metrics.metrics_file import read_metrics
from qlora_jax.training.plan import run_plan
from qlora_jax.training.run import train
from tests.e2e.project import project, stop_after
from tests.e2e.run_records import comparable_records
from tests.marks import first_always

STEPS = 4
# Projections and adapters of rank 16 divide by eight, and the 258 rows of the tables by two.
SIZES = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
ROWS = dict(steps=STEPS, micro_batch_size=8, accumulation=1, save_every=2, eval_every=2)
ONE, FSDP2, FSDP8, BOTH = MeshArgs(fsdp=1), MeshArgs(fsdp=2), MeshArgs(fsdp=8), MeshArgs(data=2, fsdp=4)
DATA8 = MeshArgs(data=8, fsdp=1)
READERS = ("load_for_training", "load_model")


def mesh_project(folder: Path, base: Mapping[str, object] | None = None, **changes) -> Config:
    lora, optim = dict(rank=16, dropout=0.1), dict(schedule="constant", warmup_start="first", learning_rate=1e-3)
    sections = {"lora": lora, "optim": optim, "train": ROWS, "data": dict(buckets=1)}
    merged = sections | {name: sections.get(name, {}) | values for name, values in changes.items()}
    return project(folder, base=SIZES | dict(base or {}), **merged)


def on(config: Config, mesh: MeshArgs, folder: Path) -> Config:
    return dataclasses.replace(config, mesh=mesh, output=str(folder))


def run(config: Config, resume: bool = False, oversized: bool = False) -> str:
    """Trains to the end, and returns what is printed."""
    out = io.StringIO()
    assert train(config, Path(config.output), resume=resume, oversized=oversized, console=Console(file=out)).finished
    return out.getvalue()


def records(config: Config) -> list[dict]:
    return comparable_records(Path(config.output) / "metrics.jsonl")


def arrays_in(folder: str | Path) -> list[np.ndarray]:
    """The adapter of the last checkpoint, read on one device."""
    found = open_run(Path(folder))
    assert found.step == STEPS
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found.lora)]


def assert_equal_but_for_rounding(ours: list[dict], whole: list[dict], first: float, later: float) -> None:
    """Compares records: numbers of step 0 and of the first step within `first`, later ones within `later`."""
    assert [sorted(record) for record in ours] == [sorted(record) for record in whole]
    for mine, theirs in zip(ours, whole, strict=True):
        limit = first if mine["step"] == 0 or ("loss" in mine and mine["step"] == 1) else later
        for name, value in theirs.items():
            exact = isinstance(value, int)
            assert mine[name] == pytest.approx(value, rel=0 if exact else limit, abs=0), (mine["step"], name)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Config:
    """A run of four steps on one device."""
    config = mesh_project(tmp_path_factory.mktemp("one"), mesh=dict(fsdp=1))
    run(config)
    return config


@pytest.fixture(scope="module")
def eight(one, tmp_path_factory) -> Config:
    """The same run on 2 x 4 devices; its output is in the file `printed`."""
    config = on(one, BOTH, tmp_path_factory.mktemp("eight") / "run")
    text = run(config)
    (Path(config.output).parent / "printed").write_text(text)
    return config


@pytest.mark.slow
def test_a_run_on_eight_devices_has_the_numbers_of_one(one, eight):
    assert_equal_but_for_rounding(records(eight), records(one), first=1e-6, later=1e-5)
    ours, whole = (json.loads((Path(config.output) / "report.json").read_text()) for config in (eight, one))
    assert ours["data"] == whole["data"]
    for mine, theirs in zip(*map(arrays_in, (eight.output, one.output)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


@pytest.mark.slow
def test_a_run_on_eight_devices_says_so(eight):
    text = (Path(eight.output).parent / "printed").read_text()
    assert re.search(r"device +8 x cpu: data 2, fsdp 4, computes in float32\n", text)
    why = r"whose 258 rows do not divide by 4 \(they do by 2, 3, 6\)\n"
    assert re.search(r"whole on each +[\d.]+ KiB of the base, with \w+ and \w+, " + why, text)
    assert re.search(r"step 4/4  loss [\d.]+  \d+ tok/s \(\d+ per device\)", text)
    step = next(record for record in read_metrics(Path(eight.output) / "metrics.jsonl") if "loss" in record)
    assert step["devices"] == 8 and step["tokens_per_second"] == pytest.approx(step["tokens"] / step["seconds"])
    assert step["tokens_per_second_per_device"] == pytest.approx(step["tokens_per_second"] / 8)


CASES = [
    (FSDP2, {}),
    (BOTH, {}),
    (DATA8, {}),
    (BOTH, dict(data=dict(packing=True))),
    (FSDP8, dict(data=dict(cache="cache", window=100))),
    (BOTH, dict(optim=dict(name="adamw_8bit"), lora=dict(rank=64))),
    (FSDP8, dict(optim=dict(name="lion_8bit"), lora=dict(rank=64))),
    (BOTH, dict(optim=dict(paging="on", paging_budget="100KiB"))),  # each device has two pages of 64 KiB
    (FSDP8, dict(optim=dict(name="paged_adamw_8bit"), lora=dict(rank=64))),
    (FSDP2, dict(model=dict(new_tokens=["<new>"]))),
    (BOTH, dict(lora=dict(modules_to_save=["lm_head"]))),
    (BOTH, dict(lora=dict(method="ia3", rank=LoraArgs().rank, dropout=0.0))),
    (BOTH, dict(lora=dict(method="lora_fa"))),
    (BOTH, dict(lora=dict(method="dora"))),
    (FSDP8, dict(lora=dict(method="dora", dropout=0.0), optim=dict(paging="on", paging_budget="100KiB"))),
    (BOTH, dict(lora=dict(method="ln_tuning", rank=LoraArgs().rank, dropout=0.0))),
    (BOTH, dict(lora=dict(method="bitfit", rank=LoraArgs().rank, dropout=0.0), base=dict(attention_bias=True))),
    (FSDP8, dict(lora=dict(method="houlsby", dropout=0.0))),
    (BOTH, dict(lora=dict(method="oft", oft_block_size=16, rank=LoraArgs().rank, dropout=0.0))),
    (FSDP8, dict(lora=dict(method="vera", rank=64))),
    (BOTH, dict(lora=dict(merge_into="nf4", dropout=0.0))),
    (FSDP2, dict(lora=dict(merge_into="nf4", merge_from=0.5, dropout=0.0))),
    (FSDP2, dict(lora=dict(merge_into="q4_0", method="dora", dropout=0.0))),
    (FSDP8, dict(train=dict(remat="full"))),
    (DATA8, dict(train=dict(remat="none"))),
    (FSDP2, dict(model=dict(quant_type="none"))),  # eight devices would hold all of it
    (FSDP2, dict(model=dict(double_quant=False, quant_type="int4"))),
]


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "changes"), CASES)
def test_every_kind_of_run_has_the_numbers_of_one_device(tmp_path, mesh, changes):
    if "cache" in changes.get("data", {}):
        changes = changes | {"data": changes["data"] | {"cache": str(tmp_path / "cache")}}
    ours = mesh_project(tmp_path, mesh=dataclasses.asdict(mesh), **changes)
    run(ours)
    in_memory = dataclasses.replace(ours.optim, paging="by_name", paging_budget=None)
    config = dataclasses.replace(on(ours, ONE, tmp_path / "one"), optim=in_memory)
    run(config)
    later = 1e-4 if ours.lora.merge_into is None else 1e-2  # a weight at a tie takes another code
    assert_equal_but_for_rounding(records(ours), records(config), first=2e-6, later=later)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", first_always([BOTH, FSDP8, FSDP2, DATA8]))
def test_a_stopped_run_resumes_on_its_mesh_to_the_bit_and_on_one_device_within_rounding(
    one, eight, tmp_path, mesh, monkeypatch
):
    whole, config = eight, on(one, mesh, tmp_path / "run")
    if mesh != eight.mesh:
        run(whole := on(one, mesh, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, config, 2)
        console = Console(file=io.StringIO())
        assert not train(config, Path(config.output), resume=False, oversized=False, console=console).finished
    moved = on(one, ONE, tmp_path / "moved")
    shutil.copytree(config.output, moved.output)
    run(config, resume=True)
    assert records(config) == records(whole)
    for resumed, uninterrupted in zip(*map(arrays_in, (config.output, whole.output)), strict=True):
        np.testing.assert_array_equal(resumed, uninterrupted)
    assert "resuming after step 2 of 4" in run(moved, resume=True)
    assert_equal_but_for_rounding(records(moved), records(whole), first=1e-6, later=1e-5)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_auto_takes_the_fewest_devices_that_a_run_fits(one, tmp_path, monkeypatch):
    """The limit of one device is set to a byte here."""
    real, tried = run_plan.plan_run, []

    def too_small_alone(config, inputs, gradients):
        plan = real(config, inputs, gradients)
        tried.append(gradients.mesh)
        return plan if gradients.mesh is not None else dataclasses.replace(plan, limit=1)

    monkeypatch.setattr(run_plan, "plan_run", too_small_alone)
    config = on(one, MeshArgs(), tmp_path / "run")
    assert "device  " in (text := run(config)) and "2 x cpu: data 1, fsdp 2" in text
    assert len(tried) == 2
    few = dataclasses.replace(one.train, micro_batch_size=1, accumulation=8)
    with pytest.raises(
        ValueError, match=r"(?s)DOES NOT FIT.*mesh \(data 1, fsdp 2\) was not tried\. train\.micro_batch"
    ):
        run(dataclasses.replace(on(one, MeshArgs(), tmp_path / "small"), train=few))


OTHER_COMMANDS = """
import sys
import jax
from qlora_jax import evaluate, export, generate

run, folder, rows = sys.argv[1:]
assert len(jax.devices()) == 1
export.main(["--run", run, "--output", folder + "/adapter"])
export.main(["--run", run, "--output", folder + "/merged", "--format", "hf"])
generate.main(["--run", run, "--prompt", "say sun", "--max_new_tokens", "4"])
evaluate.main(["--run", run, "--rows", rows, "--columns", "[checkpoint]", "--json", folder + "/scores.json"])
"""


@pytest.mark.exhaustive
@pytest.mark.slow
def test_other_commands_open_a_run_of_eight_devices_where_there_is_one(one, eight, tmp_path):
    scores = []
    for name, config in {"one": one, "eight": eight}.items():
        folder = tmp_path / name
        command = [sys.executable, "-c", OTHER_COMMANDS, config.output, str(folder), str(config.data.train)]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        assert (folder / "adapter/adapter_model.safetensors").is_file() and (folder / "merged/config.json").is_file()
        tasks = json.loads((folder / "scores.json").read_text())["tasks"]
        scores.append([task["columns"]["checkpoint"]["perplexity"]["value"] for task in tasks.values()])
    np.testing.assert_allclose(*scores, rtol=1e-4)


def test_what_cannot_be_is_refused_before_data_and_weights_are_read(one, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_jax.training.plan.run_plan.open_inputs", lambda *_: pytest.fail("data was read"))
    train_args = dataclasses.replace(one.train, micro_batch_size=3, accumulation=4, remat="none")
    bad = dataclasses.replace(on(one, MeshArgs(data=4, fsdp=4), tmp_path / "run"), train=train_args)
    with pytest.raises(ConfigError) as error:
        run(bad)
    keys = ["mesh.data, mesh.fsdp", "train.micro_batch_size", "train.remat"]
    assert [problem.partition(":")[0] for problem in error.value.problems] == keys
    with pytest.raises(ConfigError) as error:
        run(on(one, MeshArgs(fsdp=3), tmp_path / "run"))
    width = "mesh.fsdp: found 3, which does not divide q_proj (128 x 128), k_proj (64 x 128), v_proj (64 x 128), "
    assert len(error.value.problems) == 2 and error.value.problems[0].startswith("train.micro_batch_size: found 8")
    assert error.value.problems[1].startswith(width)
    assert "Set mesh.fsdp to one of 2, 4, 8, 16, or mesh.fsdp=1 and mesh.data=3" in error.value.problems[1]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_budget_that_cannot_be_is_refused_before_weights_are_read(one, tmp_path, monkeypatch):
    for name in READERS:
        monkeypatch.setattr(f"qlora_jax.training.session.{name}", lambda *_, **__: pytest.fail("weights were read"))
    optim = dataclasses.replace(one.optim, paging="on", paging_budget="1KiB")
    with pytest.raises(ValueError, match=r"optim\.paging_budget"):
        run(dataclasses.replace(on(one, FSDP2, tmp_path / "paged"), optim=optim))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_finetune_on_a_mesh_has_the_commands_losses_and_returns_a_whole_model(one, tmp_path):
    base, tokenizer = q.load(one.model.path, compute_dtype="float32")
    model = q.add_adapter(base, q.LoRA(rank=16, dropout=0.1))
    train_args = {f"train.{name}": value for name, value in ROWS.items()}
    more = {"data.buckets": 1, "data.eval_fraction": 0.2, "data.max_length": 160, "optim.warmup_start": "first"}
    settings = train_args | more | {"optim.learning_rate": 1e-3}
    ran = q.finetune(
        model, tokenizer, one.data.train, output=tmp_path / "run", mesh={"data": 2, "fsdp": 4}, config=settings
    )
    assert_equal_but_for_rounding(
        comparable_records(tmp_path / "run/metrics.jsonl"), records(one), first=1e-6, later=1e-5
    )
    devices = {device for leaf in jax.tree.leaves(nnx.state(ran.model)) for device in leaf.devices()}
    assert devices == {jax.local_devices()[0]}
    for leaf, saved in zip(jax.tree.leaves(parts_of(ran.model).lora), arrays_in(tmp_path / "run"), strict=True):
        np.testing.assert_array_equal(leaf, saved)
