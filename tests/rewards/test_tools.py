"""Tools and environments run in processes with limits, and their errors are answers that the model reads."""

import os
import signal

import pytest

from qlora_jax.config.rewards import RewardArgs
from qlora_jax.rewards.functions import Replies, RewardFunctions
from qlora_jax.rewards.tools import ToolCall
from qlora_jax.rewards.worker_process import Failed
from tests.rollouts.tool_models import write_tools

ARGS = RewardArgs(functions=["exact"], memory="1GiB")
GAME = '''
import os, random

class Game:
    """Guess a number."""

    def reset(self, secret=None, **columns):
        if isinstance(secret, str):
            raise TypeError("a secret is a number")
        self.secret, self.tries = secret if secret is not None else random.randint(1, 99), []
        return None if secret == 0 else f" Guess. {random.random():.3f}"

    def guess(self, number: int) -> str:
        """Guesses.

        Args:
            number: the guess
        """
        self.tries.append(number)
        if number == 13:
            os._exit(7)
        if number == self.secret:
            return f"yes {os.getpid()}"
        raise ValueError("too low" if number < self.secret else "too high")

    def _hidden(self):
        pass

    def get_reward(self):
        return float(self.secret in self.tries) - 0.1 * len(self.tries)

class Silent:
    def reset(self, **columns):
        pass

class NoReset:
    def act(self) -> int:
        """Acts."""

class Broken:
    def __init__(self):
        self.x = 1 / 0

    def reset(self):
        pass

def tries(environments, **columns):
    return [float(len(each.tries)) for each in environments]
'''


@pytest.fixture
def tools(tmp_path):
    return write_tools(tmp_path)


@pytest.fixture
def game(tmp_path):
    (tmp_path / "game.py").write_text(GAME)
    return str(tmp_path / "game.py")


def test_a_tool_that_hangs_or_eats_memory_answers_with_the_reason(tools):
    names = ("hangs", "eats", "add", "draws")
    with RewardFunctions(ARGS, [], [f"{tools}:{name}" for name in names], tool_timeout=1.0) as functions:
        assert functions.tools is not None
        assert [schema["function"]["name"] for schema in functions.tools.schemas] == [*names]
        calls = {4: [ToolCall("hangs", {}), ToolCall("add", {"a": 1, "b": 2})], 7: [ToolCall("eats", {})]}
        found = functions.tools.answer(calls, {4: 0, 7: 0})
    assert found[4][0] == ("{'error': 'took more than 1 s (rollouts.tool_timeout is 1)'}", True)
    assert found[4][1] == ("3", False)
    assert found[7][0] == ("{'error': 'needed more than 1,024 MiB (rewards.memory)'}", True)


def test_random_numbers_of_a_tool_depend_on_its_seed_alone(tools):
    drawn = []
    for workers in (1, 2):
        args = RewardArgs(functions=["exact"], workers=workers)
        with RewardFunctions(args, [], [f"{tools}:draws"]) as functions:
            assert functions.tools is not None
            calls = {reply: [ToolCall("draws", {})] * 2 for reply in range(3)}
            drawn.append(functions.tools.answer(calls, {reply: 10 + reply for reply in calls}))
    assert drawn[0] == drawn[1]
    assert len({answer.text for own in drawn[0].values() for answer in own}) == 6


def replies(count: int) -> Replies:
    rows = range(count)
    return Replies(
        prompts=["?"] * count,
        completions=["a"] * count,
        completion_ids=[[1]] * count,
        columns={"secret": [5] * count},
        labels=["p.jsonl:1"] * count,
        environments=rows,
    )


