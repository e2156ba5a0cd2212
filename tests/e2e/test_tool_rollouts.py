"""Runs whose replies call tools and act on environments: they train on drawn tokens, and resume to the bit."""

import dataclasses
import json
from pathlib import Path

import pytest

from qlora_jax.config import ConfigError, validate
from qlora_jax.rewards.tools import ToolCall
from qlora_jax.rollouts.tool_template import ToolTemplate
from tests.e2e.test_rollouts import rollout_project, steps_of
from tests.e2e.tiny_runs import numbers, run, stop_and_resume

TEMPLATE = """{% if tools %}{{ '<s>system:' + tools[0].function.name + '</s>' }}{% endif %}
{%- for m in messages %}{{ '<s>' + m.role[0] + ':' + (m.content or '') }}
{%- for c in m.tool_calls or [] %}{{ '[' + c.function.name + ']' + c.function.arguments | tojson + '.' }}{% endfor %}
{{- '</s>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<s>a:' }}{% endif %}"""
CODE = '''
import random

def draw() -> str:
    """Draws a letter."""
    return random.choice("ab")

class Game:
    def reset(self, prompt, **columns):
        self.tossed = []
        assert prompt[-1]["role"] == "user"
        return f" Start at {random.randint(0, 9)}."

    def toss(self, text: str) -> str:
        """Tosses.

        Args:
            text: the text to toss
        """
        self.tossed.append(random.choice("ab"))
        return self.tossed[-1]

    def get_reward(self):
        return self.tossed.count("a") / 4

def many_a(completions, prompts, **columns):
    """The share of the letter a in what the model says, and a part of the tools' answers."""
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    texts = {role: ["".join(m["content"] for m in one if m["role"] == role) for one in completions] for role in ROLES}
    return [a.count("a") / 16 + t.count("a") / 4 for a, t in zip(*texts.values())]

def tossed(environments, **columns):
    return [float(len(each.tossed)) for each in environments]

ROLES = ("assistant", "tool")
'''
LONGEST_PROMPT = len("_system:draw_" + "_u:say a 11 Start at 0._" + "_a:")


def tool_project(folder: Path, **changes):
    config = rollout_project(
        folder,
        {"importance_correction": "token_truncate"},
        {"max_completion_length": 40, "num_generations": 2},
        train=dict(steps=4, micro_batch_size=2, accumulation=1, save_every=2, eval_every=4),
    )
    (folder / "code.py").write_text(CODE)
    (folder / "tools.jinja").write_text(TEMPLATE)
    data = dataclasses.replace(config.data, chat_template=str(folder / "tools.jinja"), max_length=96)
    given = {
        "reward": [f"{folder}/code.py:{name}" for name in ("many_a", "tossed")],
        "tool": [f"{folder}/code.py:draw"],
    }
    return dataclasses.replace(config, data=data, **given | {"environment": f"{folder}/code.py:Game"} | changes)


@pytest.fixture(autouse=True)
def _a_model_that_calls(monkeypatch):
    """Ends turns of a random model early, and takes them as calls, by what they say."""
    make = ToolTemplate.__init__

    def read(self, prompt, text):
        calls = [ToolCall("toss", {"text": text[:3]}), ToolCall("draw", {})][: len(text) % 3]
        return {"role": "assistant", "content": text}, calls

    def make_with_ends(self, tokenizer, schemas, stop_ids):
        make(self, tokenizer, schemas, stop_ids | frozenset(range(40)))

    monkeypatch.setattr(ToolTemplate, "read", read)
    monkeypatch.setattr(ToolTemplate, "__init__", make_with_ends)


@pytest.mark.slow
def test_a_run_with_tools_and_environments_resumes_to_the_bit(tmp_path, monkeypatch):
    whole, stopped = (tool_project(tmp_path / name) for name in ("whole", "stopped"))
    assert run(whole)
    stop_and_resume(stopped, 2, monkeypatch)
    steps = steps_of(whole)
    assert steps_of(stopped) == steps
    assert max(step["sampling_logp_difference_max"] for step in steps) < 1e-4
    for step in steps:
        assert step["rollout_tokens"] == step["supervised_tokens"] < step["tokens"] - 2 * LONGEST_PROMPT
        assert 0 < step["reward_of_tossed"] <= step["tool_calls"]
        assert 0 <= step["reward_of_Game"] <= step["reward_of_tossed"] / 4
    assert any(step["reward_of_tossed"] < step["tool_calls"] for step in steps)
    assert [record["eval_tool_calls"] > 0 for record in numbers(whole) if "eval_reward" in record] == [True] * 2
    samples = [json.loads(line) for line in (Path(whole.output) / "samples.jsonl").read_text().splitlines()]
    assert all(" Start at " in sample["prompt"]["prompt"][-1]["content"] for sample in samples)
    assert any("<s>t:" in sample["reply"] for sample in samples)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"template": None}, "--tool, --environment: the chat template does not write tools"),
        (
            {"template": "{{ tools }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"},
            "write calls in a known way",
        ),
        ({"rows": {"tools": [{"type": "function"}]}}, "has tools in a run with --tool or --environment"),
        ({"rollouts": {"tool_timeout": 3.0}}, r"rollouts.tool_timeout: found 3.0 without --tool"),
    ],
)
def test_inputs_that_cannot_have_tools(tmp_path, changes, problem):
    without = {"tool": [], "environment": None, "reward": [f"{tmp_path}/code.py:many_a"]}
    config = tool_project(tmp_path, **(without if "rollouts" in changes else {}))
    if template := changes.get("template"):
        (tmp_path / "tools.jinja").write_text(template)
    elif "template" in changes:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, chat_template=None))
    if rows := changes.get("rows"):
        Path(str(config.data.train)).write_text(json.dumps({"prompt": "say", **rows}) + "\n")
    config = dataclasses.replace(config, rollouts=dataclasses.replace(config.rollouts, **changes.get("rollouts", {})))
    with pytest.raises(ValueError, match=problem):
        run(config)


def test_settings_of_tools_that_cannot_be_used(tmp_path):
    config = tool_project(tmp_path, tool=["a.py:f", "b.py:f", "c.py:g"], environment="game")
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert error.value.problems == [
        "--tool: found 2 functions with the name 'f', expected unique names. Rename one",
        "--environment: found 'game', expected FILE.py:NAME. Name a function or class in a Python file",
    ]
