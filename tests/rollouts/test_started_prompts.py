"""Prompts as replies start from them: with the texts of environments, whose errors name the row."""

import pytest

from qlora_jax.config.rewards import RewardArgs
from qlora_jax.data.rows import File
from qlora_jax.rewards.functions import RewardError, RewardFunctions
from qlora_jax.rollouts.prompt_rows import PromptRows
from qlora_jax.rollouts.started_prompts import Asked, start_prompts
from qlora_jax.rollouts.tool_template import ToolTemplate
from tests.rollouts.tool_models import byte_tokenizer, write_tools

GAME = """
import random

class Game:
    made = 0

    def __init__(self):
        type(self).made += 1
        self.number = self.made

    def reset(self, prompt, mode, **columns):
        if mode == "raises":
            raise KeyError("lost")
        texts = {"silent": None, "draws": f" {random.random():.4f}", "differs": f"{self.number}", "wrong": 3}
        return texts[mode]

    def get_reward(self):
        return 1.0
"""
ROWS = {0: {"prompt": "a", "mode": "silent"}, 1: {"prompt": [{"role": "user", "content": "b"}], "mode": "draws"}}
BAD = {
    "raises": r"p.jsonl:3: .*game.py:Game: found KeyError: 'lost' at .*game.py:\d+. Correct reset or the row",
    "differs": "reset returned different texts to the replies of one prompt",
    "wrong": "found int as the result of reset, expected text or None",
}


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("game")
    (folder / "game.py").write_text(GAME)
    tools = [f"{write_tools(folder)}:add"]
    with RewardFunctions(RewardArgs(), [], tools, f"{folder}/game.py:Game") as found:
        yield found


def started(functions, rows, longest=500):
    tokenizer = byte_tokenizer()
    template = ToolTemplate(tokenizer, functions.tools.schemas, frozenset({tokenizer.eos_id}))
    prompts = PromptRows(rows=rows, files=[File("p.jsonl")], columns={"p.jsonl": "prompt"})
    how = {
        "seeds": [5, 6][: len(rows)],
        "count": 2,
        "longest": longest,
        "where": lambda number: f"p.jsonl:{number + 1}",
    }
    asked = [Asked(number, [1, 2]) for number in rows]
    return start_prompts(asked, prompts, functions.tools, template, **how), template


def test_an_environment_adds_its_text_to_the_last_message(functions):
    (silent, drawn), template = started(functions, ROWS)
    assert silent == Asked(0, [1, 2], [{"role": "user", "content": "a"}])
    content = drawn.prompt[-1]["content"]
    assert content.startswith("b 0.") and drawn.ids == template.prompt([{"role": "user", "content": content}], {})
    assert "add" in template.text(drawn.ids)
    assert started(functions, ROWS)[0] == [silent, drawn]
    with pytest.raises(RewardError, match=r"p.jsonl:2: .*found \d+ tokens in the prompt with the text of reset"):
        started(functions, ROWS, longest=300)


@pytest.mark.parametrize("mode", BAD)
def test_a_reset_that_cannot_be_used(functions, mode):
    with pytest.raises(RewardError, match=BAD[mode]):
        started(functions, {2: {"prompt": "c", "mode": mode}})
