"""A finetuning method of another package trains, resumes, is exported and opened, with no file of ours changed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e.project import write_model, write_rows

HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent.parent
TRAIN = (
    "--data.train rows.jsonl --data.max_length 128 --data.eval_fraction 0.2 --model model --output run --train.steps 4 "
    "--model.compute_dtype float32 --train.save_every 2 --optim.learning_rate 0.03 --lora.method hra"
)

ROWS = ("--rows", "rows.jsonl")


def install(folder: Path, module: str, entry: str, group: str = "qlora_jax.methods") -> None:
    """Puts a package with an entry point on a path, as pip would."""
    folder.mkdir(exist_ok=True)
    shutil.copy(HERE / f"{module}.py", folder)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")


def run(folder: Path, name: str, *words: str, fails: bool = False) -> str:
    """Runs a command in a new process that sees the packages in `folder`/site; returns what it prints."""
    path = os.pathsep.join([str(folder / "site"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", f"qlora_jax.{name}", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def losses(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.slow
def test_a_method_of_another_package_trains_resumes_and_is_what_peft_computes(tmp_path: Path, oracle):
    write_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    install(tmp_path / "site", "householder", "hra = householder:DECLARATION")
    printed = run(tmp_path, "train", *TRAIN.split(), "--lora.options", "{reflections: 4}")
    assert "4,096 HRA parameters" in printed
    trained = losses(tmp_path)
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    run(tmp_path, "train", "--config", "run/config.yaml", "--resume")
    assert losses(tmp_path) == trained and trained[-1] < trained[0]
    run(tmp_path, "export", "--run", "run", "--format", "peft", "--with_base")
    run(tmp_path, "export", "--run", "run", "--format", "hf", "--dtype", "float32")
    changes = [
        float(re.findall(r"loss per token ([+-][\d.]+)", run(tmp_path, "evaluate", "--run", name, *ROWS))[-1])
        for name in ("run", "run/peft")
    ]
    assert changes[0] < -1 and changes[0] == pytest.approx(changes[1], abs=0.01)
    tensors = load_file(tmp_path / "run/peft/adapter_model.safetensors")
    assert len(tensors) == 14 and all(values.shape[1] == 4 for values in tensors.values())
    tokens = np.random.default_rng(0).integers(0, 250, (2, 19)).astype(np.int32)
    adapter = str(tmp_path / "run/peft")
    cases = {"ours": [f"{adapter}/base", adapter], "merged": [str(tmp_path / "run/hf"), adapter]}
    found = oracle(ROOT / "tests/oracle/peft_logits.py", cases=cases, tokens=tokens)
    assert np.abs(found["ours/adapted"] - found["ours/base"]).max() > 0.1
    np.testing.assert_allclose(found["merged/base"], found["ours/adapted"], atol=2e-4)
