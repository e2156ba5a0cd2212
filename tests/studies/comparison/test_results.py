"""Estimates and tests of a study from the outcomes of its runs."""

import numpy as np
import pytest
from scipy import stats

from qlora_jax.studies.comparison.page import page
from qlora_jax.studies.comparison.results import LEVEL, _verdict, summarize
from qlora_jax.studies.comparison.run import Run
from qlora_jax.studies.statistics import MeanEstimate, holm
from tests.studies.comparison.studies import finish, read


def results_of(tmp_path, loss, rows=10, **changes):
    """Results of three methods, whose runs have the mean losses `loss(method, seed)`."""
    study = read(tmp_path, **changes)
    runs = []
    for method, task in study.pairs():
        for seed in study.settings.seeds:
            settings = {"train.seed": seed, "optim.learning_rate": 0.01}
            run = Run(study=study, stage="final", method=method, task=task, settings=settings)
            run.prepare()
            finish(run, loss(method, seed), rows)
            runs.append(run)
    return summarize(study, runs, {pair: 100 for pair in study.pairs()})


def test_a_mean_is_that_of_the_seeds(tmp_path):
    results = results_of(tmp_path, lambda method, seed: 2.0 + seed)
    (first, *_) = results.of_task("numbers")
    outcomes = [one.outcome for one in results.runs if one.run.method == "lora"]
    expected = [sum(outcome["values"]) / sum(outcome["weights"]) for outcome in outcomes]
    assert first.by_seed == pytest.approx(expected) and first.mean.value == pytest.approx(np.mean(expected))
    assert first.over_seeds == pytest.approx(stats.t.interval(0.95, 2, np.mean(expected), stats.sem(expected)))
    assert [one.value for one in results.runs[:3]] == pytest.approx(expected)
    assert (first.seconds, first.steps, first.peak_bytes, first.parameters) == (1.5, 3, 1 << 20, 100)


def test_methods_are_compared_with_the_first_and_corrected(tmp_path):
    base = {"lora": 2.0, "low rank": 1.5, "vectors": 2.0}
    results = results_of(tmp_path, lambda method, seed: base[method] + seed, rows=200)
    better, undecided = results.differences
    assert (better.method, better.reference, better.verdict) == ("low rank", "lora", "better")
    assert better.mean.value == pytest.approx(-0.5, abs=0.02)  # seeds differ by 1, but they are paired
    assert undecided.verdict == "not decided"
    assert [better.p, undecided.p] == holm([better.mean.p, undecided.mean.p])
    assert better.p == pytest.approx(2 * better.mean.p)


def test_all_pairs(tmp_path):
    results = results_of(tmp_path, lambda method, seed: 1.0, pairs="all")
    pairs = [(one.reference, one.method) for one in results.differences]
    assert pairs == [("lora", "low rank"), ("lora", "vectors"), ("low rank", "vectors")]


def test_a_higher_share_is_better(tmp_path):
    from tests.studies.comparison.studies import study_of

    task = study_of(tmp_path)["tasks"]["numbers"] | {"measure": "is exactly the answer"}
    results = results_of(
        tmp_path, lambda method, seed: 0.9 if method == "low rank" else 0.2, rows=200, tasks={"numbers": task}
    )
    assert results.differences[0].verdict == "better"


def test_one_row_decides_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"evaluate: intervals need rows with finite scores \(found 1 of 1,"):
        results_of(tmp_path, lambda method, seed: 1.0, rows=1)


@pytest.mark.parametrize(("p", "verdict"), [(float("nan"), "not decided"), (LEVEL, "not decided"), (0.01, "better")])
def test_only_a_small_p_value_decides(tmp_path, p, verdict):
    (task,) = read(tmp_path).tasks.values()
    assert _verdict(MeanEstimate(-1.0, 0.1, 5.0), p, None, task) == verdict


def test_a_difference_below_the_margin_is_equal(tmp_path):
    """One method differs by less than the margin, the other by as much; both tests are corrected together."""
    from tests.studies.comparison.studies import study_of

    task = study_of(tmp_path)["tasks"]["numbers"] | {"margin": 0.3}
    base = {"lora": 2.0, "low rank": 2.1, "vectors": 2.3}
    results = results_of(tmp_path, lambda method, seed: base[method], rows=200, tasks={"numbers": task})
    near, far = results.differences
    assert (near.verdict, far.verdict) == ("equal", "worse")
    assert [near.p_unequal, far.p_unequal] == holm([near.mean.p_at_least(0.3), far.mean.p_at_least(0.3)])
    text = page(results)
    assert "differences below 0.3 count as equal" in text and "equal (p &lt; 0.0001)" in text


def test_rows_with_other_numbers_of_tokens_cannot_be_paired(tmp_path):
    study = read(tmp_path)
    runs = []
    for rows, (method, task) in zip((10, 11, 10), study.pairs(), strict=True):
        run = Run(study=study, stage="final", method=method, task=task, settings={"train.seed": 0})
        run.prepare()
        finish(run, rows=rows)
        runs.append(run)
    with pytest.raises(
        ValueError, match=r"tasks\.numbers: low rank and lora were scored on rows with different numbers"
    ):
        summarize(study, runs, {pair: 1 for pair in study.pairs()})


def test_no_method_is_found_better_than_itself_more_often_than_the_level(tmp_path):
    """Draws studies without a difference; the share with any difference found is at most 5 %, within noise."""
    from qlora_jax.studies.statistics import crossed_mean

    rng = np.random.default_rng(0)
    found = 0
    for _ in range(400):
        methods = [rng.normal(size=(3, 60)) + rng.normal(size=(1, 60)) for _ in range(5)]
        p = [crossed_mean(method - methods[0]).p for method in methods[1:]]
        found += min(holm(p)) < 0.05
    assert found / 400 < 0.085  # 0.05 and 3 standard errors
