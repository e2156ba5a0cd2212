"""Decoding with a cache equals decoding by the full forward pass, whatever the lengths, neighbours and chunks."""

import dataclasses

import numpy as np
import pytest

from qlora_jax.inference.decode import generate, stream
from qlora_jax.inference.engine.model_calls import ROW_COUNTS, advance
from qlora_jax.inference.engine.token_sampler import Row, row_settings, row_state, sample_tokens
from qlora_jax.inference.sampling_params import Sampling
from tests.inference.tiny import VOCAB, full_logits, tiny_parts

GREEDY = Sampling()
DRAWN = Sampling(temperature=1.3, top_k=50, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def naive(parts, prompt: list[int], count: int, sampling: Sampling) -> list[int]:
    """Token by token, the whole text through the model each time."""
    ids = list(prompt)
    for _ in range(count):
        rows = [Row(sampling, 0, prompt, ids[len(prompt) :])]
        logits_1V = full_logits(parts, ids)[-1:]
        choice, _ = sample_tokens(logits_1V, row_settings(rows, VOCAB), row_state(rows, VOCAB))
        ids.append(int(choice.token_R[0]))
    return ids[len(prompt) :]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_ragged_prompts_get_what_the_full_forward_pass_gives(parts, sampling):
    prompts = prompts_of(3, 64, 41)  # within one chunk, exactly one, and between
    replies = generate(parts, prompts, sampling=sampling, max_new_tokens=6, stop_ids=[])
    assert [reply.ids for reply in replies] == [naive(parts, prompt, 6, sampling) for prompt in prompts]
    assert [reply.end for reply in replies] == ["length"] * 3


def test_prompts_of_several_chunks(parts):
    prompts = prompts_of(590, 512, 513, 70)
    replies = generate(parts, prompts, sampling=GREEDY, max_new_tokens=2, stop_ids=[])
    assert [reply.ids for reply in replies] == [naive(parts, prompt, 2, GREEDY) for prompt in prompts]


def test_a_row_does_not_depend_on_its_neighbours(parts):
    prompts = prompts_of(9, 30, 17, 5)
    together = generate(parts, prompts, sampling=DRAWN, max_new_tokens=8, stop_ids=[])
    alone = [generate(parts, [prompt], sampling=DRAWN, max_new_tokens=8, stop_ids=[])[0] for prompt in prompts]
    assert together == alone


def test_more_prompts_than_a_batch_come_back_in_order(parts):
    prompts = prompts_of(*range(20, 1, -1))
    assert len(prompts) > ROW_COUNTS[-1]
    replies = generate(parts, prompts, sampling=GREEDY, max_new_tokens=2, stop_ids=[])
    for row in (0, 9, 18):
        assert replies[row].ids == naive(parts, prompts[row], 2, GREEDY)


def test_repeated_prompts_draw_anew_and_another_seed_draws_otherwise(parts):
    prompt, neighbour = prompts_of(10, 7)
    first, _, second = generate(parts, [prompt, neighbour, prompt], sampling=DRAWN, max_new_tokens=8, stop_ids=[])
    (alone,) = generate(parts, [prompt], sampling=DRAWN, max_new_tokens=8, stop_ids=[])
    other_seed = Sampling(temperature=1.3, top_k=50, top_p=0.9, seed=4)
    (other,) = generate(parts, [prompt], sampling=other_seed, max_new_tokens=8, stop_ids=[])
    assert first == alone
    assert len({tuple(reply.ids) for reply in (first, second, other)}) == 3


def test_a_stop_token_ends_its_row_alone_and_is_not_part_of_it(parts):
    prompts = prompts_of(4, 12, 33)
    whole = [naive(parts, prompt, 6, GREEDY) for prompt in prompts]
    stop = whole[1][2]
    replies = generate(parts, prompts, sampling=GREEDY, max_new_tokens=6, stop_ids=[stop])
    for ids, reply in zip(whole, replies, strict=True):
        until = ids.index(stop) if stop in ids else None
        assert reply.ids == ids[:until]
        assert reply.end == ("length" if until is None else "stop")
    assert replies[1].end == "stop"


def test_a_full_context_ends_the_reply_and_says_so():
    parts = tiny_parts(max_positions=90)  # fewer slots than the padded prompt of 256 takes
    prompts = prompts_of(85, 70)
    long, short = generate(parts, prompts, sampling=GREEDY, max_new_tokens=9, stop_ids=[])
    assert (long.end, long.ids) == ("context", naive(parts, prompts[0], 5, GREEDY))
    assert (short.end, short.ids) == ("length", naive(parts, prompts[1], 9, GREEDY))


def test_steps_come_one_by_one(parts):
    (prompt,) = prompts_of(5)
    steps = stream(parts, [prompt], sampling=GREEDY, max_new_tokens=3, stop_ids=[])
    tokens = naive(parts, prompt, 3, GREEDY)
    assert [(step.token, step.end) for step in steps] == [(tokens[0], None), (tokens[1], None), (tokens[2], "length")]


def test_bad_prompts_are_told_all_at_once(parts):
    with pytest.raises(
        ValueError, match=r"max_new_tokens: found 0(?s:.*)prompt 1: empty(?s:.*)prompt 2: too long \(found 600 tokens"
    ):
        generate(parts, [[1], [], [1] * 600], sampling=GREEDY, max_new_tokens=0, stop_ids=[])


@pytest.mark.parametrize("outside", [VOCAB, -1])
def test_ids_without_a_row_are_errors(parts, outside: int):
    with pytest.raises(
        ValueError, match=rf"prompt 1: an id has no row in the embedding .found ids .*expected 0 to {VOCAB - 1}"
    ):
        generate(parts, [[1], [2, outside]], sampling=GREEDY, max_new_tokens=1, stop_ids=[])


def test_compilations_are_as_many_as_stated(parts):
    advance.plain.clear_cache()
    for seed in range(2):
        for length in (3, 64, 65, 200, 256, 300, 511):
            sampling = dataclasses.replace(DRAWN, seed=seed)  # another seed compiles nothing
            generate(parts, prompts_of(length, seed=seed), sampling=sampling, max_new_tokens=10, stop_ids=range(VOCAB))
    assert advance.plain._cache_size() <= 20
