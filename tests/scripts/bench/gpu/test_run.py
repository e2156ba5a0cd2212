"""The GPU benchmark, rehearsed on a CPU."""

import json
import math
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_benchmark_rehearses_all_that_it_does_on_a_card(tmp_path):
    command = [sys.executable, "-m", "scripts.bench.gpu.run", "--rehearse", "--output", tmp_path / "bench.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "bench.json").read_text())
    assert [step["remat"] for step in result["steps"]] == ["full", "names", "none", "names", "attention", "names"]
    parts = {part["part"]: part for part in result["steps"][-1]["parts"]}
    assert parts["frozen"]["ms"] > 0 and parts["frozen"]["flop"] > 0 and "nothing ran" in parts
    (attention,) = result["attention"]
    assert attention["backward"]["tiles"] > 0 and not attention["failures"]
    assert all(math.isfinite(step["loss"]) and step["step_s"] > 0 for step in result["steps"])
    few, more = result["products"]
    assert few["m"] == 1 and few["forward"]["skinny"] > 0 and "skinny" not in more["forward"]
    for way in (few["forward"], few["backward"], more["forward"], more["backward"]):
        assert min(way["hopper"], way["ampere"], way["reference"], way["bf16"]) > 0 and not way["failures"]
    for line in (
        "crossover hopper backward",
        "tile ampere forward",
        "goal M = 1",
        "step of 2048 tokens, remat none",
        "attention tiny",
        "  frozen: ",
    ):
        assert line in done.stdout


@pytest.mark.slow
def test_decoding_rehearses_all_that_it_does_on_a_card(tmp_path):
    command = [sys.executable, "-m", "scripts.bench.gpu.decode", "--rehearse", "--output", tmp_path / "decode.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "decode.json").read_text())
    (attention,), (tokens,) = result["attention"], result["tokens"]
    assert min(attention["seconds"]["mma"], attention["seconds"]["reference"]) > 0 and not attention["failures"]
    assert tokens["tokens_per_s"] > 0 and "attention over pages, 1 rows of 70 positions in int8" in done.stdout
