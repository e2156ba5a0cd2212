"""The pair of a prompt is its best and its worst reply, among those that ended and have a reward."""

import numpy as np
import pytest

from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.rows import File
from qlora_jax.rollouts.preference_pairs import Pair, choose_pair, preference_row
from qlora_jax.rollouts.prompt_rows import PromptRows
from qlora_jax.rollouts.reply import Reply

NAN = float("nan")


def reply(text: str, end: str = "stop") -> Reply:
    return Reply([1, 2], [-1.0, -2.0], [True, True], text, end, [])  # pyright: ignore[reportArgumentType]


def reference(replies, rewards):
    """Tries all pairs, in order."""
    best = None
    usable = [
        number
        for number, each in enumerate(replies)
        if each.end == "stop" and each.text.strip() != "" and rewards[number] == rewards[number]
    ]
    for chosen in usable:
        for rejected in usable:
            margin = rewards[chosen] - rewards[rejected]
            if replies[chosen].text != replies[rejected].text and margin > (1e-8 if best is None else best[2]):
                best = chosen, rejected, margin
    return best


def test_the_choice_equals_a_search_of_all_pairs():
    rng, pairs = np.random.default_rng(0), 0
    for _ in range(400):
        replies = [
            reply(rng.choice(["a", "b", "c", " "]), rng.choice(["stop", "length", "context"], p=[0.7, 0.2, 0.1]))
            for _ in range(6)
        ]
        rewards = rng.choice([0.0, 0.5, 1.0, NAN], 6)
        found, expected = choose_pair(replies, rewards), reference(replies, rewards)
        assert (found if isinstance(found, Pair) else None) == expected
        pairs += expected is not None
    assert 100 < pairs < 400


@pytest.mark.parametrize(
    ("replies", "rewards", "reason"),
    [
        ([reply("a"), reply("b"), reply("c")], [0.1 + 0.2, 0.3, NAN], "equal rewards"),
        ([reply("a"), reply("best", "length"), reply("worst", "length")], [0.5, 1, 0], "fewer than two replies that"),
        ([reply("a"), reply(" \n"), reply("c", "context")], [1, 0, 0], "fewer than two replies that ended"),
        ([reply("a"), reply("b")], [1, NAN], "fewer than two replies with a reward"),
        ([reply("a"), reply("a")], [1, 0], "equal replies"),
    ],
    ids=["equal", "cut", "blank", "unscored", "same text"],
)
def test_a_prompt_without_a_pair_has_a_reason(replies, rewards, reason):
    found = choose_pair(replies, np.array(rewards, np.float64))
    assert isinstance(found, str) and found.startswith(reason)


def test_a_cut_reply_is_neither_chosen_nor_rejected():
    replies = [reply("best", "length"), reply("good"), reply("bad"), reply("worst", "context")]
    assert choose_pair(replies, np.array([9.0, 2.0, 1.0, -9.0])) == Pair(1, 2, 1.0)


TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "column", "prompt"),
    [
        ({"prompt": "hi", "answer": 3}, "prompt", "hi"),
        ({"prompt": [TURN], "answer": 3}, "prompt", [TURN]),
        ({"messages": [TURN, {"role": "assistant", "content": "left out"}], "answer": 3}, "messages", [TURN]),
    ],
    ids=["text", "prompt of messages", "messages"],
)
def test_a_row_has_the_form_of_its_prompt(row, column, prompt):
    prompts = PromptRows(rows={0: row}, files=[File("p.jsonl")], columns={"p.jsonl": column})
    found = preference_row(prompts, 0, [reply("no"), reply("yes")], Pair(1, 0, 0.5))
    answers = (
        ["yes", "no"] if isinstance(prompt, str) else [[{"role": "assistant", "content": t}] for t in ("yes", "no")]
    )
    assert found == {"prompt": prompt, "chosen": answers[0], "rejected": answers[1], "margin": 0.5, "answer": 3}
    assert FORMATS["preference"].check(found) == []
