"""Replies to prompts while a run trains."""

import dataclasses
import json

import pytest

from qlora_jax import generate
from qlora_jax.training.metrics.metrics_file import read_metrics
from tests.e2e.project import project
from tests.e2e.tiny_runs import run, stop_and_resume

PROMPTS = ["say sun 1", "say moon 2"]


def samples(config) -> list[dict]:
    return read_metrics(f"{config.output}/samples.jsonl")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_every_evaluation_has_replies_and_the_last_are_what_generate_writes(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    how = dict(samples=str(tmp_path / "prompts.txt"), sample_tokens=8, steps=6, eval_every=3)
    config = project(tmp_path / "project", data=dict(eval_fraction=0.0), train=how)
    assert run(config)
    told = samples(config)
    assert [(record["step"], record["prompt"]["prompt"]) for record in told] == [
        (step, prompt) for step in (0, 3, 6) for prompt in PROMPTS
    ]
    out = tmp_path / "replies.jsonl"
    words = ["--run", config.output, "--prompts", how["samples"], "--max_new_tokens", "8", "--output", str(out)]
    generate.main(words)
    replies = [json.loads(line)["reply"] for line in out.read_text().splitlines()]
    assert replies == [record["reply"] for record in told if record["step"] == 6]
    assert [record["reply"] for record in told if record["step"] == 0] != replies

    again = dataclasses.replace(config, output=str(tmp_path / "again"))
    stop_and_resume(again, 4, monkeypatch)
    assert samples(again) == told


def test_prompts_that_leave_no_room_are_told_before_training(tmp_path):
    (tmp_path / "prompts.txt").write_text("x" * 300)
    config = project(tmp_path / "project", train=dict(samples=str(tmp_path / "prompts.txt")))
    with pytest.raises(ValueError, match="tokens; the model has 256 positions for prompt and reply"):
        run(config)
