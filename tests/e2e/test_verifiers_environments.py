"""Runs in environments of the package verifiers train the drawn tokens, resume, and report faults."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from qlora_jax.config import ConfigError, validate
from qlora_jax.config.rewards import RewardArgs
from qlora_jax.training import rollout_step
from qlora_jax.verifiers import process
from tests.e2e.test_rollouts import rollout_project, steps_of
from tests.e2e.tiny_runs import numbers, run, stop_and_resume
from tests.marks import first_slow

ENVIRONMENTS = Path(__file__).resolve().parent.parent / "rollouts/environments"


@pytest.fixture(autouse=True)
def environments(tmp_path, monkeypatch):
    """Lets the package find a copy of the task sets, in a process of each test."""
    shutil.copytree(ENVIRONMENTS, tmp_path / "environments")
    path = filter(None, [str(tmp_path / "environments"), os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setattr(process, "_allowed", set())
    for cached in (process._prompts, process.verifiers_process):
        cached.cache_clear()
    yield tmp_path / "environments"
    if process.verifiers_process.cache_info().currsize:
        process.verifiers_process().stop()
    process.verifiers_process.cache_clear()


def environment_project(folder: Path, settings="", name="letters", longest=160, **changes):
    """Returns the settings of a run of 2 prompts per step with 2 replies each."""
    config = rollout_project(
        folder,
        {"importance_correction": "token_truncate"},
        {"max_completion_length": longest, "num_generations": 2},
        train=dict(steps=4, micro_batch_size=2, accumulation=1, save_every=2, eval_every=4),
    )
    train, held_out = (f"verifiers:{name}?size={size}{settings}" for size in (6, 2))
    data = dataclasses.replace(config.data, train=train, eval=held_out, eval_fraction=0.0, max_length=longest + 40)
    return dataclasses.replace(config, data=data, **{"reward": [], "environment": f"verifiers:{name}"} | changes)


@pytest.mark.slow
def test_a_dialogue_trains_the_tokens_that_were_drawn_and_resumes_to_the_bit(
    verifiers_python, tmp_path, monkeypatch, environments
):
    whole, stopped = (environment_project(tmp_path / name, "&id=dialogue") for name in ("whole", "stopped"))
    batched, make = [], rollout_step.replies_batch
    monkeypatch.setattr(rollout_step, "replies_batch", lambda *a, **k: (batched.append(a[0]), make(*a, **k))[1])
    assert run(whole)
    stop_and_resume(stopped, 2, monkeypatch)
    steps = steps_of(whole)
    assert steps_of(stopped) == steps and numbers(stopped) == numbers(whole)
    # Turns of a random model are not always valid UTF-8, so later prompts have other ids: these texts are branches.
    replies = [reply for groups in batched for group in groups for reply in group.replies]
    assert max(len(reply.texts) for reply in replies) == 3
    assert max(step["sampling_logp_difference_max"] for step in steps) < 1e-4
    for step in steps:
        assert step["rollout_tokens"] == step["supervised_tokens"] < step["tokens"]
        assert step["reward_metric_turns"] == 3 and step["reply_tokens"] <= 24
        assert step["reward"] == pytest.approx(step["reward_metric_has_letter"] / 2)
    assert [record["eval_reply_tokens"] <= 24 for record in numbers(whole) if "eval_reward" in record] == [True] * 2
    samples = [json.loads(line) for line in (Path(whole.output) / "samples.jsonl").read_text().splitlines()]
    assert all("user:more 1" in sample["reply"] for sample in samples)
    (environments / "letters.py").write_text((environments / "letters.py").read_text() + "\n# changed\n")
    with pytest.raises(ValueError, match=r"verifiers: has changed since the run started.*accept_changed_reward"):
        run(stopped, resume=True)


@pytest.mark.parametrize(
    ("fault", "problem"),
    first_slow(
        [
            ("raises", "TaskError: .*no reward today"),
            ("waits", "the environment took more than 1 s"),
            ("blocks", "the environment took more than 1 s"),
            ("ends", r"the environment ended its process \(exit status 3\)"),
        ]
    ),
)
def test_an_environment_that_fails_names_the_row(verifiers_python, tmp_path, fault, problem):
    config = environment_project(tmp_path, f"&taskset.fault={fault}", longest=16)
    config = dataclasses.replace(config, rollouts=dataclasses.replace(config.rollouts, tool_timeout=1.0))
    with pytest.raises(
        ValueError, match=rf"verifiers:letters\?size=2&taskset.fault={fault}:2: verifiers:letters: {problem}"
    ):
        run(config)
    if fault != "raises":
        return
    train = dataclasses.replace(config.train, steps=1, eval_every=0, save_every=0)
    dropping = dataclasses.replace(config, train=train, rewards=RewardArgs(on_error="drop"))
    assert run(dataclasses.replace(dropping, output=str(tmp_path / "dropping")))


@pytest.mark.parametrize(
    ("name", "settings", "problem"),
    first_slow(
        [
            ("letters", "&taskset.lettr=b", "ValidationError: .* taskset.lettr Extra inputs"),
            ("missing", "", "taskset 'missing' not found"),
        ]
    ),
)
def test_environments_that_cannot_be_loaded(verifiers_python, tmp_path, name, settings, problem):
    with pytest.raises(ValueError, match=problem):
        run(environment_project(tmp_path, settings, name))


@pytest.mark.parametrize("named", ["", "/none/python", sys.executable])
def test_a_package_that_is_missing(tmp_path, monkeypatch, named):
    monkeypatch.setenv(process.PYTHON_VARIABLE, named)
    monkeypatch.setattr(process, "_HERE", tmp_path)
    problem = f"found no package verifiers for {named or sys.executable}.*QLORA_JAX_VERIFIERS_PYTHON"
    with pytest.raises(ValueError, match=problem):
        run(environment_project(tmp_path))


def test_settings_that_contradict_an_environment(tmp_path):
    config = environment_project(tmp_path, tool=["a.py:f"], environment="verifiers:letters?size=2")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval="rows.jsonl"))
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert error.value.problems == [
        "--tool: found with an environment of verifiers, which has its own. Remove it",
        *(
            f"data: found {path!r}, expected 'verifiers:letters?size=2', with settings after a question mark. Change "
            "data.train and data.eval, or --environment, which has no settings"
            for path in ("verifiers:letters?size=6", "rows.jsonl")
        ),
    ]
