"""What scripts/gpu_check.sh judges by: losses beside the recorded ones, and the tables of scripts/bench_gpu.py."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDED = json.loads((ROOT / "tests/golden/quickstart_losses.json").read_text())


@pytest.fixture
def losses(load_with_neighbours):
    return load_with_neighbours("compare_losses")


@pytest.fixture
def tables(load_with_neighbours):
    return load_with_neighbours("gpu_tables")


# Losses


def test_the_recorded_losses_are_equal_to_themselves_and_so_are_their_first(losses):
    assert len(RECORDED) == 75
    assert not losses.problems(RECORDED, RECORDED)
    assert not losses.problems(RECORDED[:2], RECORDED)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda all_: [all_[0] * 1.025, *all_[1:]], "step 1: loss"),
        (lambda all_: [*all_[:40], float("nan"), *all_[41:]], "step 41: loss nan"),
        (lambda all_: [loss * 1.05 for loss in all_], "mean loss"),
        (lambda all_: all_[1:] + all_[:1], "step 1: loss"),
        (lambda all_: [], "0 losses"),
        (lambda all_: [*all_, 1.0], "76 losses"),
    ],
)
def test_what_differs_is_told(losses, change, told):
    assert any(told in problem for problem in losses.problems(change(RECORDED), RECORDED))


def test_the_command_reads_a_runs_metrics(losses, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 0, "eval_loss": 3.0}, *({"step": i + 1, "loss": loss} for i, loss in enumerate(RECORDED[:3]))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert losses.main(str(path)) == 0
    assert "3 of 75 steps compared" in capsys.readouterr().out
    path.write_text(path.read_text() + json.dumps({"step": 4, "loss": None}) + "\n")
    assert losses.main(str(path)) == 1


# Tables


@pytest.mark.parametrize(
    ("times", "lost"),
    [
        ({128: (1, 2), 4096: (2, 2), 8192: (3, 2)}, 8192),
        ({128: (3, 2), 4096: (1, 2), 8192: (1, 2)}, None),  # what it wins again later is no crossover
        ({128: (3, 2), 4096: (3, 2)}, 128),
        ({8192: (3, 2), 128: (1, 2), 2048: (5, 2)}, 2048),
    ],
)
def test_the_rows_from_which_on_fused_loses(tables, times, lost):
    assert tables.loses_from(times) == lost


def record(m, fused, reference):
    """A shape with N K = 2^20 and one kernel, in seconds."""
    way = {
        "hopper": fused,
        "reference": reference,
        "bf16": reference,
        "tiles": {"hopper": {"64 rows, 4 steps": fused, "128 rows, 4 steps": fused / 2}},
        "chosen": {"hopper": "64 rows, 4 steps"},
        "failures": {},
    }
    return {"shape": "tiny", "n": 1024, "k": 1024, "m": m, "forward": way, "backward": way}


def test_crossover_and_tiles_as_lines(tables):
    records = [record(2048, 1e-3, 2e-3), record(8192, 3e-3, 2e-3)]
    lines = list(tables.crossover_rows(records))
    assert lines[0].startswith("crossover hopper forward tiny: loses from M = 8192 (reference / fused: 2048: 2.00x")
    assert 'MOST_ROWS["hopper"]' in lines[2] and "every shape wins up to M = 2048" in lines[2]
    tile = next(tables.tile_rows(records))
    # 2 x 2048 x 2^20 FLOP in 1 ms: 4.29 TFLOP/s.
    assert "64 rows, 4 steps: 4.3; 128 rows, 4 steps: 8.6 TFLOP/s" in tile
    assert "best 128 rows, 4 steps; taken 64 rows, 4 steps, 2.00x the fastest's time" in tile


def test_a_single_row_is_told_in_bytes_and_a_failure_is_no_number(tables):
    one = record(1, 1e-6, None)
    one["forward"]["failures"] = {"reference": "out of memory"}
    forward, failed, *_ = tables.product_line(one)
    # Codes 2^19, constants 2^14 + 4 x 64 + 4, rows and result 2 x 2048 bytes, in a microsecond: 545 GB/s.
    assert "hopper 545 GB/s" in forward and "reference FAILED" in forward
    assert failed == "  FAILED reference: out of memory"


def test_the_goals_name_the_worst(tables):
    records = [record(2048, 1e-3, 2e-3), record(512, 4e-3, 2e-3)]
    step = {"flops": {"model": 6e14, "again": 1e14}, "step_s": 1.0, "remat": "none"}
    lines = list(tables.goals(records, [step], 1e15, 1e12))
    assert lines[0].endswith("worst 0.50 (tiny, M = 512)")
    assert lines[1].endswith("worst 2.00 (tiny, M = 2048)")
    assert lines[2].endswith("not measured") and lines[3].endswith("best 0.60")


@pytest.mark.slow
def test_the_benchmark_rehearses_all_that_it_does_on_a_card(tmp_path):
    command = [sys.executable, ROOT / "scripts/bench_gpu.py", "--rehearse", "--output", tmp_path / "bench.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "bench.json").read_text())
    assert [step["remat"] for step in result["steps"]] == ["full", "names", "none"]
    assert all(math.isfinite(step["loss"]) and step["step_s"] > 0 for step in result["steps"])
    few, more = result["products"]
    assert few["m"] == 1 and few["forward"]["skinny"] > 0 and "skinny" not in more["forward"]
    for way in (few["forward"], few["backward"], more["forward"], more["backward"]):
        assert min(way["hopper"], way["ampere"], way["reference"], way["bf16"]) > 0 and not way["failures"]
    for told in ("crossover hopper backward", "tile ampere forward", "goal M = 1", "step, remat none"):
        assert told in done.stdout
