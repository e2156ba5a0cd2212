"""Environments of verifiers reach an engine through the endpoint: the ids of turns, tools' answers and masks."""

import os
import weakref
from pathlib import Path

import pytest

from qlora_jax.config.rollouts import RolloutArgs
from qlora_jax.data.rows import File
from qlora_jax.inference.engine.engine import Engine
from qlora_jax.inference.prompts import stop_ids
from qlora_jax.rollouts.episodes import Phase, play_episodes
from qlora_jax.rollouts.prompt_rows import PromptRows
from qlora_jax.rollouts.started_prompts import Asked
from qlora_jax.verifiers import process
from tests.rollouts.tool_models import byte_tokenizer, call
from tests.server.scripted_engine import ScriptedEngine

ENVIRONMENTS = Path(__file__).resolve().parent.parent / "rollouts/environments"
ADDRESS = "verifiers:numbers_tool"
REASONING = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content and loop.last %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content or '' }}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class Scripted(ScriptedEngine, Engine):
    """A scripted engine in place of the real one."""


@pytest.fixture(autouse=True)
def environments(verifiers_python, monkeypatch):
    """Lets the package find the task sets."""
    path = filter(None, [str(ENVIRONMENTS), os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    process.verifiers_process.cache_clear()
    yield
    process.verifiers_process().stop()
    process.verifiers_process.cache_clear()


def play(script, address, template=None, **settings):
    """Plays two rollouts of the second task, and returns the prompt, the replies, and the tokenizer."""
    tokenizer = byte_tokenizer(**({} if template is None else {"template": template}))
    row = {"prompt": "?", process.ADDRESS_COLUMN: address, process.TASK_COLUMN: 1}
    prompts = PromptRows(rows={0: row}, files=[File(address, 0)], columns={address: "prompt"})
    phase = Phase(
        tokenizer=tokenizer,
        settings=RolloutArgs(num_generations=2, max_completion_length=1000, **settings),
        stop_ids=stop_ids(tokenizer, (), chat=True),
        longest=2000,
        longest_row=4000,
        positions=4000,
    )
    engine = Scripted(tokenizer, script, 4000)
    freed = weakref.ref(engine)
    how = {"seeds": [5], "count": 2, "where": lambda number: "row 1", "go_on": lambda done: None}
    ((asked, replies),) = play_episodes(engine, phase, [Asked(0, [1])], prompts, **how)
    del engine
    assert freed() is None  # its cache has to go before the first gradient
    return tokenizer.decode(asked.ids), replies, tokenizer


@pytest.mark.slow
def test_tools_answer_and_their_tokens_are_not_drawn():
    def script(request):
        turn = byte_tokenizer().decode(request.prompt)
        return "It is 3." if "tool\n" in turn else call("adder_add", a=1, b=2) + "<|im_end|>"

    prompt, replies, tokenizer = play(script, f"{ADDRESS}?size=2")
    assert [reply.given.problem for reply in replies] == [None, None]
    assert prompt.startswith("<|im_start|>system\n{") and '"adder_add"' in prompt
    assert prompt.endswith("<|im_start|>user\nAdd 2 to 1.<|im_end|>\n<|im_start|>assistant\n")
    for reply in replies:
        assert (reply.given.reward, reply.given.problem, reply.is_cut) == (1.0, None, False)
        assert reply.given.metrics == {"called": 1.0, "turns": 2.0}
        drawn = tokenizer.decode([token for token, on in zip(reply.ids, reply.drawn, strict=True) if on])
        assert drawn == call("adder_add", a=1, b=2) + "It is 3."
        answered = "<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(reply.ids) == call("adder_add", a=1, b=2) + answered + "It is 3."
        assert [log_p < 0 for log_p in reply.logps] == reply.drawn and not reply.others
        assert [message["role"] for message in reply.messages] == ["assistant", "tool", "assistant"]


@pytest.mark.slow
def test_a_template_that_drops_reasoning_gives_branches():
    turn = "<think>\nwhy\n</think>\n\nsaid"
    address = "verifiers:letters?size=2&id=dialogue&agent.sampling.max_tokens=40"
    prompt, replies, tokenizer = play(lambda request: turn, address, REASONING)
    assert prompt == "<|im_start|>user\nsay a 1<|im_end|>\n<|im_start|>assistant\n"
    more = [f"said<|im_end|>\n<|im_start|>user\nmore {n}<|im_end|>\n<|im_start|>assistant\n" for n in range(2)]
    for reply in replies:
        assert [tokenizer.decode(text.ids) for text in reply.texts] == [turn, more[0] + turn, "".join(more) + turn]
        length = len(tokenizer.encode(turn))
        for text in reply.texts:
            assert text.drawn == [False] * (len(text.ids) - length) + [True] * length
