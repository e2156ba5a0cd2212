"""The package of examples/extensions trains, resumes and is exported, with no file of ours changed."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e.project import write_model

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "examples/extensions"
TRAIN = (
    "--data.train riddles.jsonl --data.format riddles --data.max_length 128 --data.eval_fraction 0.2 --model model "
    "--output run --train.steps 4 --train.micro_batch_size 2 --train.accumulation 1 --model.compute_dtype float32 "
    "--train.save_every 2 --optim.learning_rate 0.03 --optim.warmup_ratio 0 --objective focal --lora.method hra"
)


def install(folder: Path) -> None:
    """Puts the package's entry points on a path, as pip would; its modules are found beside them."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    info = folder / "extensions-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in one.items()) for group, one in groups]
    (info / "entry_points.txt").write_text("\n".join(lines))


COMMANDS = """
import importlib, shlex, sys
for line in sys.argv[1:]:
    name, *words = shlex.split(line)
    importlib.import_module(f"qlora_jax.{name}").main(words)
"""


def run(folder: Path, *commands: str) -> str:
    """Runs command lines in a new process that sees the package; returns what it prints."""
    path = os.pathsep.join(map(str, (folder / "site", PACKAGE, ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *commands],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def losses(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.slow
def test_a_package_adds_a_method_a_loss_a_row_format_and_an_export(tmp_path: Path, oracle):
    """Exported, the method's adapter computes in PEFT what the merged model computes in transformers."""
    write_model(tmp_path / "model")
    shutil.copy(PACKAGE / "riddles.jsonl", tmp_path)
    install(tmp_path / "site")
    printed = run(tmp_path, f"train {TRAIN} --lora.options '{{reflections: 4}}'")
    assert "4,096 HRA parameters" in printed and "format riddles" in printed
    trained = losses(tmp_path)
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    rows = [{"prompt": "say sun", "completion": "sun"}, {"prompt": "say moon", "completion": "moon"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exports = ("--format peft --with_base", "--format hf --dtype float32", "--format npz")
    printed = run(
        tmp_path,
        "train --config run/config.yaml --resume",
        *(f"export --run run {words}" for words in exports),
        *(f"evaluate --run {name} --rows rows.jsonl" for name in ("run", "run/peft")),
    )
    assert losses(tmp_path) == trained and trained[-1] < trained[0]
    changes = [float(found) for found in re.findall(r"loss per token ([+-][\d.]+)", printed)][1::2]  # by the run
    assert len(changes) == 2 and abs(changes[0]) > 0.01 and changes[0] == pytest.approx(changes[1], abs=0.01)
    assert "7 arrays of run" in printed
    assert len(np.load(tmp_path / "run/npz/adapter.npz").files) == 7
    tensors = load_file(tmp_path / "run/peft/adapter_model.safetensors")
    assert len(tensors) == 14 and all(values.shape[1] == 4 for values in tensors.values())
    tokens = np.random.default_rng(0).integers(0, 250, (2, 19)).astype(np.int32)
    adapter = str(tmp_path / "run/peft")
    cases = {"ours": [f"{adapter}/base", adapter], "merged": [str(tmp_path / "run/hf"), adapter]}
    found = oracle(ROOT / "tests/oracle/peft_logits.py", cases=cases, tokens=tokens)
    assert np.abs(found["ours/adapted"] - found["ours/base"]).max() > 0.1
    np.testing.assert_allclose(found["merged/base"], found["ours/adapted"], atol=2e-4)
