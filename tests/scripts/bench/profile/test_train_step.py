"""The profile of a training step: its table of parts, and the command in both modes."""

import json
import os
import subprocess
import sys

import pytest

from pallas_kernels import aot
from qlora_jax.training.cost import flops
from scripts.bench.profile import parts, train_step
from tests.conftest import ROOT
from tests.io.tiny_models import random_weights, tiny_config, write_folder
from tests.scripts.bench.profile.example_program import HLO, counted, step_of


def test_rates_are_of_the_formulas_flop_and_rows_add_up():
    programs = {"gradients": parts.operations_of(HLO)}
    rows = parts.measure([step_of(1e6)], programs)
    lines = train_step.part_rows(rows, counted(), 100.0)
    flop = flops.flops(counted())
    frozen = {"forward": flop["frozen forward"], "backward": flop["frozen backward"]}
    assert lines[0]["flop"] == frozen
    assert lines[0]["gflop_per_second"] == pytest.approx(sum(frozen.values()) / 0.070 / 1e9)
    assert (lines[-1]["part"], lines[-1]["ms"]) == ("nothing ran", 20)
    assert sum(line["ms"] for line in lines) == 100 and sum(line["share"] for line in lines) == pytest.approx(1)


def profile(tmp_path, *arguments):
    """Returns (the contents of --json, the printed text) for a model of two layers."""
    config = tiny_config()
    model, output = write_folder(tmp_path / "model", config, random_weights(config)), tmp_path / "profile.json"
    command = [
        sys.executable,
        "-m",
        "scripts.bench.profile.train_step",
        "--model",
        model,
        "--seq",
        "32",
        "--json",
        output,
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text()), done.stdout


@pytest.mark.exhaustive
@pytest.mark.slow
def test_times_of_a_real_step(tmp_path):
    found, printed = profile(tmp_path, "--steps", "2", "--remat", "full")
    parts = {line["part"]: line for line in found["parts"]}
    assert {"frozen", "lora", "attention", "norm", "head", "optimizer"} <= parts.keys()
    assert parts["frozen"]["forward"] > 0 and parts["frozen"]["backward"] > 0 and parts["frozen"]["recomputed"] > 0
    assert parts["head"]["gflop_per_second"] > 0
    assert 0 < found["busy_ms"] <= found["thunks_ms"] * 1.001
    assert sum(line["ms"] for line in found["parts"]) == pytest.approx(found["traced_ms"]["step"])
    assert "wall clock" in printed and "frozen" in printed


@pytest.mark.slow
@pytest.mark.skipif(aot.problem() is not None, reason=str(aot.problem()))
def test_bytes_for_an_absent_card(tmp_path):
    found, printed = profile(tmp_path, "--card", "h100")
    gradients = next(row for row in found["memory"] if row["program"] == "gradients")
    weights = sum(
        row["bytes"] for row in found["formula"] if row["what"].startswith(("weights", "parameters", "batch"))
    )
    assert gradients["arguments"] == weights
    assert found["fits"] and found["temporaries"] and "fits" in printed
