"""The status of a real run: at every step, between two sessions, and at its end."""

import contextlib
from pathlib import Path

import pytest

from qlora_jax.training.live.run_status import RunReader, run_status
from qlora_jax.training.metrics.metrics_file import read_metrics
from tests.e2e.project import project
from tests.e2e.tiny_runs import run


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_run_is_seen_at_every_step_across_a_stop(tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("say sun 1\n")
    how = dict(steps=None, epochs=1.0, samples=str(prompts), sample_tokens=4, eval_every=4)
    config = project(tmp_path / "project", train=how)
    reader, seen = RunReader(Path(config.output)), []
    assert reader.read().state == "waiting"

    def watching(last: int):
        def stop() -> bool:
            seen.append(reader.read())
            return seen[-1].step >= last

        return lambda report: contextlib.nullcontext(stop)

    with monkeypatch.context() as patch:
        patch.setattr("qlora_jax.training.run.stop_on_signals", watching(3))
        assert not run(config)
    assert (reader.read().state, reader.read().step) == ("stopped", 3)
    with monkeypatch.context() as patch:
        patch.setattr("qlora_jax.training.run.stop_on_signals", watching(99))
        assert run(config, resume=True)
    total = seen[0].total_steps  # report.json says so before the first step
    assert {status.total_steps for status in seen} == {total} and total == 8
    assert {*range(1, total + 1)} <= {status.step for status in seen}
    assert {status.state for status in seen} <= {"starting", "training"} and not any(s.problems for s in seen)
    assert any(status.seconds_left for status in seen)

    (sample,) = reader.read().samples
    assert sample.prompt == {"prompt": "say sun 1"} and [step for step, _ in sample.replies] == [0, total]
    assert reader.read() == run_status(Path(config.output))


def test_a_finished_run_shows_its_records(finished):
    status, records = run_status(Path(finished.output)), read_metrics(Path(finished.output) / "metrics.jsonl")
    assert (status.state, status.step, status.total_steps, status.problems) == ("finished", 10, 10, [])
    assert status.base == finished.model.path
    training, held_out = status.loss.lines
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert dict(zip(training.steps, training.values, strict=True)) == losses
    assert held_out.values == [record["eval_loss"] for record in records if "eval_loss" in record]
