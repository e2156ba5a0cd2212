"""`qlora-jax pairs`: its pairs train, a stopped command resumes with the same replies, and bad input is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from qlora_jax import pairs
from qlora_jax.api import pairs as api
from qlora_jax.config import Config, ConfigError
from qlora_jax.rewards.functions import RewardError
from qlora_jax.training.run_spec import open_inputs
from tests.e2e.project import project
from tests.e2e.tiny_runs import numbers, run
from tests.inference.small_run import write_run

REWARD = '''
def letters(completions, completion_ids, **columns):
    """The number of different characters, of texts and of messages."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [float(len(set(text))) for text in texts]


def same(completions, **columns):
    return [1.0] * len(completions)


def broken(completions, **columns):
    raise RuntimeError("not today")
'''
WORDS = ["sun", "moon", "a", "b", "c"]
STOPS = frozenset(range(40))  # a random model rarely draws its own end


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_run(folder)
    (folder / "rewards.py").write_text(REWARD)
    texts = [{"prompt": f"say {word}", "topic": number} for number, word in enumerate(WORDS)]
    turns = [{"messages": [{"role": "user", "content": row["prompt"]}], "topic": row["topic"]} for row in texts]
    for name, rows in ("texts", texts), ("turns", turns), ("two", texts[:2]), ("taken", [{**texts[0], "margin": 1}]):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True, scope="module")
def replies_end():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "stop_ids", lambda *_, **__: STOPS)
        yield


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    path = folder / "whole.jsonl"
    pairs.main(words(folder, path))
    return path


def words(folder: Path, output: Path, prompts: str = "texts", reward: str = "letters", **settings: object) -> list[str]:
    given = {"run": folder / "run", "prompts": folder / f"{prompts}.jsonl", "output": output}
    given |= {"reward": f"{folder / 'rewards.py'}:{reward}", "rollouts.num_generations": 4}
    given |= {"rollouts.max_completion_length": 12, "rollouts.cache": "1MiB", **settings}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_texts_and_messages_become_pairs(folder, whole, tmp_path, capsys):
    rows, turns = rows_of(whole), tmp_path / "turns.jsonl"
    assert 3 <= len(rows) <= len(WORDS)
    for row in rows:
        chosen, rejected = (len(set(row[name])) for name in ("chosen", "rejected"))
        assert row["margin"] == chosen - rejected > 0 and row["prompt"] == f"say {WORDS[row['topic']]}"
    pairs.main(words(folder, turns, "turns"))
    turned = {name: [{"role": "assistant", "content": rows[0][name]}] for name in ("chosen", "rejected")}
    assert rows_of(turns)[0] == {**rows[0], **turned, "prompt": [{"role": "user", "content": rows[0]["prompt"]}]}
    printed = capsys.readouterr().out
    assert f"{turns}: {len(rows)} pairs of {len(WORDS)} prompts\n" in printed
    assert f"train --objective dpo --model {folder / 'model'} --lora.start {folder / 'run'}/peft " in printed
    # Both forms are read as pairs for the objective.
    assert [len(open_inputs(dpo_config(tmp_path, path)).dataset.train) for path in (whole, turns)] == [len(rows)] * 2


@pytest.mark.slow
def test_the_pairs_train(folder, tmp_path):
    pairs.main(words(folder, tmp_path / "turns.jsonl", "turns"))
    config = dpo_config(tmp_path, tmp_path / "turns.jsonl")
    assert run(config)
    losses = [record["loss"] for record in numbers(config) if "loss" in record]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6) and losses[-1] < losses[0]


def dpo_config(folder: Path, rows: Path) -> Config:
    data = {"train": str(rows), "eval_fraction": 0.0, "max_length": 96}
    train = {"steps": 4, "micro_batch_size": 2, "accumulation": 1, "eval_every": 0, "save_every": 4}
    return dataclasses.replace(project(folder / "dpo", data=data, train=train), objective="dpo")


def test_a_stopped_command_resumes_with_the_same_replies(folder, whole, tmp_path, monkeypatch):
    resumed, keep = tmp_path / "resumed.jsonl", tmp_path / "kept"
    draw, drawn = api.sample_replies, []

    def until(limit: int):
        def sample(*arguments, **settings):
            if len(drawn) == limit:
                raise KeyboardInterrupt
            drawn.append(1)
            return draw(*arguments, **settings)

        return sample

    monkeypatch.setattr(api, "CACHED_TOGETHER", 8)  # two prompts; no reply depends on the other prompt
    monkeypatch.setattr(api, "sample_replies", until(2))
    with pytest.raises(KeyboardInterrupt):
        pairs.main(words(folder, resumed, keep=keep))
    monkeypatch.setattr(api, "sample_replies", until(3))
    with pytest.raises(RewardError, match=r"texts\.jsonl:1: .*rewards\.py:broken: found RuntimeError: not today"):
        pairs.main(words(folder, resumed, reward="broken", keep=keep))
    assert not resumed.exists() and len(drawn) == 2
    pairs.main(words(folder, resumed, keep=keep))
    assert resumed.read_bytes() == whole.read_bytes() and len(drawn) == 3


def test_equal_rewards_give_no_file(folder, tmp_path):
    output = tmp_path / "pairs.jsonl"
    message = (
        r"two\.jsonl: no prompt gives a pair \(left out: 2 with equal rewards; reward 1 of the first reply, '.+'\)"
    )
    with pytest.raises(ValueError, match=message):
        pairs.main(words(folder, output, "two", "same"))
    assert not output.exists()


def test_bad_input_is_refused_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.delattr(api, "load_opened")
    output = tmp_path / "pairs.jsonl"
    with pytest.raises(ValueError, match=r"taken\.jsonl:1: column 'margin' exists, and pairs get this name. Rename it"):
        pairs.main(words(folder, output, "taken"))
    with pytest.raises(ValueError, match=r"rewards\.py: has no function 'missing'|missing"):
        pairs.main(words(folder, output, reward="missing"))
    output.write_text("mine\n")
    with pytest.raises(ConfigError) as error:
        pairs.main([*words(folder, output, **{"rollouts.cache": "much"}), "--rewards.pattern", "a"])
    found = [problem.partition(": ")[0] for problem in error.value.problems]
    assert found == ["output", "rewards.pattern", "rollouts.cache"]
    with pytest.raises(ConfigError, match=r"--reward: missing, expected at least one function for pairs"):
        pairs.COMMAND.read(["--run", "r", "--prompts", "p.txt", "--output", str(tmp_path / "new.jsonl")])
    assert output.read_text() == "mine\n"
