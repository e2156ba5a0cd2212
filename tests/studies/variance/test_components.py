"""Variance components against statsmodels' REML, published figures, and simulated tables."""

import numpy as np
import pytest

from qlora_jax.studies.variance.analysis import difference_components, variance_components

SDS = {"prompts": 1.5, "levels": 0.6, "residual": 1.0}


def table(rng, prompts, levels, mean=0.0):
    effects = rng.normal(0, SDS["prompts"], (prompts, 1)) + rng.normal(0, SDS["levels"], (1, levels))
    return mean + effects + rng.normal(0, SDS["residual"], (prompts, levels))


@pytest.mark.slow
def test_positive_estimates_are_those_of_reml():
    import statsmodels.api as sm

    scores = table(np.random.default_rng(1), 8, 4)
    prompt, level = (index.ravel() for index in np.indices(scores.shape))
    # One group holds everything, so that prompts and levels are crossed.
    groups = {"prompts": np.eye(8)[prompt], "levels": np.eye(4)[level]}
    variances = sm.regression.mixed_linear_model.VCSpec(
        names=[*groups],
        colnames=[[[str(n) for n in range(one.shape[1])]] for one in groups.values()],
        mats=[[one] for one in groups.values()],
    )
    model = sm.MixedLM(scores.ravel(), np.ones((32, 1)), np.zeros(32), exog_vc=variances)
    fit = model.fit(reml=True, method="bfgs", gtol=1e-7)
    found = variance_components(scores)
    theirs = dict(zip(groups, fit.vcomp, strict=True))
    assert found.prompts.value == pytest.approx(theirs["prompts"], rel=1e-5)
    assert found.levels.value == pytest.approx(theirs["levels"], rel=1e-5)
    assert found.residual.value == pytest.approx(fit.scale, rel=1e-5)


def test_estimates_are_unbiased():
    rng = np.random.default_rng(2)
    found = [variance_components(table(rng, 20, 5)) for _ in range(2_000)]
    for name, sd in SDS.items():
        values = np.array([getattr(one, name).value for one in found])
        assert values.mean() == pytest.approx(sd**2, abs=4 * values.std() / np.sqrt(len(values)))


@pytest.mark.slow
def test_95_percent_intervals_cover_the_truth():
    rng, true_mean = np.random.default_rng(3), 0.7
    hits = {**dict.fromkeys(SDS, 0), "mean": 0, "model": 0}
    simulations = 2_000
    for _ in range(simulations):
        base = rng.normal(size=(30, 4))
        found = difference_components(base, base + table(rng, 30, 4, true_mean))
        for name, sd in SDS.items():
            low, high = getattr(found, name).interval
            hits[name] += low <= sd**2 <= high
        hits["mean"] += found.mean.interval[0] <= true_mean <= found.mean.interval[1]
        hits["model"] += found.model.interval[0] <= true_mean**2 <= found.model.interval[1]
    shares = {name: count / simulations for name, count in hits.items()}
    assert all(0.93 < share < 0.975 for share in shares.values()), shares


def test_no_effect_gives_an_interval_that_begins_at_zero():
    rng = np.random.default_rng(4)
    starts = [variance_components(rng.normal(size=(20, 4))).levels.interval[0] for _ in range(500)]
    assert np.mean(np.array(starts) == 0) == pytest.approx(0.975, abs=0.03)


def test_parts_of_a_difference_are_the_squares_of_a_table_without_noise():
    # Prompts add 0, 3 and levels 0, 1: means 2; mean squares by hand.
    first = np.zeros((2, 2))
    second = np.array([[0.0, 1.0], [3.0, 4.0]])
    found = difference_components(first, second)
    assert found.mean.value == 2.0
    assert (found.prompts.value, found.levels.value, found.residual.value) == (4.5, 0.5, 0.0)
    assert found.model.value == pytest.approx(4.0 - (4.5 / 2 + 0.5 / 2))


def test_equal_models_have_no_parts():
    found = difference_components(np.ones((3, 2)), np.ones((3, 2)))
    assert {found.model.value, found.prompts.value, found.levels.value, found.residual.value} == {0.0}
    assert found.prompts.interval == found.residual.interval == (0.0, 0.0)
