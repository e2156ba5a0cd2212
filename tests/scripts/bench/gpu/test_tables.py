"""The tables of the GPU benchmark, from records made by hand."""

import pytest

from scripts.bench.gpu import tables


@pytest.mark.parametrize(
    ("times", "lost"),
    [
        ({128: (1, 2), 4096: (2, 2), 8192: (3, 2)}, 8192),
        ({128: (3, 2), 4096: (1, 2), 8192: (1, 2)}, None),  # fused wins at larger M, so there is not a crossover
        ({128: (3, 2), 4096: (3, 2)}, 128),
        ({8192: (3, 2), 128: (1, 2), 2048: (5, 2)}, 2048),
    ],
)
def test_the_rows_from_which_on_fused_loses(times, lost):
    assert tables.loses_from(times) == lost


def record(m, fused, reference):
    """Returns a record with N K = 2^20 and one kernel; times are in seconds."""
    way = {
        "hopper": fused,
        "reference": reference,
        "bf16": reference,
        "tiles": {"hopper": {"64 rows, 4 steps": fused, "128 rows, 4 steps": fused / 2}},
        "chosen": {"hopper": "64 rows, 4 steps"},
        "failures": {},
    }
    return {"shape": "tiny", "n": 1024, "k": 1024, "m": m, "forward": way, "backward": way}


def test_crossover_and_tiles_as_lines():
    records = [record(2048, 1e-3, 2e-3), record(8192, 3e-3, 2e-3)]
    lines = list(tables.crossover_rows(records))
    assert lines[0].startswith("crossover hopper forward tiny: loses from M = 8192 (reference / fused: 2048: 2.00x")
    assert 'MOST_ROWS["hopper"]' in lines[2] and "every shape wins up to M = 2048" in lines[2]
    tile = next(tables.tile_rows(records))
    # 2 x 2048 x 2^20 FLOP in 1 ms: 4.29 TFLOP/s.
    assert "64 rows, 4 steps: 4.3; 128 rows, 4 steps: 8.6 TFLOP/s" in tile
    assert "best 128 rows, 4 steps; taken 64 rows, 4 steps, 2.00x the fastest's time" in tile


def test_a_single_row_is_told_in_bytes_and_a_failure_is_no_number():
    one = record(1, 1e-6, None)
    one["forward"]["failures"] = {"reference": "out of memory"}
    forward, failed, *_ = tables.product_line(one)
    # Codes 2^19, constants 2^14 + 4 x 64 + 4, rows and result 2 x 2048 bytes, in a microsecond: 545 GB/s.
    assert "hopper 545 GB/s" in forward and "reference FAILED" in forward
    assert failed == "  FAILED reference: out of memory"


def test_the_goals_name_the_worst():
    records = [record(2048, 1e-3, 2e-3), record(512, 4e-3, 2e-3)]
    step = {"flops": {"model": 6e14, "again": 1e14}, "step_s": 1.0, "remat": "none", "length": 2048}
    lines = list(tables.goals(records, [step], 1e15, 1e12))
    assert lines[0].endswith("worst 0.50 (tiny, M = 512)")
    assert lines[1].endswith("worst 2.00 (tiny, M = 2048)")
    assert lines[2].endswith("not measured") and lines[3].endswith("best 0.60")


def test_parts_of_a_traced_step_have_a_share_of_the_peak_if_they_have_products():
    parts = [{"part": "frozen", "ms": 200.0, "flop": 1e14}, {"part": "norm", "ms": 50.0, "flop": 0}]
    step = {"length": 8, "remat": "none", "failure": "none", "parts": parts}
    assert list(tables.step_lines(step, 1e15))[1:] == ["  frozen: 200.0 ms, 50.0% of the peak", "  norm: 50.0 ms"]
