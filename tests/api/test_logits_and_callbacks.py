"""Logits from Python, and functions that watch a run."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as q
from qlora_jax.training.metrics.metrics_file import read_metrics
from tests.api.conftest import QUICK


def test_logits_are_those_of_the_decoder_for_one_text_and_several(project):
    ids = np.random.default_rng(0).integers(0, 250, (2, 11))
    both = q.logits(project.run.model, ids)
    model = project.run.model
    np.testing.assert_allclose(both.reshape(22, -1), model.head.logits(model.hidden(jnp.asarray(ids))), atol=1e-5)
    np.testing.assert_allclose(q.logits(model, [*map(int, ids[1])]), both[1], atol=1e-5)
    assert both.dtype == np.float32


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([], "found shape (0,), expected [T] or [B, T] with tokens; float64, expected whole numbers"),
        (np.zeros((2, 3, 4), int), "found shape (2, 3, 4), expected [T] or [B, T]"),
        (np.array([0.5]), "float64, expected whole numbers"),
        ([3, 258], "found 3 to 258, expected 0 to 257, the vocabulary"),
        ([-1], "found -1 to -1, expected 0 to 257"),
        ([0] * 257, "found 257 tokens, expected at most 256, the model's positions"),
    ],
)
def test_ids_that_have_no_logits(project, ids, problem: str):
    with pytest.raises(ValueError) as caught:
        q.logits(project.base, ids)
    assert str(caught.value).startswith("ids: ") and problem in str(caught.value)


def test_functions_see_the_records_and_may_stop_the_run_but_not_change_it(project, tmp_path: Path):
    settings = {**QUICK, "steps": 4, "eval_fraction": 0.2, "eval_every": 2}
    seen: list[dict] = []

    def watch(record):
        seen.append(dict(record))
        record.clear()

    def finetune(name: str, **more):
        return q.finetune(project.adapted, project.tokenizer, project.rows, output=tmp_path / name, **settings | more)

    finetune("alone")
    run = finetune("watched", on_step=watch, on_evaluation=watch)
    assert run.finished and seen == [{k: v for k, v in one.items() if k != "digest"} for one in run.metrics]
    stopped = finetune("stopped", on_step=lambda record: record["step"] == 3)
    assert (stopped.step, stopped.finished) == (3, False)
    assert finetune("stopped", resume=True).finished
    losses = [
        [record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in record]
        for name in ("alone", "watched", "stopped")
    ]
    assert losses[0] == losses[1] == losses[2]
    by_evaluation = finetune("evaluated", on_evaluation=lambda record: record["step"] == 2)
    assert (by_evaluation.step, by_evaluation.finished) == (2, False)
    with pytest.raises(RuntimeError, match="own error"):
        finetune("failed", on_step=lambda record: (_ for _ in ()).throw(RuntimeError("own error")))
