"""Runs that learn from rewards of their own replies: they learn, stop, resume and refuse what they must."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.config import ConfigError, PolicyArgs, RolloutArgs, validate
from qlora_jax.config.rewards import RewardArgs
from qlora_jax.io.run_folder.checkpoint import open_run
from qlora_jax.training.plan import run_plan
from tests.e2e.project import project
from tests.e2e.tiny_runs import numbers, run, stop_and_resume

REWARD = '''
def many_a(completions, **columns):
    """The share of the letter a."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [text.count("a") / 16 for text in texts]
'''


def rollout_project(folder: Path, policy=None, rollouts=None, **changes):
    rows = folder / "prompts.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    rows.write_text("".join(json.dumps({"prompt": f"say {word} {i}"}) + "\n" for i in range(12) for word in "ab"))
    (folder / "rewards.py").write_text(REWARD)
    settings = dict(train=dict(steps=6, micro_batch_size=2, accumulation=2, save_every=2, eval_every=4))
    settings |= dict(data=dict(train=str(rows), max_length=64), lora=dict(rank=4, dropout=0.0))
    settings["optim"] = dict(learning_rate=3e-2, schedule="constant", warmup_ratio=0.0, max_grad_norm=0.0)
    config = project(folder, **settings | changes)
    sampled = dict(num_generations=4, max_completion_length=16, cache="1MiB") | (rollouts or {})
    return dataclasses.replace(
        config,
        objective="grpo",
        reward=[f"{folder / 'rewards.py'}:many_a"],
        policy=PolicyArgs(**policy or {}),
        rollouts=RolloutArgs(**sampled),
    )


def steps_of(config):
    return [record for record in numbers(config) if "loss" in record]


def test_a_model_learns_from_the_rewards_of_its_replies(tmp_path):
    config = rollout_project(tmp_path, train=dict(steps=12, micro_batch_size=4, accumulation=1, eval_every=12))
    assert run(config)
    rewards = [record["reward"] for record in steps_of(config)]
    assert np.mean(rewards[-3:]) > 2 * np.mean(rewards[:3])
    first, last = [record for record in numbers(config) if "eval_reward" in record]
    assert last["eval_reward"] > first["eval_reward"] and last["eval_loss"] == -last["eval_reward"]
    # The trainer gives the sampled tokens the probabilities with which they were drawn.
    assert max(record["sampling_logp_difference_max"] for record in steps_of(config)) < 1e-4


def test_settings_that_contradict_rollouts(tmp_path):
    config = rollout_project(
        tmp_path,
        {"num_iterations": 2},
        data=dict(max_length=16, packing=True),
        lora=dict(dropout=0.1),
        train=dict(steps=5, eval_every=3),
    )
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert [problem.partition(": found")[0] for problem in error.value.problems] == [
        *("data.packing", "data.max_length", "lora.dropout", "train.steps", "train.eval_every", "train.save_every"),
    ]


@pytest.mark.parametrize(
    "policy",
    [
        {"max_redraws": 1},
        pytest.param(
            {"num_iterations": 2, "steps_per_generation": 1, "beta": 0.05, "loss_type": "grpo"}, marks=pytest.mark.slow
        ),
    ],
    ids=["further draws", "iterations and a reference"],
)
def test_a_resumed_run_draws_the_same_replies(tmp_path, monkeypatch, policy):
    whole, stopped = (rollout_project(tmp_path / name, policy) for name in ("whole", "stopped"))
    assert run(whole)
    stop_and_resume(stopped, 2, monkeypatch)
    assert steps_of(stopped) == steps_of(whole)
    if "max_redraws" in policy:
        redrawn = [record["groups_redrawn"] for record in steps_of(whole)]
        kept = [record["groups_without_signal"] for record in steps_of(whole)]
        assert max(redrawn) > 0 and all(left <= share for left, share in zip(kept, redrawn, strict=True))
        assert sum(kept) < sum(redrawn)


def test_a_changed_reward_file_is_refused(tmp_path, monkeypatch):
    config = rollout_project(tmp_path)
    assert run(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=6)))
    assert open_run(Path(config.output)).step == 6
    (tmp_path / "rewards.py").write_text(REWARD + "\n# changed\n")
    with pytest.raises(ValueError, match=r"rewards\.py: has changed since the run started.*accept_changed_reward"):
        run(config, resume=True)


def test_a_reward_that_needs_another_column_is_refused_before_the_step_compiles(tmp_path, monkeypatch):
    config = rollout_project(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARD.replace("(completions", "(answer, completions"))
    monkeypatch.setattr(run_plan, "longest_step", lambda *_: pytest.fail("planned a step"))
    with pytest.raises(ValueError, match=r"rewards\.py:\d+: many_a needs the argument 'answer'"):
        run(config)


def test_an_evaluation_leaves_out_replies_whose_reward_failed(tmp_path):
    config = rollout_project(tmp_path, train=dict(steps=1, eval_every=0, save_every=0))
    values = {"train": [0.5] * 4, "eval": [1.0, None, 0.5, 0.25]}  # float(None) raises
    for name, own in values.items():
        rows = [{"prompt": f"say {number}", "value": value} for number, value in enumerate(own)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text("def many_a(value, **columns):\n    return [float(each) for each in value]\n")
    data = dataclasses.replace(
        config.data, train=str(tmp_path / "train.jsonl"), eval=str(tmp_path / "eval.jsonl"), eval_fraction=0.0
    )
    config = dataclasses.replace(config, data=data, rewards=RewardArgs(on_error="drop"))
    assert run(config)
    first = next(record for record in numbers(config) if "eval_reward" in record)
    assert first["eval_reward"] == pytest.approx(np.mean([1.0, 0.5, 0.25])) and first["eval_rewards_failed"] == 1
