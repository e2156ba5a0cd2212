"""Evaluation and decoding with experts in host memory: equal results, and programs in which their copies hide."""

import dataclasses

import numpy as np
import pytest

from pallas_kernels import aot
from pallas_kernels.devices import Device
from qlora_jax.config import LoraArgs
from qlora_jax.evaluation import loglikelihood
from qlora_jax.evaluation.loglikelihood import score_rows
from qlora_jax.inference import lowering
from qlora_jax.inference.decode import generate
from qlora_jax.inference.sampling_params import GREEDY
from qlora_jax.models import partition
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelFunction, has_experts_on_host
from qlora_jax.training.step_spec import StepSpec
from tests.marks import EXHAUSTIVE
from tests.models.mixtures import random_mixture
from tests.models.test_offloaded_experts import CONFIG, LARGER, LORA, OFFLOADED, ON_CARD, on_host
from tests.models.test_prefetched_layers import products_meanwhile

VOCABULARY = CONFIG["vocab_size"]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_scores_and_replies_equal_those_of_experts_on_the_device():
    parts = random_mixture(CONFIG, LORA, dataclasses.replace(OFFLOADED, experts_on_host=False))
    away, rng = on_host(parts), np.random.default_rng(0)
    assert has_experts_on_host(away) and not has_experts_on_host(parts)
    rows = [(rng.integers(0, VOCABULARY, 9, np.int32), np.ones(9, bool)) for _ in range(2)]
    found, expected = (score_rows(each, rows).nll for each in (away, parts))
    np.testing.assert_array_equal(found, expected)
    prompts = [ids.tolist() for ids, _ in rows]
    found, expected = (
        generate(each, prompts, sampling=GREEDY, max_new_tokens=4, stop_ids=[]) for each in (away, parts)
    )
    assert found == expected


def test_a_card_and_its_host_memory_choose_the_options(monkeypatch):
    """On a CPU, and with experts on the device, nothing is fetched ahead."""
    function = ModelFunction(lambda parts: parts)
    shapes = {
        away: StepSpec(
            model=model_config(CONFIG),
            weights=dataclasses.replace(OFFLOADED, experts_on_host=away),
            lora=LORA,
            batch=(1, 1, 16),
        ).arrays.parts
        for away in (True, False)
    }
    assert function.jitted(shapes[True]) is function.plain
    monkeypatch.setattr(partition, "target_device", lambda: Device(platform="gpu", kind="a card"))
    assert function.jitted(shapes[True]) is function.jitted((shapes[False], shapes[True])) is function.prefetching
    assert function.jitted(shapes[False]) is function.plain


@pytest.mark.parametrize("card", [pytest.param("rtx4090", marks=EXHAUSTIVE)])  # XLA's own order is this on an H100
@pytest.mark.parametrize("program", ["score_tokens", "advance"])
def test_copies_hide_behind_the_products_of_the_layer_before(card, program, monkeypatch):
    if problem := aot.problem():
        pytest.skip(f"no compiling for absent cards: {problem}")
    weights = dataclasses.replace(ON_CARD, experts_on_host=True)
    parts = StepSpec(
        model=model_config(LARGER), weights=weights, lora=LoraArgs(rank=16), batch=(1, 1, 512)
    ).arrays.parts
    compiled = {}

    def compile_for(_, function, parts, inputs, extra_bytes=0, **static):
        if function.__name__ == program:
            compiled[program] = aot.compile_for(card, function, parts, *inputs, mesh=None, **static)

    ids = np.arange(200, dtype=np.int32)
    for module in (lowering, loglikelihood):
        monkeypatch.setattr(module, "lower_program", compile_for)
    scoring, decoding = (
        loglikelihood.lower_scoring(parts, [(ids, ids > 0)]),
        lowering.lower_decoding(parts, [ids.tolist()], 8),
    )
    list(scoring if program == "score_tokens" else decoding)
    assert products_meanwhile(compiled[program].text) == [[1] * 6]
