"""The rows of scripts/bench/train.py: those of the speed goals, and FLOP compared with sums made by hand."""

import pytest

from scripts.bench.support import train_rows as rows


def test_flop_of_a_step_is_the_sum_over_its_products():
    tiny = rows.Shape(layers=3, width=8, heads=4, kv_heads=2, head_dim=2, mlp=16, vocab=32)
    # q and o 8 x 8, k and v 4 x 8, gate, up and down 16 x 8: 576 weights; sides 16 + 16 + 12 + 12 + 3 * 24 = 128
    tokens = 2 * 10
    frozen, adapters = 2 * (2 * tokens * 576), 3 * (2 * tokens * 5 * 128)
    # Each of 2 products forward and 4 backward: 2 FLOP x 2 rows x 4 heads x size 2, for half of 10 x 10 pairs
    attention = 6 * (2 * 2 * 4 * 2 * 50)
    head = 2 * (2 * tokens * 32 * 8)
    assert rows.training_flops(tiny, batch=2, seq=10, rank=5) == 3 * (frozen + adapters + attention) + head


def test_flop_of_smollm2():
    weights = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)
    sides = 30 * (2 * 1152 + 2 * 768 + 3 * 2112)
    expected = 4 * 512 * (weights + 49152 * 576) + 6 * 512 * 16 * sides + 30 * 6 * 576 * 512**2
    assert rows.ROWS["b1-r16"].flops() == expected
    assert rows.ROWS["b4-r16"].flops() == 4 * expected


def test_every_case_of_the_goals_has_a_row():
    def case(row):
        return row.model, row.batch, row.seq, row.rank, row.checkpointing, row.f32

    smollm2 = {("smollm2", b, 512, r, c, False) for b in (1, 4) for r in (16, 64) for c in (False, True)}
    others = {("smollm2", 1, seq, 16, False, False) for seq in (2048, 4096)}
    others |= {("smollm2", 1, 512, 16, False, True), ("qwen2-0.5b", 1, 512, 16, False, False)}
    assert {case(row) for row in rows.ROWS.values()} == smollm2 | others
    assert len(rows.ROWS) == 12


@pytest.mark.parametrize(("fast", "ours", "theirs"), [(True, "bfloat16", "mixed"), (False, "float32", "fp32")])
def test_arguments_of_both_sides_say_the_same(fast, ours, theirs, monkeypatch):
    monkeypatch.setattr(rows, "fast_bfloat16", lambda: fast)
    row = rows.Row(batch=4, rank=64, checkpointing=True)
    shared = ["--model", "x.gguf", "--batch", "4", "--seq", "512", "--rank", "64"]
    assert row.our_arguments("x.gguf") == [*shared, "--remat", "full", "--compute_dtype", ours]
    given = row.their_arguments("x.gguf", ("--compile", "layers"))
    assert given == [*shared, "--dtype", theirs, "--compile", "layers", "--checkpointing", "--in_turns"]
