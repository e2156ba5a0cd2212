"""Metrics of preferences, compared with plain loops over the answers, and with scipy's intervals."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from qlora_jax.measures.statistics import wilson_interval
from qlora_jax.objectives.dpo import DPO
from qlora_jax.objectives.kto import KTO
from qlora_jax.objectives.orpo import ORPO
from qlora_jax.objectives.sequences import ComparedLogps, SequenceLogps
from qlora_jax.training.metrics.step_metrics import means, means_with_intervals, preference_values

BETA = 0.3


def outputs_of(shape, seed=0):
    rng = np.random.default_rng(seed)
    logps, reference = -rng.uniform(1, 30, (2, *shape)).astype(np.float32)
    tokens = rng.integers(1, 9, shape).astype(np.float32)
    return SequenceLogps(jnp.array(logps), jnp.array(tokens)), logps, tokens, reference


def test_pairs_of_a_packed_step_are_those_of_a_loop():
    outputs, logps, tokens, reference = outputs_of((2, 3, 6))
    present = np.zeros((2, 3, 6), np.float32)
    pairs = [(0, 0, 0), (0, 0, 2), (0, 2, 0), (1, 1, 0), (1, 1, 2), (1, 1, 4)]
    for a, b, s in pairs:
        present[a, b, s : s + 2] = 1
    tied = (1, 1, 2)
    reference[1, 1, 2:4] = logps[1, 1, 2:4]  # both rewards are 0
    found = means(preference_values(DPO(beta=BETA), outputs, {"present": present, "reference": reference}))
    ratio = logps - reference
    chosen, rejected = ([BETA * ratio[a, b, s + place] for a, b, s in pairs] for place in (0, 1))
    right = [0.5 if pair == tied else float(c > r) for pair, c, r in zip(pairs, chosen, rejected, strict=True)]
    both = [(a, b, s + place) for a, b, s in pairs for place in (0, 1)]
    expected = {
        "rewards_chosen": np.mean(chosen),
        "rewards_rejected": np.mean(rejected),
        "rewards_accuracy": np.mean(right),
        "rewards_margin": np.mean(chosen) - np.mean(rejected),
        "log_ratio_per_token": sum(ratio[at] for at in both) / sum(tokens[at] for at in both),
        "logp_chosen": sum(logps[at] for at in pairs) / sum(tokens[at] for at in pairs),
        "logp_rejected": sum(logps[a, b, s + 1] for a, b, s in pairs) / sum(tokens[a, b, s + 1] for a, b, s in pairs),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_objectives_without_a_reference_have_rewards_and_no_kl():
    outputs, logps, tokens, _ = outputs_of((5, 2))
    found = means(preference_values(ORPO(beta=BETA), outputs, {"present": np.ones((5, 2), np.float32)}))
    assert found["rewards_chosen"] == pytest.approx(BETA * (logps / tokens)[:, 0].mean(), rel=1e-5)
    assert "log_ratio_per_token" not in found


def test_answers_with_labels_are_counted_by_label():
    outputs, logps, tokens, reference = outputs_of((7, 2))
    labels = np.array([1, 0, 1, 1, 0, 1, 0], np.float32)
    arrays = {
        "present": np.ones((7, 2), np.float32),
        "reference": reference,
        "labels": np.stack([labels, labels], axis=1),
    }
    values = preference_values(KTO(beta=BETA), outputs, arrays)
    found, ratio = means(values), logps - reference
    good, bad = labels == 1, labels == 0
    assert found["rewards_chosen"] == pytest.approx(BETA * ratio[good, 0].mean(), rel=1e-5)
    assert found["rewards_margin"] == pytest.approx(BETA * (ratio[good, 0].mean() - ratio[bad, 0].mean()), rel=1e-5)
    assert found["logp_rejected"] == pytest.approx(logps[bad, 0].sum() / tokens[bad, 0].sum(), rel=1e-5)
    assert found["log_ratio_per_token"] == pytest.approx(ratio[:, 0].sum() / tokens[:, 0].sum(), rel=1e-5)
    assert found["kto_kl"] == pytest.approx(max(0.0, ratio[:, 1].mean()), rel=1e-5)
    intervals = means_with_intervals(values)
    assert all(math.isfinite(value) for value in intervals.values())
    only_good = arrays | {"labels": np.ones((7, 2), np.float32)}
    found = means(preference_values(KTO(beta=BETA), outputs, only_good))
    assert "rewards_rejected" not in found and "rewards_margin" not in found


def test_divergences_are_averaged_over_the_tokens_of_each_answer():
    outputs, _, tokens, reference = outputs_of((40, 2))
    kl = np.random.default_rng(2).uniform(0, 3, (40, 2)).astype(np.float32)
    compared = ComparedLogps(outputs.logps_BS, outputs.tokens_BS, jnp.array(kl), jnp.array(reference))
    arrays = {"present": np.ones((40, 2), np.float32), "reference": reference}
    found = means_with_intervals(preference_values(DPO(beta=BETA), compared, arrays))
    for place, answer in enumerate(("chosen", "rejected")):
        assert found[f"eval_kl_{answer}"] == pytest.approx(kl[:, place].sum() / tokens[:, place].sum(), rel=1e-5)
        assert 0 < found[f"eval_kl_{answer}_low"] < found[f"eval_kl_{answer}"] < found[f"eval_kl_{answer}_high"]
    labels = np.tile(np.arange(40)[:, None] % 3 == 0, 2).astype(np.float32)
    found = means(preference_values(KTO(beta=BETA), compared, arrays | {"labels": labels}))
    good = labels[:, 0] == 1
    assert found["kl_chosen"] == pytest.approx(kl[good, 0].sum() / tokens[good, 0].sum(), rel=1e-5)
    assert found["kl_rejected"] == pytest.approx(kl[~good, 0].sum() / tokens[~good, 0].sum(), rel=1e-5)


def test_intervals_are_those_of_the_normal_approximation():
    outputs, _, _, reference = outputs_of((400, 2), seed=1)
    arrays = {"present": np.ones((400, 2), np.float32), "reference": reference}
    values = preference_values(DPO(beta=BETA), outputs, arrays)
    found = means_with_intervals(values)
    margins = values["rewards_margin"].values
    low, high = scipy.stats.norm.interval(0.95, margins.mean(), scipy.stats.sem(margins))
    half = (high - low) / 2
    ends = [found["eval_rewards_margin_low"], found["eval_rewards_margin_high"]]
    np.testing.assert_allclose(ends, [low, high], atol=0.1 * half)
    right = int(values["rewards_accuracy"].values.sum())
    expected = wilson_interval(right, 400)
    assert (found["eval_rewards_accuracy_low"], found["eval_rewards_accuracy_high"]) == expected
