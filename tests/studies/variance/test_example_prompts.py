"""Prompts are chosen by the rule: at random with a seed, and the extremes."""

import numpy as np

from qlora_jax.studies.variance.questions import choose_prompts

DIFFERENCES = np.array([0.0, 0.3, -0.2, 0.9, 0.3, -0.7, 0.0, 0.1])


def indices(**changes):
    settings = {"random": 0, "extreme": 0, "seed": 0} | changes
    return [one.index for one in choose_prompts([("b - a", DIFFERENCES)], **settings)]


def test_extremes_are_the_largest_of_each_sign():
    assert indices(extreme=2) == [3, 1, 5, 2]  # the first of the two with 0.3
    assert indices(extreme=8) == [3, 1, 4, 7, 5, 2]  # a difference of 0 is not an extreme
    rules = {one.index: one.rule for one in choose_prompts([("b - a", DIFFERENCES)], random=0, extreme=1, seed=0)}
    assert rules == {3: "b - a: highest difference (+0.9)", 5: "b - a: lowest difference (-0.7)"}


def test_random_prompts_depend_on_the_seed_alone_and_are_uniform():
    assert indices(random=3, seed=4) == indices(random=3, seed=4)
    counts = np.bincount([index for seed in range(800) for index in indices(random=2, seed=seed)], minlength=8)
    assert np.abs(counts - 200).max() < 60  # 4.9 standard deviations
    assert indices(random=99) == list(range(8))


def test_a_prompt_is_shown_once():
    found = indices(random=8, extreme=2)
    assert sorted(found) == list(range(8))
