"""Sampled replies: their log-probabilities are those of the draws, and no reply depends on the others."""

import dataclasses

import jax
import numpy as np
import pytest

from qlora_jax.config.rollouts import RolloutArgs
from qlora_jax.rollouts.sampler import draw_seed, sample_replies, sampling_of
from tests.inference.tiny import VOCAB, byte_tokenizer, full_logits, tiny_parts

END = VOCAB - 1
PROMPTS = [[65, 66, 67], [70] * 40, [80, 81]]


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


def replies_of(parts, settings, prompts=PROMPTS, count=5):
    samplings = [sampling_of(settings, draw_seed(3, 7, prompt[0])) for prompt in prompts]
    how = {"count": count, "longest": 40, "most": 15, "stop_ids": frozenset({END, 66, 70})}
    return sample_replies(parts, byte_tokenizer(), prompts, samplings, settings, **how)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_draws(parts, temperature):
    settings = RolloutArgs(num_generations=5, max_completion_length=24, temperature=temperature)
    groups = replies_of(parts, settings)
    assert {reply.end for group in groups for reply in group} == {"stop", "length"}
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for reply in group:
            logps = jax.nn.log_softmax(full_logits(parts, prompt + reply.ids) / temperature)
            expected = [logps[len(prompt) - 1 + at, token] for at, token in enumerate(reply.ids)]
            np.testing.assert_allclose(reply.logps, expected, atol=1e-4)
            assert (reply.ids[-1] in (END, 66, 70)) == (reply.end == "stop") == (not reply.is_cut)
            assert reply.text == byte_tokenizer().decode(reply.ids[:-1] if reply.end == "stop" else reply.ids)


def test_a_reply_depends_on_its_prompt_and_number_alone(parts):
    settings = RolloutArgs(num_generations=5, max_completion_length=24)
    together = replies_of(parts, settings)
    for prompt, group in zip(PROMPTS, together, strict=True):
        assert [replies_of(parts, settings, [prompt], count=2)[0][:2]] == [group[:2]]
    assert len({tuple(reply.ids) for reply in together[1]}) > 1


def test_a_small_cache_changes_no_reply(parts):
    settings = RolloutArgs(num_generations=5, max_completion_length=24)
    small = dataclasses.replace(settings, cache="20KiB")
    assert replies_of(parts, small) == replies_of(parts, settings)


def test_sampling_can_be_ended(parts):
    class Ended(Exception):
        pass

    def go_on(done: int) -> None:
        if done >= 2:
            raise Ended

    settings = RolloutArgs(num_generations=5, max_completion_length=24)
    with pytest.raises(Ended):
        sample_replies(
            parts,
            byte_tokenizer(),
            PROMPTS,
            [sampling_of(settings, 1)] * 3,
            settings,
            count=5,
            longest=40,
            most=15,
            stop_ids=frozenset({END}),
            go_on=go_on,
        )
