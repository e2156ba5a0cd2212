"""The Python functions, from a model's files to a PEFT adapter, next to the commands."""

import inspect
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import qlora_jax as q
from qlora_jax import export, generate, train
from qlora_jax.io.peft.reader import is_adapter
from qlora_jax.io.run_folder.run_lock import lock_run
from qlora_jax.training.metrics.metrics_file import read_metrics
from tests.api.conftest import QUICK
from tests.e2e.project import write_model, write_rows

CLOCK = {"seconds", "data_seconds", "host_bytes", "tokens_per_second"}


def losses(run: Path) -> list[tuple]:
    names = ("step", "loss", "eval_loss", "grad_norm", "learning_rate")
    return [tuple(record.get(name) for name in names) for record in read_metrics(run / "metrics.jsonl")]


def test_fifteen_lines_from_a_folder_to_a_peft_adapter(tmp_path, capfd):
    path, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    capfd.readouterr()
    model, tokenizer = q.load(str(path), quant_type="nf4")
    model = q.add_adapter(model, q.LoRA(rank=2), key=jax.random.key(0))
    run = q.finetune(model, tokenizer, rows, output=tmp_path / "run", **QUICK)
    run.save_peft(tmp_path / "adapter")
    text = q.generate_text(run.model, tokenizer, "say sun", max_new_tokens=4)
    assert capfd.readouterr() == ("", "")
    assert isinstance(model, nnx.Module) and isinstance(run.model, nnx.Module) and isinstance(text, str)
    assert run.finished and run.step == 3 and [r["step"] for r in run.metrics if "loss" in r] == [1, 2, 3]
    assert is_adapter(tmp_path / "adapter")
    assert not (tmp_path / "run" / "start.safetensors").exists()  # a fresh adapter changes nothing


def test_the_callers_models_stay_valid_and_unchanged(project):
    for model in (project.base, project.adapted, project.run.model):
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(model)))
    fresh, trained = (nnx.state(model, nnx.LoRAParam) for model in (project.adapted, project.run.model))
    assert not jax.tree.leaves(nnx.state(project.base, nnx.LoRAParam))
    assert all(not np.any(leaf) for path, leaf in nnx.to_flat_state(fresh) if path[-1] == "lora_b")
    assert all(np.any(leaf) for path, leaf in nnx.to_flat_state(trained) if path[-1] == "lora_b")


def test_losses_are_those_of_the_command(project, tmp_path):
    settings = {
        "model.compute_dtype": "float32",
        "lora.rank": 4,
        "lora.dropout": 0.1,
        "data.eval_fraction": 0.2,
        "data.max_length": QUICK["max_length"],
        "optim.learning_rate": QUICK["learning_rate"],
        **{f"train.{name}": QUICK[name] for name in ("steps", "micro_batch_size", "accumulation")},
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    train.main(
        ["--model", str(project.model_folder), "--data.train", str(project.rows), *words, "--output", f"{tmp_path}/run"]
    )
    assert losses(tmp_path / "run") == losses(project.run.folder)


def test_commands_open_the_run(project, tmp_path, capsys):
    folder = str(project.run.folder)
    generate.main(["--run", folder, "--prompt", "say sun", "--max_new_tokens", "8"])
    assert (
        capsys.readouterr().out
        == q.generate_text(project.run.model, project.tokenizer, "say sun", max_new_tokens=8) + "\n"
    )
    export.main(["--run", folder, "--output", str(tmp_path / "command")])
    project.run.save_peft(tmp_path / "python")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("command", "python")]
    assert weights[0] == weights[1]


def test_a_run_and_a_peft_adapter_load_as_the_trained_model(project, tmp_path):
    conversation = [{"role": "user", "content": "say moon"}]
    expected = q.generate_text(project.run.model, project.tokenizer, conversation, max_new_tokens=8)
    project.run.save_peft(tmp_path / "adapter")
    for folder in (project.run.folder, tmp_path / "adapter"):
        model, tokenizer = q.load(str(folder), compute_dtype="float32")
        assert q.generate_text(model, tokenizer, conversation, max_new_tokens=8) == expected
    parts = [{"type": "text", "text": text} for text in ("say ", "moon")]
    in_parts = [{"role": "user", "content": parts}]
    assert q.generate_text(project.run.model, project.tokenizer, in_parts, max_new_tokens=8) == expected


