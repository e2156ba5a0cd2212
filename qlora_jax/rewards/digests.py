"""Digests of the files of reward functions: a run stores them, and a resumed run must have the same.

A digest covers the bytes of the file, and not the modules that it imports.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_jax.config.rewards import split_reward

RewardFile = Mapping[str, str]  # `file`, as given, and `sha256` of its bytes


def reward_digests(rewards: Sequence[str]) -> dict[str, RewardFile]:
    """Returns the file of each function by the function's name, in the order of `--reward`; it can be stored as JSON.

    Raises:
      ValueError: a value is not FILE.py:NAME.
      OSError: a file cannot be read.
    """
    named = {name: file for file, name in map(split_reward, rewards)}
    return {
        name: {"file": file, "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()}
        for name, file in named.items()
    }


def check_same_rewards(
    stored: Mapping[str, RewardFile], given: Mapping[str, RewardFile], *, accept_changed: bool
) -> None:
    """Raises ValueError if a resumed run has other reward functions than it had; a moved file is the same.

    Args:
      stored, given: of `reward_digests`, when the run started and now.
      accept_changed: files may have changed; functions may not be missing or new.
    """
    problems = [
        f"--reward: {each['file']}:{name} is missing, with which the run started. Add --reward {each['file']}:{name}"
        for name, each in stored.items()
        if name not in given
    ]
    problems += [
        f"--reward: the run started without {each['file']}:{name}. Remove it, or start a new run"
        for name, each in given.items()
        if name not in stored
    ]
    if not problems and [*stored] != [*given]:
        problems.append(f"--reward: found the order {', '.join(given)}, expected {', '.join(stored)}. Restore it")
    problems += [
        f"{each['file']}: has changed since the run started (found {each['sha256'][:12]}, expected "
        f"{stored[name]['sha256'][:12]}). Restore it, or add --accept_changed_reward"
        for name, each in given.items()
        if name in stored and each["sha256"] != stored[name]["sha256"] and not accept_changed
    ]
    if problems:
        raise ValueError("\n  ".join(["the run's reward functions differ:", *dict.fromkeys(problems)]))
