"""Paired tests between two models from the harness' values of each document."""

import math

import numpy as np
import pytest

from qlora_jax.evaluation.lm_eval.task import LmEvalTask, TaskResults, by_document, compare_metric
from qlora_jax.measures.statistics import mcnemar, paired_bootstrap, paired_bootstrap_of
from tests.inference.tiny import byte_tokenizer


def sample(doc: int, metric_filter: str = "none", **metrics):
    return {"doc_id": doc, "filter": metric_filter, "metrics": [*metrics], "doc": {"question": "?"}, **metrics}


def with_weights(values) -> np.ndarray:
    return np.array([(value, 1.0) for value in values])


def test_documents_come_in_order_by_metric_and_filter():
    samples = [
        sample(2, acc=True, word_perplexity=(-9.0, 3), f1=["a"]),
        sample(0, acc=0.0, word_perplexity=(-4.0, 2), f1=["b"]),
        sample(0, "strict", acc=1),
    ]
    found = {key: each.tolist() for key, each in by_document(samples).items()}
    assert found == {
        "acc,none": [[0, 1], [1, 1]],
        "word_perplexity,none": [[-4, 2], [-9, 3]],
        "acc,strict": [[1, 1]],
    }


def test_right_and_wrong_are_compared_by_mcnemar():
    before, after = np.arange(20) < 8, np.arange(20) % 2 == 0
    values = before.mean(), after.mean()
    change = compare_metric("t: acc", "acc,none", "share", values, (with_weights(before), with_weights(after)))
    assert change.p == mcnemar(before, after) and change.interval is None
    assert change.difference == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("metric", "figure"),
    [
        ("byte_perplexity", lambda nll: math.exp(nll)),
        ("bits_per_byte", lambda nll: nll / math.log(2)),
        ("brier", lambda nll: -nll),
    ],
)
def test_other_metrics_by_bootstrap_with_the_harness_figure_of_a_mean(metric, figure):
    rng = np.random.default_rng(1)
    weights = rng.integers(5, 15, 60).astype(float)
    nll = rng.normal(2.0, 0.5, 60) * weights
    before, after = (np.stack([-each, weights], axis=1) for each in (nll, 0.9 * nll))
    values = tuple(figure(-float(x[:, 0].sum() / weights.sum())) for x in (before, after))
    change = compare_metric("t", f"{metric},none", "number", values, (before, after))
    assert change.p is None and change.interval is not None
    low, high = change.interval
    assert low < change.difference == values[1] - values[0] < high
    assert low * high > 0  # every document has changed the same way


def test_a_figure_that_is_made_otherwise_has_no_test():
    documents = with_weights([0.0, 1.0, 1.0])
    for pair, values in [((documents, documents), (0.8, 0.8)), ((None, None), (2 / 3, 2 / 3))]:
        change = compare_metric("t: f1", "f1,none", "number", values, pair)
        assert (change.difference, change.p, change.interval) == (0, None, None)


def test_with_no_curve_it_is_the_bootstrap_of_a_difference_of_losses():
    rng = np.random.default_rng(2)
    a, b, tokens = rng.normal(1, 1, 50), rng.normal(1, 1, 50), rng.integers(1, 9, 50)
    pairs = [np.stack([each, tokens], axis=1) for each in (a, b)]
    assert paired_bootstrap_of(*pairs, lambda mean: mean) == pytest.approx(paired_bootstrap(a, b, tokens))


def test_the_task_pairs_documents_of_the_same_metric():
    task = LmEvalTask(tasks=["t"], folder=None, limit=None, max_positions=9, tokenizer=byte_tokenizer())
    right = [np.array(each, bool) for each in ([1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1])]
    results = [
        {"t": TaskResults({"acc,none": each.mean(), "acc_stderr,none": 0.1}, {"acc,none": with_weights(each)})}
        for each in right
    ]
    (change,) = task.compare(*results)
    assert (change.name, change.kind, change.p) == ("t: acc", "share", mcnemar(*right))
    (metric,) = task.metrics(results[0])
    assert metric.interval == pytest.approx((0.5 - 0.196, 0.5 + 0.196), abs=1e-3)
