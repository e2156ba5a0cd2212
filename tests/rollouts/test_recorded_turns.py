"""Turns that programs draw become texts in which each drawn token is trained once, after the ids that it followed."""

import itertools

import jax
import numpy as np
import pytest

from qlora_jax.config.rollouts import RolloutArgs
from qlora_jax.inference.engine.request import Request
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.rollouts.recorded_turns import Recorded, RecordingEngine, Turn, join_turns, shared_depth
from qlora_jax.rollouts.reply import Reply, Text
from qlora_jax.rollouts.rows import Group, replies_batch
from qlora_jax.rollouts.sampler import rollout_engine
from tests.inference.tiny import byte_tokenizer, full_logits, tiny_parts

SETTINGS = RolloutArgs(num_generations=2, max_completion_length=24, temperature=0.8)


def turn(prompt, ids):
    return Turn([*prompt], [*ids], [-float(token) for token in ids], "stop")


def text(*parts):
    """Returns a text of ids that were drawn (in lists) and others (in tuples)."""
    ids = [*itertools.chain(*parts)]
    drawn = [isinstance(part, list) for part in parts for _ in part]
    return Text(ids, [-float(token) if on else 0.0 for token, on in zip(ids, drawn, strict=True)], drawn)


@pytest.mark.parametrize(
    ("turns", "texts"),
    [
        ([turn([1, 2], [3]), turn([1, 2, 3, 4], [5, 6])], [text((1, 2), [3], (4,), [5, 6])]),
        # The template drops 3, the reasoning of the first turn.
        (
            [turn([1, 2], [3, 7]), turn([1, 2, 7, 4], [5]), turn([1, 2, 7, 4, 5, 8], [9])],
            [text((1, 2), [3, 7]), text((1, 2, 7, 4), [5], (8,), [9])],
        ),
        # Two replies to one prompt, of which one continues.
        (
            [turn([1], [2]), turn([1], [3]), turn([1, 3, 4], [5])],
            [text((1,), [2]), text((1,), [3], (4,), [5])],
        ),
    ],
)
def test_turns_are_joined_where_they_continue_earlier_ids(turns, texts):
    for order in itertools.permutations(turns):
        assert join_turns(order) == texts
    assert sum(sum(each.drawn) for each in texts) == sum(len(each.ids) for each in turns)
    assert shared_depth(turns, texts) == len(turns[0].prompt)


def test_a_row_has_a_branch_per_text_whose_tokens_share_the_slot_of_their_reply():
    replies = [
        Reply([5, 6], [-0.5, -0.6], [True, True], "", "stop", [], others=(Text([7, 8], [0.0, -0.8], [False, True]),)),
        Reply([9], [-0.9], [True], "", "stop", []),
    ]
    group, values = Group(0, [1, 2, 3], replies, [True, True]), {"advantages": np.array([[1.0, -1.0]])}
    batch = replies_batch([group], values, [16], (1, 1), pad_id=0, position=None)
    real = slice(0, 7)
    assert batch.inputs[0, 0, real].tolist() == [1, 2, 3, 5, 3, 7, 3]
    assert batch.targets[0, 0, real].tolist()[2:] == [5, 6, 7, 8, 9]
    assert batch.weights[0, 0, real].tolist() == [0, 0, 1, 1, 0, 1, 1]
    assert batch.sequences is not None and batch.slots["advantages"].shape == (1, 1, 2)
    assert batch.sequences[0, 0, real].tolist() == [2, 2, 0, 0, 0, 0, 1] and set(batch.sequences[0, 0, 7:]) == {2}
    np.testing.assert_allclose(batch.token_values["sampler_logps"][0, 0, real][2:], [-0.5, -0.6, 0, -0.8, -0.9])


def ask(engine, rollout, prompt, **fields):
    given = {"max_new_tokens": 8, "sampling": Sampling(temperature=0.0, seed=rollout), "stop_ids": frozenset({9, 10})}
    number = engine.submit(Request(prompt=prompt, **given | fields))
    while engine.busy:
        assert all(step.scored is None for step in engine.step())
    return number


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


def recording(parts, seeds, longest=40):
    rollouts = [Recorded(seed) for seed in seeds]
    engine = rollout_engine(parts, byte_tokenizer(), SETTINGS, longest=longest, most=4)
    return rollouts, RecordingEngine(engine, rollouts, SETTINGS, longest)


def test_a_turn_is_drawn_by_the_settings_of_the_run_and_depends_on_rollout_and_prompt(parts):
    first, second = recording(parts, [1, 2]), recording(parts, [2, 1])
    for (_, engine), order in ((first, (0, 1)), (second, (1, 0))):
        for rollout in order:
            ask(engine, rollout, [65, 66])
            ask(engine, rollout, [65, 66, 70])
            ask(engine, rollout, [65, 66])  # equal prompts draw differently
    turns = [[(each.prompt, each.ids) for each in rollout.turns] for rollout in first[0]]
    assert turns == [[(each.prompt, each.ids) for each in rollout.turns] for rollout in (second[0][1], second[0][0])]
    drawn = [ids for own in turns for _, ids in own]
    assert len({tuple(ids) for ids in drawn}) == 6
    for each in first[0][0].turns:
        logps = jax.nn.log_softmax(full_logits(parts, each.prompt + each.ids) / SETTINGS.temperature)
        expected = [logps[len(each.prompt) - 1 + at, token] for at, token in enumerate(each.ids)]
        np.testing.assert_allclose(each.logps, expected, atol=1e-4)


def test_a_rollout_ends_when_its_texts_fill_the_reply(parts):
    (rollout,), engine = recording(parts, [3])
    ask(engine, 0, [65, 66], max_new_tokens=100, stop_ids=frozenset())
    assert len(rollout.turns[0].ids) == SETTINGS.max_completion_length
    with pytest.raises(ValueError, match="context_length_exceeded"):
        ask(engine, 0, [65, 66, *rollout.turns[0].ids, 70])
    assert rollout.is_cut and rollout.problem is None


@pytest.mark.parametrize(("own", "room"), [(True, 24 - 8 - 1), (False, 24 - 8 - 5)])
def test_earlier_texts_take_room(parts, own, room):
    (rollout,), engine = recording(parts, [4])
    ask(engine, 0, [65, 66], stop_ids=frozenset())
    prompt = [65, 66, *rollout.turns[0].ids, 70] if own else [65, 66, 71, 72, 73, 74, 75]
    ask(engine, 0, prompt, max_new_tokens=100, stop_ids=frozenset())
    assert len(rollout.turns[1].ids) == room


def test_requests_that_cannot_be_answered(parts):
    (rollout,), engine = recording(parts, [5], longest=4)
    with pytest.raises(ValueError, match="seed: not that of a rollout"):
        ask(engine, 1, [65])
    with pytest.raises(ValueError, match="context_length_exceeded"):
        ask(engine, 0, [65] * 5)
    assert rollout.problem == "found 5 tokens in its first prompt, expected at most 4. Raise data.max_length"


def test_a_cancelled_turn_does_not_count(parts):
    (rollout,), engine = recording(parts, [6])
    number = engine.submit(Request(prompt=[65], max_new_tokens=20, sampling=Sampling(temperature=0.0, seed=0)))
    engine.step()
    engine.cancel(number)
    assert not engine.busy and not rollout.turns
    ask(engine, 0, [65])
    assert len(rollout.turns) == 1
