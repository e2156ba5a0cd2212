"""Losses of a quickstart on a GPU, compared with the recorded ones."""

import json

import pytest

from qlora_jax.line_digests import with_digest
from scripts.bench.gpu import compare_losses

RECORDED = json.loads(compare_losses.RECORDED.read_text())
COUNTS = {"tokens": 9, "supervised_tokens": 5, "length": 16, "seconds": 0.5, "learning_rate": 1e-4}


def test_the_recorded_losses_are_equal_to_themselves_and_so_are_their_first():
    assert len(RECORDED) == 75
    assert not compare_losses.problems(RECORDED, RECORDED)
    assert not compare_losses.problems(RECORDED[:2], RECORDED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda all_: [all_[0] * 1.025, *all_[1:]], "step 1: loss"),
        (lambda all_: [*all_[:40], float("nan"), *all_[41:]], "step 41: loss nan"),
        (lambda all_: [loss * 1.05 for loss in all_], "mean loss"),
        (lambda all_: all_[1:] + all_[:1], "step 1: loss"),
        (lambda all_: [], "0 losses"),
        (lambda all_: [*all_, 1.0], "76 losses"),
    ],
)
def test_differences_are_reported(change, message):
    assert any(message in problem for problem in compare_losses.problems(change(RECORDED), RECORDED))


def test_the_command_reads_a_runs_metrics(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 0, "eval_loss": 3.0},
        *(COUNTS | {"step": i + 1, "loss": loss} for i, loss in enumerate(RECORDED[:3])),
    ]
    path.write_text("".join(with_digest(json.dumps(line)) for line in lines))
    assert compare_losses.main(str(path)) == 0
    assert "3 of 75 steps compared" in capsys.readouterr().out
    path.write_text(path.read_text() + with_digest(json.dumps(COUNTS | {"step": 4, "loss": None})))
    assert compare_losses.main(str(path)) == 1
