"""Settings of rewards: --reward is of the command line alone, and settings that nothing reads are refused."""

import dataclasses

import pytest

from qlora_jax.api.settings import training_config
from qlora_jax.config import Config, ConfigError, ModelArgs, read_config, to_dict
from qlora_jax.config.command_line import read_settings
from qlora_jax.config.rewards import RewardArgs, check_rewards_given, reward_problems
from qlora_jax.config.yaml_files import differences

GIVEN = ["--model", "m", "--data.train", "d.jsonl", "--output", "o"]


def test_files_neither_set_nor_hold_the_code_of_rewards(tmp_path):
    config, _ = read_settings(Config, [*GIVEN, "--reward", "a.py:f", "--reward", "b.py:g", "--rewards.timeout", "5"])
    assert config.reward == ["a.py:f", "b.py:g"]
    assert to_dict(config)["rewards"]["timeout"] == 5 and "reward" not in to_dict(config)
    assert differences(config, dataclasses.replace(config, reward=[])) == {}
    path = tmp_path / "config.yaml"
    path.write_text("model: {path: m}\ndata: {train: d}\noutput: o\nreward: [a.py:f]\n")
    for read in (lambda: read_config(path), lambda: read_settings(Config, ["--config", str(path)])):
        with pytest.raises(ConfigError, match=r"reward: files cannot set it.*config.yaml:4.*Write --reward instead"):
            read()


def test_configurations_without_rewards_have_the_text_that_they_had():
    config, _ = read_settings(Config, GIVEN)
    assert not {"reward", "rewards"} & to_dict(config).keys()


@pytest.mark.parametrize(
    ("settings", "rewards", "message"),
    [
        ({}, ["a.py"], "--reward: found 'a.py', expected FILE.py:NAME. Name a function"),
        ({}, ["math"], "Write --rewards.functions '[math]'"),
        ({}, ["a.py:f", "b.py:f"], "--reward: found 2 functions with the name 'f'"),
        ({"pattern": "a"}, ["a.py:f"], "rewards.pattern: found 'a', but no function in rewards.functions uses it"),
        ({"functions": ["regex"], "pattern": "("}, [], "rewards.pattern: not a regular expression"),
        ({"functions": ["length"]}, [], "rewards.max_completion_len: missing, but the function length uses it"),
        ({"memory": "much"}, ["a.py:f"], "rewards.memory: found 'much', expected a number of 0 or more and a unit"),
    ],
)
def test_settings_that_cannot_be_used(settings, rewards, message):
    problems = reward_problems(RewardArgs(**settings), rewards, "grpo", used=True)
    assert len(problems) == 1 and message in problems[0]


@pytest.mark.parametrize(
    ("settings", "rewards", "message"),
    [
        ({}, [], "--reward: missing, expected at least one function for objective=grpo"),
        ({"reward_weights": [1.0]}, ["a.py:f", "b.py:g"], "rewards.reward_weights: found 1, expected 2 for the"),
    ],
)
def test_training_needs_functions_that_a_finished_run_lacks(settings, rewards, message):
    args = RewardArgs(**settings)
    assert reward_problems(args, rewards, "grpo", used=True) == []
    with pytest.raises(ValueError, match=message):
        check_rewards_given(args, rewards, "objective=grpo")


def test_a_section_that_files_leave_out_can_be_set_in_python():
    with pytest.raises(ConfigError, match=r"rewards.timeout: found with objective=sft, which does not use it"):
        training_config(ModelArgs(path="m"), None, {}, {"rewards.timeout": 5.0}, output="o")


def test_objectives_without_rewards_refuse_them():
    problems = reward_problems(RewardArgs(timeout=3.0), ["a.py:f"], "sft", used=False)
    assert [each.partition(":")[0] for each in problems] == ["--reward", "rewards.timeout"]
