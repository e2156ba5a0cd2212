"""Further draws for prompts whose replies have equal rewards, against fixed draws."""

import numpy as np

from qlora_jax.rewards.functions import RewardProblem, RewardTable
from qlora_jax.rollouts.advantages import group_advantages
from qlora_jax.rollouts.dynamic_sampling import Draw, draw_with_signal

NAN = float("nan")
DRAWS = {  # rewards of two replies, by prompt and number of the draw
    0: [(0, 1)],
    1: [(0, 0), (1, 1), (0, 1)],
    2: [(1, 1), (NAN, 2), (2, 2)],
    3: [(NAN, NAN), (3, 0)],
}


def has_signal(rewards_NF):
    return group_advantages(rewards_NF, num_generations=2).has_signal_P


def redrawn(most):
    asked = []

    def draw(chosen, number):
        asked.append([*chosen])
        rewards = np.array([DRAWS[prompt][number] for prompt in chosen], float).reshape(-1, 1)
        problems = [RewardProblem(int(row), "f", "raised") for row in np.flatnonzero(np.isnan(rewards))]
        groups, table = [f"{prompt}, draw {number}" for prompt in chosen], RewardTable(rewards, ("f",), problems, {})
        return Draw(groups=groups, table=table, sampling=2.0, scoring=0.5, tokens=10)

    return draw_with_signal(draw, len(DRAWS), most, has_signal), asked


def test_prompts_without_signal_are_drawn_again():
    found, asked = redrawn(2)
    assert asked == [[0, 1, 2, 3], [1, 2, 3], [1, 2]]
    assert found.draw.groups == ["0, draw 0", "1, draw 2", "2, draw 0", "3, draw 1"]
    np.testing.assert_array_equal(found.draw.table.rewards_NF.ravel(), [0, 1, 0, 1, 1, 1, 3, 0])
    np.testing.assert_array_equal(found.first_NF.ravel(), [0, 1, 0, 0, 1, 1, NAN, NAN])
    assert found.draws_P.tolist() == [1, 3, 3, 2]
    assert [problem.row for problem in found.draw.table.problems] == [6, 7, 4]  # all failures, by their prompts
    assert (found.draw.sampling, found.draw.scoring, found.draw.tokens) == (6.0, 1.5, 30)


def test_no_further_draw_without_the_setting():
    found, asked = redrawn(0)
    assert asked == [[0, 1, 2, 3]] and found.draws_P.tolist() == [1, 1, 1, 1]
    np.testing.assert_array_equal(found.draw.table.rewards_NF, found.first_NF)
