"""A trained reward model scores replies as `score` does."""

import numpy as np
import pytest

import qlora_jax as q
from qlora_jax.config.rewards import RewardArgs
from qlora_jax.evaluation.heads.reward_model import open_scorer, reward_model_bytes
from qlora_jax.io.pretrained import apply_adapter, load_base, open_finetuned
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.rewards.functions import Replies, RewardFunctions
from qlora_jax.sharding import part_bytes
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


def test_a_plan_counts_the_reward_model_in_both_phases(tmp_path):
    run = write_head_run(tmp_path, TrainedHead(objective="reward"))
    opened = open_finetuned(run)
    assert opened.run is not None
    loaded = part_bytes(apply_adapter(load_base(opened, opened.args), opened.run))
    assert reward_model_bytes(str(run)) == loaded
    settings = {"objective": "grpo", "data.max_length": 64, "rollouts.max_completion_length": 16, "lora.rank": 4}
    with_model = {"rewards.functions": ["model"], "rewards.run": str(run)}
    without, planned = (
        q.make_plan(str(opened.source.path), card="cpu", config=settings | more) for more in ({}, with_model)
    )
    assert planned.needed_bytes - without.needed_bytes == loaded
    assert planned.rollouts is not None and without.rollouts is not None
    assert planned.rollouts.total - without.rollouts.total == loaded
