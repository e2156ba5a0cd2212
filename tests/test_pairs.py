"""`qlora-jax pairs`: its rows train, its choice is the best and the worst reply, and a stopped command resumes."""

import json
from pathlib import Path

import numpy as np
import pytest

from qlora_jax import pairs
from qlora_jax.api import pairs as api
from qlora_jax.config import ConfigError
from qlora_jax.rewards.functions import RewardError
from tests.e2e.tiny_runs import numbers, run
from tests.e2e.project import project
from tests.inference.small_run import write_run

REWARD = '''
def letters(completions, **columns):
    """The share of the letter a, of texts and of messages."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [len(set(text)) / 8 for text in texts]


def same(completions, **columns):
    return [1.0] * len(completions)


def broken(completions, **columns):
    raise RuntimeError("no reward today")
'''
LENGTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_run(folder)
    (folder / "rewards.py").write_text(REWARD)
    texts = [{"prompt": f"say {word}", "topic": number} for number, word in enumerate(["sun", "moon", "a", "b", "c"])]
    turns = [{"messages": [{"role": "user", "content": row["prompt"]}], "topic": row["topic"]} for row in texts]
    for name, rows in ("texts", texts), ("turns", turns):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(folder: Path, output: Path, prompts: str = "texts", reward: str = "letters", **settings: object) -> list[str]:
    given = {"run": folder / "run", "prompts": folder / f"{prompts}.jsonl", "output": output}
    given |= {"reward": f"{folder / 'rewards.py'}:{reward}", "rollouts.num_generations": 6}
    given |= {"rollouts.max_completion_length": LENGTH, "rollouts.cache": "1MiB", **settings}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_x(folder, tmp_path, capsys):
    for kind in ("texts", "turns"):
        pairs.main(words(folder, tmp_path / f"{kind}.jsonl", kind))
        print((tmp_path / f"{kind}.jsonl").read_text())
    assert 0
