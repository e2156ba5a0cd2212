"""A trained reward model scores replies as `score` does."""

import numpy as np
import pytest

import qlora_jax as q
from qlora_jax.config.rewards import RewardArgs
from qlora_jax.evaluation.heads.reward_model import open_scorer
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.rewards.functions import Replies, RewardFunctions
from tests.inference.head_run import write_head_run


def test_rewards_are_those_of_the_head(tmp_path):
    run = write_head_run(tmp_path, TrainedHead(objective="reward"))
    prompts = ["say sun", "say moon"]
    chats = [[{"role": "user", "content": text}] for text in prompts]
    replies = [[{"role": "assistant", "content": text}] for text in ("sun", "a star")]
    args = RewardArgs(functions=["model"], run=str(run), reward_weights=[2.0])
    given = Replies(prompts=chats, completions=replies, completion_ids=[[1], [2]], columns={}, labels=["a", "b"])
    with RewardFunctions(args, []) as functions:
        found = functions.score(given).rewards_NF[:, 0]
    model, tokenizer = q.load(str(run))
    rows = [{"messages": [*chat, *reply]} for chat, reply in zip(chats, replies, strict=True)]
    np.testing.assert_array_equal(found, q.score(model, tokenizer, rows))
    assert found[0] != found[1]
    rows = [{"prompt": prompt, "completion": "x"} for prompt in prompts]
    np.testing.assert_array_equal(open_scorer(str(run))(prompts, ["x", "x"]), q.score(model, tokenizer, rows))


def test_a_run_of_another_objective_is_refused(tmp_path):
    run = write_head_run(tmp_path, TrainedHead(objective="regression"))
    with pytest.raises(ValueError, match=r"rewards.run: .* gives no rewards .found objective=regression, expected obj"):
        open_scorer(str(run))