def test_rows_in_memory_train_like_a_file_and_resume(project, tmp_path):
    rows = [json.loads(line) for line in project.rows.read_text().splitlines()]
    settings = {**QUICK, "eval_fraction": 0.2, "save_every": 1}
    where = {"output": tmp_path / "run"}
    first = q.finetune(project.adapted, project.tokenizer, rows, **where, **settings | {"steps": 2})
    assert first.step == 2 and (tmp_path / "run" / "train.jsonl").is_file()
    with pytest.raises(ValueError, match="contains a run"):
        q.finetune(project.adapted, project.tokenizer, rows, **where, **settings)
    with pytest.raises(ValueError, match=r"train\.jsonl: the run was started with other rows"):
        q.finetune(project.adapted, project.tokenizer, rows[1:], **where, **settings, resume=True)
    whole = q.finetune(project.adapted, project.tokenizer, rows, output=tmp_path / "whole", **settings)
    assert [r["loss"] for r in whole.metrics if "loss" in r] == [r["loss"] for r in project.run.metrics if "loss" in r]
    resumed = q.finetune(project.adapted, project.tokenizer, rows, **where, **settings | {"steps": 2}, resume=True)
    assert resumed.step == 2 and resumed.finished


def test_a_changed_reward_file_is_refused_unless_accepted(project, tmp_path):
    file = tmp_path / "rewards.py"
    settings = {"rollouts.num_generations": 2, "rollouts.max_completion_length": 4, "reward": [f"{file}:long"]}

    model = q.add_adapter(project.base, q.LoRA(rank=2))

    def finetune(factor: int, **more):
        file.write_text(f"def long(completion_ids, **columns): return [{factor} * len(ids) for ids in completion_ids]")
        how = {"output": tmp_path / "run", "objective": "grpo", "steps": 2, "micro_batch_size": 2, "accumulation": 1}
        rows = [{"prompt": f"say {number}"} for number in range(4)]
        return q.finetune(model, project.tokenizer, rows, **how, max_length=32, config=settings, **more)

    assert finetune(1, on_step=lambda record: True).step == 1
    with pytest.raises(ValueError, match=r"rewards\.py: has changed since .*in Python accept_changed_reward=True"):
        finetune(2, resume=True)
    assert finetune(2, resume=True, accept_changed_reward=True).step == 2


def test_the_merged_model_has_the_adapter(project, tmp_path):
    result = project.run.merge(tmp_path / "merged", dtype="float32")
    assert result.difference is not None and result.difference.is_small
    merged, tokenizer = q.load(str(tmp_path / "merged"), quant_type="none", compute_dtype="float32")
    prompt = {"prompt": "say sun", "max_new_tokens": 8}
    assert q.generate_text(merged, tokenizer, **prompt) == q.generate_text(project.run.model, tokenizer, **prompt)


def test_what_finetune_refuses(project, tmp_path):
    def attempt(model=project.adapted, tokenizer=project.tokenizer, **settings):
        return q.finetune(model, tokenizer, project.rows, output=tmp_path / "run", **settings)

    with pytest.raises(ValueError, match="has no adapter to train"):
        attempt(project.base)
    with pytest.raises(ValueError, match=r"was not loaded by qlora_jax\.load .*quantize_model"):
        attempt(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"rows can't be used:(.|\n)*data\.columns: no column 'q' "):
        attempt(columns={"prompt": "q"}, max_length=64)
    with pytest.raises(ValueError, match=r"data\.bad_rows drop leaves no row"):
        attempt(columns={"prompt": "q"}, bad_rows="drop", max_length=64)
    with pytest.raises(ValueError, match=r"optim\.lr: unknown setting; did you mean optim\.learning_rate"):
        attempt(config={"optim.lr": 1.0})
    with pytest.raises(ValueError, match=r"lora\.rank: cannot be set in config; it comes from qlora_jax\.add_adapter"):
        attempt(config={"lora.rank": 1})
    with pytest.raises(ValueError, match=r"train\.steps: given twice"):
        attempt(steps=1, config={"train.steps": 2})
    with pytest.raises(ValueError, match="already has an adapter"):
        q.add_adapter(project.adapted)
    with pytest.raises(TypeError, match=r"lora: found {'rank': 8}, expected qlora_jax\.LoRA"):
        inspect.unwrap(q.add_adapter)(project.base, {"rank": 8})  # without the type checks of tests
    assert not (tmp_path / "run").exists()
    with lock_run(tmp_path / "run", pytest.fail):
        with pytest.raises(ValueError, match=rf"another process writes in this folder \(process {os.getpid()} on "):
            q.finetune(
                project.adapted, project.tokenizer, [{"prompt": "a", "completion": "b"}], output=tmp_path / "run"
            )
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"], "no rows of the second are written"


def test_a_plan_is_an_object_and_a_text(project):
    config = {"data.max_length": 64, "lora.rank": 4}
    plan = q.make_plan(str(project.model_folder), card="cpu", config=config)
    assert plan.fits and 0 < plan.needed_bytes < plan.limit_bytes
    assert "fits: " in str(plan) and plan.to_dict()["fits"] is True
