"""A resumed run must have the reward functions that it started with."""

import pytest

from qlora_jax.rewards.digests import check_same_rewards, reward_digests


def test_a_changed_file_is_refused_unless_accepted(tmp_path):
    path, moved = tmp_path / "rewards.py", tmp_path / "moved.py"
    for file in (path, moved):
        file.write_text("def f(completions): return [1.0]\n")
    stored = reward_digests([f"{path}:f", f"{path}:g"])
    check_same_rewards(stored, reward_digests([f"{moved}:f", f"{path}:g"]), accept_changed=False)
    path.write_text("def f(completions): return [2.0]\n")
    changed = reward_digests([f"{path}:f", f"{path}:g"])
    with pytest.raises(ValueError, match=r"rewards.py: has changed since the run started .*--accept_changed_reward"):
        check_same_rewards(stored, changed, accept_changed=False)
    check_same_rewards(stored, changed, accept_changed=True)


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
            check_same_rewards(reward_digests(stored), reward_digests(given), accept_changed=True)
