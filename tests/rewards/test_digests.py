"""A resumed run must have the reward functions that it started with."""

import pytest

from qlora_jax.config import Config, DataArgs, ModelArgs
from qlora_jax.config.rewards import RewardArgs
from qlora_jax.rewards.digests import check_same_code, code_digests


def digests(functions=(), **code):
    config = Config(model=ModelArgs(path="m"), data=DataArgs(train="t"), output="o", reward=[*functions], **code)
    return code_digests(config)


def test_a_changed_file_is_refused_unless_accepted(tmp_path):
    path, moved = tmp_path / "rewards.py", tmp_path / "moved.py"
    for file in (path, moved):
        file.write_text("def f(completions): return [1.0]\n")
    stored = digests([f"{path}:f", f"{path}:g"])
    check_same_code(stored, digests([f"{moved}:f", f"{path}:g"]), accept_changed=False)
    path.write_text("def f(completions): return [2.0]\n")
    changed = digests([f"{path}:f", f"{path}:g"])
    with pytest.raises(ValueError, match=r"rewards.py: has changed since the run started .*--accept_changed_reward"):
        check_same_code(stored, changed, accept_changed=False)
    check_same_code(stored, changed, accept_changed=True)


def test_other_functions_are_refused(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text("")
    f, g = f"{path}:f", f"{path}:g"
    for stored, given, message in (
        ([f], [], f"Add --reward {path}:f"),
        ([f], [f, g], "the run started without"),
        ([f, g], [g, f], "found the order g, f, expected f, g"),
    ):
        with pytest.raises(ValueError, match=message):
            check_same_code(digests(stored), digests(given), accept_changed=True)


def test_tools_and_environments_are_compared_as_well(tmp_path):
    path = tmp_path / "code.py"
    path.write_text("")
    stored = digests(tool=[f"{path}:f"], environment=f"{path}:Game")
    path.write_text("changed = True")
    check_same_code(stored, digests(tool=[f"{path}:f"], environment=f"{path}:Game"), accept_changed=True)
    with pytest.raises(
        ValueError, match=r"(?s)Add --tool .*code.py:f\n.*the run started without .*code.py:Other"
    ) as error:
        check_same_code(stored, digests(environment=f"{path}:Other"), accept_changed=True)
    assert f"Add --environment {path}:Game" in str(error.value)


def test_files_that_rewards_name_are_compared_as_well(tmp_path):
    schema, prompt = tmp_path / "schema.json", tmp_path / "judge.txt"
    rewards = RewardArgs(functions=["json", "judge"], schema=str(schema), judge_prompt=str(prompt))
    with pytest.raises(ValueError, match=r"rewards\.schema: .*schema\.json cannot be read \(found No such file"):
        digests(rewards=rewards)
    schema.write_text("{}")
    prompt.write_text("{prompt}")
    stored = digests(rewards=rewards)
    prompt.write_text("{completion}")
    check_same_code(stored, digests(rewards=rewards), accept_changed=True)
    with pytest.raises(ValueError, match=r"differ:\n  \S*judge\.txt: has changed since"):
        check_same_code(stored, digests(rewards=rewards), accept_changed=False)