def test_environments_are_reset_called_and_rewarded(game):
    with RewardFunctions(RewardArgs(), [f"{game}:tries"], environment=f"{game}:Game") as functions:
        assert functions.tools is not None and functions.names == ("tries", "Game")
        assert [schema["function"]["name"] for schema in functions.tools.schemas] == ["guess"]
        texts = functions.tools.reset([{"secret": 5}, {"secret": 5}, {"secret": 0}, {}], [1, 1, 2, 3])
        assert texts[0] == texts[1] != texts[3] and texts[2] is None
        guesses = {0: [4, 6, 5], 1: [9]}
        calls = {reply: [ToolCall("guess", {"number": number}) for number in own] for reply, own in guesses.items()}
        found = functions.tools.answer(calls, {0: 0, 1: 0})
        assert [answer.text for answer in found[0][:2]] == ["{'error': 'too low'}", "{'error': 'too high'}"]
        assert [answer.failed for answer in found[0]] == [True, True, False] and "yes" in found[0][2].text
        table = functions.score(replies(2))
        assert table.rewards_NF.tolist() == [[3.0, pytest.approx(0.7)], [1.0, pytest.approx(-0.1)]]
        missing = functions.tools.answer({0: [ToolCall("reset", {}), ToolCall("_hidden", {})]}, {0: 0})
        assert [answer.text for answer in missing[0]] == [
            "{'error': 'Tool reset not found.'}",
            "{'error': 'Tool _hidden not found.'}",
        ]


def test_environments_are_as_before_when_their_process_has_ended(game):
    with RewardFunctions(RewardArgs(), [], environment=f"{game}:Game") as functions:
        assert functions.tools is not None
        functions.tools.reset([{"secret": 5}] * 2, [1, 1])

        def guess(number):
            return functions.tools.answer({0: [ToolCall("guess", {"number": number})]}, {0: 0})[0][0]

        process = int(guess(5).text.split()[1])
        os.kill(process, signal.SIGKILL)
        assert guess(4).text == "{'error': 'too low'}"
        assert guess(13).text == "{'error': 'ended its process (exit status 7)'}"
        assert int(guess(5).text.split()[1]) != process
        assert functions.score(replies(1)).rewards_NF.tolist() == [[pytest.approx(1 - 0.3)]]


def test_a_reset_that_fails_says_why(game):
    with RewardFunctions(RewardArgs(), [f"{game}:tries"], environment=f"{game}:Game") as functions:
        assert functions.tools is not None
        (found,) = functions.tools.reset([{"secret": "bad"}], [1])
    assert isinstance(found, Failed) and found.text.startswith("found TypeError: a secret is a number at ")


def test_code_that_cannot_be_used(tools, game, tmp_path):
    (tmp_path / "bad.py").write_text("def (")
    (tmp_path / "plain.py").write_text("def f(a: int): pass")
    given = [f"{tmp_path}/{place}" for place in ("tools.py:missing", "tools.py:calls", "bad.py:f", "plain.py:f")]
    with pytest.raises(ValueError, match="functions cannot be used") as error:
        RewardFunctions(ARGS, [], given)
    found = str(error.value).replace(f"{tmp_path}/", "").splitlines()[1:]
    assert found[:2] == [
        "  tools.py: missing is not a tool (found add, fails, later, hangs, eats, draws in the file). "
        "Name one of the file",
        "  tools.py: calls is not a tool (found int). Name one of the file",
    ]
    assert found[2].startswith("  bad.py:1: cannot be imported (found SyntaxError")
    assert found[3].startswith("  plain.py:1: f: has no docstring. Add one")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("NoReset", r"game.py: NoReset makes no environment \(found no method reset\)"),
        ("Broken", r"game.py:\d+: Broken cannot be made \(found ZeroDivisionError"),
        ("Silent", r"game.py:Silent: found no method get_reward, and no reward function"),
        ("Game", r"guess.py:guess: found 2 tools with the name 'guess', expected unique names"),
    ],
)
def test_environments_that_cannot_be_used(game, tmp_path, name, problem):
    (tmp_path / "guess.py").write_text('def guess() -> int:\n    """Guesses."""\n')
    with pytest.raises(ValueError, match=problem):
        RewardFunctions(RewardArgs(), [], [f"{tmp_path}/guess.py:guess"], f"{game}:{name}")


def test_environments_are_not_an_argument_without_them(game):
    with (
        RewardFunctions(RewardArgs(), [f"{game}:tries"]) as functions,
        pytest.raises(ValueError, match=r"game.py:\d+: tries needs the argument 'environments'"),
    ):
        functions.check_columns(["answer"])
