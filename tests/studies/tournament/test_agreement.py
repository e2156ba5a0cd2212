"""Agreement of judges against statsmodels and SciPy on their own tables, and against published figures."""

import builtins
import itertools

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats import inter_rater

from qlora_jax.studies.tournament.agreement import agreement, cohen_kappa, fleiss_kappa, rank_correlations, verdicts_of
from qlora_jax.studies.tournament.matches import Game
from qlora_jax.studies.tournament.ratings.elo import elo_ratings

SYSTEMS = ("a", "b", "c", "d")


def judged(judge, rng, noise, prompts=30):
    """Comparisons of systems in order of quality, each in both orders, by a judge who errs."""
    found = []
    for prompt in range(prompts):
        for one, other in itertools.permutations(SYSTEMS, 2):
            lead = SYSTEMS.index(other) - SYSTEMS.index(one) + rng.normal() * noise
            outcome = 1.0 if lead > 0.5 else 0.0 if lead < -0.5 else 0.5
            found.append(Game(str(prompt), one, other, outcome, judge))
    return found


@pytest.fixture(scope="module")
def three():
    rng = np.random.default_rng(0)
    return {name: judged(name, rng, noise) for name, noise in (("x", 1.0), ("y", 2.0), ("z", 6.0))}


def test_kappas_and_correlations_are_those_of_statsmodels_and_scipy(three):
    found = agreement([one for judge in three.values() for one in judge])
    verdicts = {name: verdicts_of(judge) for name, judge in three.items()}
    items = sorted(verdicts["x"])
    elo = {
        name: {rating.system: rating.rating for rating in elo_ratings(judge, orderings=1_000).systems}
        for name, judge in three.items()
    }
    assert found.judges == ["x", "y", "z"] and found.items == len(items) == 30 * 6
    for pair in found.pairs:
        columns = np.array([[verdicts[pair.first][item], verdicts[pair.second][item]] for item in items])
        table, _ = inter_rater.to_table(columns, bins=3)
        theirs = inter_rater.cohens_kappa(table)
        assert pair.cohen_kappa is not None and pair.cohen_kappa.interval is not None
        assert pair.cohen_kappa.value == pytest.approx(theirs.kappa, abs=1e-12)
        # Items are nearly independent here, so the interval over prompts is about that of the asymptotic variance.
        low, high = pair.cohen_kappa.interval
        assert (high - low) == pytest.approx(2 * 1.96 * theirs.std_kappa, rel=0.25)
        ours, others = ([elo[name][system] for system in SYSTEMS] for name in (pair.first, pair.second))
        assert pair.spearman == pytest.approx(stats.spearmanr(ours, others).statistic, abs=1e-12)
        assert pair.kendall == pytest.approx(stats.kendalltau(ours, others).statistic, abs=1e-12)
    ratings = np.array([[verdicts[name][item] for name in "xyz"] for item in items])
    counts, _ = inter_rater.aggregate_raters(ratings)
    assert found.fleiss_kappa is not None and found.fleiss_kappa.interval is not None
    assert found.fleiss_kappa.value == pytest.approx(inter_rater.fleiss_kappa(counts), abs=1e-12)
    assert found.fleiss_kappa.interval[0] < found.fleiss_kappa.value < found.fleiss_kappa.interval[1]


def test_cohen_of_a_known_table():
    # By hand: agreement 0.8, chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5, kappa 0.6.
    items = [(str(number), "a", "b") for number in range(100)]
    a = [0] * 50 + [2] * 50
    b = [0] * 45 + [2] * 5 + [0] * 15 + [2] * 35
    found = cohen_kappa(dict(zip(items, a, strict=True)), dict(zip(items, b, strict=True)), items)
    assert found is not None and found.value == pytest.approx(0.6)


def test_both_orders_are_one_verdict():
    def pair(forward, backward):
        return verdicts_of([Game("p", "a", "b", forward, "j"), Game("p", "b", "a", backward, "j")])

    assert pair(1.0, 0.0) == {("p", "a", "b"): 0}
    assert pair(0.0, 1.0) == {("p", "a", "b"): 2}
    assert pair(1.0, 1.0) == {("p", "a", "b"): 1}  # the first reply, whichever it is
    assert pair(1.0, 0.5) == {("p", "a", "b"): 0}


def test_what_is_not_defined_is_none():
    same = {(str(number), "a", "b"): 0 for number in range(5)}
    assert cohen_kappa(same, same, sorted(same)) is None
    assert fleiss_kappa([same, same], sorted(same)) is None
    assert cohen_kappa(same, {}, []) is None
    assert rank_correlations({"a": 1.0, "b": 2.0}, {"a": 1.0, "c": 0.0}) is None
    assert rank_correlations({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0}) is None
    assert rank_correlations({"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}) == pytest.approx((1.0, 1.0))
    one_prompt = {("p", "a", "b"): 0, ("p", "a", "c"): 2, ("p", "b", "c"): 0}
    kappa = cohen_kappa(one_prompt, one_prompt, sorted(one_prompt))
    assert kappa is not None and kappa.value == 1.0 and kappa.interval is None


def test_judges_without_a_common_item(three):
    elsewhere = [one._replace(prompt=f"other {one.prompt}") for one in three["y"]]
    found = agreement([*three["x"], *elsewhere])
    (pair,) = found.pairs
    assert found.items == pair.items == 0 and found.fleiss_kappa is None and pair.cohen_kappa is None
    assert pair.spearman == 1.0


def test_one_judge_has_nobody_to_agree_with(three):
    with pytest.raises(ValueError, match=r"judges: agreement is between judges \(found 1, expected 2 or more"):
        agreement(three["x"])


def test_a_missing_statsmodels_is_named(three, monkeypatch):
    def without(name, *args, importing=builtins.__import__, **rest):
        if name.startswith("statsmodels"):
            raise ImportError(name)
        return importing(name, *args, **rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"Run pip install 'qlora-jax\[study\]'"):
        agreement([*three["x"], *three["y"]])
