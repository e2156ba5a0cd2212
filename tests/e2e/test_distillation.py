"""Runs that learn a teacher's predictions: they learn, resume to the bit, and refuse other tokenizers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.config import Config, DistillationArgs, RolloutArgs
from qlora_jax.rollouts.sampler import draw_seed
from qlora_jax.training.teacher.local import LocalSource
from qlora_jax.training.teacher.logprob_cache import TeacherError
from tests.e2e.project import project, served_teacher, stop_after
from tests.e2e.tiny_runs import numbers, run, stop_and_resume

TRAIN = dict(steps=6, micro_batch_size=2, accumulation=2, save_every=2, eval_every=6)


def distilled_project(
    folder: Path, objective: str = "distill", teacher: str = "base", more: dict[str, Any] | None = None, **changes
) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "texts.jsonl"
    texts = [{"prompt": f"say {word} {i}"} for i in range(12) for word in "ab"]
    if objective == "distill" or "lmbda" in (more or {}):
        texts = [row | {"completion": f" {row['prompt'][::-1]}"} for row in texts]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    settings: dict[str, Any] = {"train": TRAIN, "lora": {"rank": 4, "dropout": 0.0}}
    settings["data"] = dict(train=str(rows), max_length=64)
    settings["optim"] = dict(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0, max_grad_norm=0.0)
    config = project(folder, **settings | changes)
    return dataclasses.replace(
        config,
        objective=objective,
        distillation=DistillationArgs(teacher=teacher, loss_top_k=8, **(more or {})),
        rollouts=RolloutArgs(num_generations=2, max_completion_length=16) if objective == "gkd" else RolloutArgs(),
    )


@pytest.mark.parametrize("objective", ["distill", pytest.param("gkd", marks=pytest.mark.slow)])
def test_a_quantized_model_learns_from_its_base_and_resumes_to_the_bit(tmp_path, monkeypatch, objective):
    whole, stopped = (distilled_project(tmp_path / name, objective) for name in ("whole", "stopped"))
    assert run(whole)
    first, last = [record for record in numbers(whole) if "eval_loss" in record]
    assert 0 < last["eval_loss"] < first["eval_loss"]
    assert {"eval_cross_entropy", "eval_teacher_tail"} <= last.keys()
    is_sampled = objective == "gkd"
    gaps = [record["sampling_logp_difference_max"] for record in numbers(whole) if "loss" in record and is_sampled]
    assert len(gaps) == (6 if is_sampled else 0) and max(gaps, default=0) < 1e-4
    stop_and_resume(stopped, 2, monkeypatch)
    assert numbers(stopped) == numbers(whole)


@pytest.mark.slow
def test_packed_runs_read_the_predictions_of_others(tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    plain = distilled_project(tmp_path)
    rows = plain.data.train
    assert run(dataclasses.replace(plain, data=dataclasses.replace(plain.data, cache=cache)))
    monkeypatch.setattr(LocalSource, "load", lambda *_: pytest.fail("the teacher was loaded again"))
    packed = dataclasses.replace(plain, output=str(tmp_path / "packed"))
    packed = dataclasses.replace(packed, data=dataclasses.replace(packed.data, packing=True, cache=cache))
    assert packed.data.train == rows and run(packed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a folder", "a run"])
def test_another_model_teaches(tmp_path, kind):
    teacher = distilled_project(tmp_path / "teacher")
    assert run(teacher)
    named = teacher.model.path if kind == "a folder" else teacher.output
    config = distilled_project(tmp_path / "student", teacher=str(named))
    assert run(config)
    first, last = [record["eval_loss"] for record in numbers(config) if "eval_loss" in record]
    assert 0 < last < first


@pytest.mark.slow
def test_a_mixture_learns_the_completions_of_the_data_or_replies_as_the_seed_says(tmp_path, monkeypatch):
    whole, stopped = (distilled_project(tmp_path / name, "gkd", more={"lmbda": 0.5}) for name in ("whole", "stopped"))
    assert run(whole)
    steps = [record for record in numbers(whole) if "loss" in record]
    assert [record["on_policy"] for record in steps] == [draw_seed(0, step) < 2**31 for step in range(6)]
    assert len({record["on_policy"] for record in steps}) == 2
    assert all(("reply_tokens" in record) == record["on_policy"] for record in steps)
    assert all(("sampling_logp_difference_max" in record) == record["on_policy"] for record in steps)
    stop_and_resume(stopped, 3, monkeypatch)
    assert numbers(stopped) == numbers(whole)


@pytest.mark.slow
def test_completions_in_place_of_replies_have_the_loss_of_supervised_rows(tmp_path):
    found = []
    for objective, more in ("distill", None), ("gkd", {"lmbda": 0.0}):
        config = distilled_project(tmp_path / objective, objective, more=more)
        data = dataclasses.replace(config.data, eval_fraction=0.0, max_length=100)
        train = dataclasses.replace(config.train, steps=1, accumulation=12, save_every=0)  # a step has all rows
        config = dataclasses.replace(config, data=data, train=train)
        assert run(config)
        (record,) = [record for record in numbers(config) if "loss" in record]
        found.append([record[name] for name in ("loss", "cross_entropy", "teacher_tail", "supervised_tokens")])
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_a_mixture_needs_completions(tmp_path):
    config = distilled_project(tmp_path, "gkd", more={"lmbda": 0.5})
    rows = Path(str(config.data.train))
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([lines[0], '{"prompt": "say nothing"}', *lines[2:]]))
    with pytest.raises(ValueError, match=r"lmbda: below 1, but 1 of 24 rows have no .*\n .*texts.jsonl: row 2: "):
        run(config)
    roles = ("user", "assistant", "user")
    chats = [[{"role": role, "content": f"x{i}"} for role in roles[: 2 + i // 9]] for i in range(18)]
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    with pytest.raises(ValueError, match=r"9 of 18 rows .*\n .*texts.jsonl: row 10: the last message is not the "):
        run(config)


@pytest.mark.slow
def test_an_endpoint_teaches_as_the_same_model_does_and_is_not_needed_to_resume(tmp_path, monkeypatch):
    whole = distilled_project(tmp_path / "whole")
    assert run(whole)
    with served_teacher(Path(whole.model.path)) as url:
        stopped = distilled_project(tmp_path / "stopped", teacher=url, more={"teacher_model": "model"})
        with monkeypatch.context() as patch:
            stop_after(patch, stopped, 2)
            assert not run(stopped)
    assert run(stopped, resume=True)
    for ours, local in zip(numbers(stopped), numbers(whole), strict=True):
        assert ours == pytest.approx(local, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_an_endpoint_scores_sampled_replies_and_a_run_without_it_stops_at_a_checkpoint(tmp_path, monkeypatch):
    whole = distilled_project(tmp_path / "whole", "gkd")
    with served_teacher(Path(whole.model.path)) as url:
        config = distilled_project(tmp_path / "remote", "gkd", teacher=url, more={"teacher_model": "model"})
        monkeypatch.setattr("qlora_jax.training.teacher.endpoint.WAITS", ())
        with monkeypatch.context() as patch:
            stop_after(patch, config, 1)
            assert not run(config)
    with pytest.raises(TeacherError, match="no connection"):
        run(config, resume=True)
    stop_after(monkeypatch, whole, 1)
    assert not run(whole)
    for ours, local in zip(numbers(config), numbers(whole), strict=True):
        assert ours == pytest.approx(local, rel=1e-3, abs=1e-4)


def test_a_teacher_with_other_tokens_is_refused(tmp_path):
    config = distilled_project(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(config.model.path).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [*vocabulary][-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    wrong = dataclasses.replace(config.distillation, teacher=str(other))
    with pytest.raises(ValueError, match=r"other has another tokenizer: 2 of .* tokens differ"):
        run(dataclasses.replace(config, distillation=wrong))
    many = dataclasses.replace(config.distillation, loss_top_k=10**6)
    with pytest.raises(ValueError, match=r"loss_top_k: found 1000000, expected at most"):
        run(dataclasses.replace(config, distillation=many))
