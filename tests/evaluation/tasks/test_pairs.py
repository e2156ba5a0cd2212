"""Preference pairs are scored by likelihood, and by reward relative to a reference."""

import json

import numpy as np
import pytest

from qlora_jax.evaluation.divergence import compare_given_tokens
from qlora_jax.evaluation.loglikelihood import batches_of, score_tokens, scoring_inputs
from qlora_jax.evaluation.score import ScoredModel, score_models
from qlora_jax.evaluation.settings import TaskArgs
from qlora_jax.evaluation.task import TaskContext
from qlora_jax.evaluation.tasks.pairs import PairScores, PairsTask, build
from qlora_jax.inference.result_cache import open_cache
from qlora_jax.measures.statistics import mean_change_interval, wilson_interval
from qlora_jax.progress_reporter import ProgressReporter
from tests.evaluation.reference import expected_divergence, expected_scores
from tests.inference.tiny import byte_tokenizer, tiny_parts

TOKENIZER = byte_tokenizer()
ROWS = [
    {"prompt": "ab", "chosen": "cde", "rejected": "c", "kind": "long"},
    {"prompt": "", "chosen": "x", "rejected": "yz", "kind": "short"},
    {"prompt": "abc", "chosen": "d d", "rejected": "e e", "kind": "long"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def task_of(path, *, max_rows=None, max_positions=99, by=None):
    settings = TaskArgs(pairs=path, pair_beta=0.5, max_rows=max_rows, by=by)
    return build(settings, TaskContext(tokenizer=TOKENIZER, max_positions=max_positions))


def test_both_answers_stand_behind_the_prompt(tmp_path):
    task = task_of(write(tmp_path / "pairs.jsonl", ROWS[:1] * 3), max_rows=2)
    texts = [(TOKENIZER.decode(ids.tolist()), TOKENIZER.decode(ids[scored].tolist())) for ids, scored in task.sequences]
    assert texts == [("abcde<end>", "cde<end>"), ("abc<end>", "c<end>")] * 2 and task.size == 4


def test_rewards_are_relative_to_the_reference(tmp_path):
    task = task_of(write(tmp_path / "pairs.jsonl", [ROWS[0], ROWS[2]] * 2))
    run, reference = tiny_parts(0), tiny_parts(1)
    models = [ScoredModel("base", reference), ScoredModel("run", run, reference)]
    labels = {"base": "base", "run": "run"}
    done = score_models(
        models, {name: [task] for name in labels}, labels, cache_folder=tmp_path, reporter=ProgressReporter()
    )
    found = {name: metric.value for name, metric in done.tasks["pairs"].metrics["run"].items()}
    nll, before = (
        np.array([expected_scores(parts, *one)[0] for one in task.sequences]).reshape(-1, 2)
        for parts in (run, reference)
    )
    tokens = np.array([scored.sum() for _, scored in task.sequences]).reshape(-1, 2)
    divergences = np.array([expected_divergence(run, reference, *one) for one in task.sequences]).reshape(-1, 2)
    rewards = 0.5 * (before - nll)
    margins = rewards[:, 0] - rewards[:, 1]
    mean = nll / tokens
    expected = {
        "right by reward": (margins > 0).mean(),
        "reward margin": margins.mean(),
        "log ratio to the reference per token": (before - nll).sum() / tokens.sum(),
        "KL to the reference per token, chosen": divergences[:, 0].sum() / tokens[:, 0].sum(),
        "KL to the reference per token, rejected": divergences[:, 1].sum() / tokens[:, 1].sum(),
        "right by likelihood": (nll[:, 0] < nll[:, 1]).mean(),
        "right by likelihood per token": (mean[:, 0] < mean[:, 1]).mean(),
        "loss per token, chosen": nll[:, 0].sum() / tokens[:, 0].sum(),
        "loss per token, rejected": nll[:, 1].sum() / tokens[:, 1].sum(),
        "chosen is longer": 0.75,  # half of two pairs have equal lengths
        "ties by likelihood (count as half)": 0,
    }
    assert found == pytest.approx(expected, abs=1e-4)
    assert "reward margin" in str(done)  # the base has no such cell
    assert "right by reward" not in done.tasks["pairs"].metrics["base"]
    assert "right by reward" in done.tasks["pairs"].rows["run"]


def test_results_of_a_model_and_its_reference_are_cached_together(tmp_path):
    task = task_of(write(tmp_path / "pairs.jsonl", [ROWS[0], ROWS[2]] * 2))
    run, references, done = tiny_parts(0), [tiny_parts(1), tiny_parts(2)], []
    for reference, counts in ((0, (0, 1)), (0, (1, 0)), (1, (0, 1))):  # hits and misses
        cache = open_cache(tmp_path / "cache", run).joined(open_cache(tmp_path / "cache", references[reference]))
        task.score_with_reference(run, references[reference], done.append, cache)
        assert (cache.hits, cache.misses) == counts and done[-1] == task.size


def test_a_reference_costs_one_more_forward_pass(tmp_path):
    """Hidden states are computed once per model; the divergence adds little more than sums over the logits."""
    task = task_of(write(tmp_path / "pairs.jsonl", [ROWS[0], ROWS[2]] * 2))
    run, reference = tiny_parts(0), tiny_parts(1)
    ((batch, packed),) = batches_of(run, task.sequences)
    inputs, _, _ = scoring_inputs(batch, packed, 1)
    alone, both = (
        program.lower(parts, *inputs).compile().cost_analysis()["flops"]
        for program, parts in ((score_tokens, run), (compare_given_tokens, (run, reference)))
    )
    assert alone < both < 2.5 * alone


def scores(chosen, rejected, reference=None):
    nll = np.stack([chosen, rejected], axis=1).astype(float)
    return PairScores(nll_P2=nll, tokens_P2=np.full((len(nll), 2), 2), reference_P2=reference)


def test_ties_count_as_half_and_changes_are_paired():
    task = PairsTask(title="", sequences=[], beta=0.1)
    before, after = scores([1, 2, 3, 4], [1, 1, 5, 5]), scores([1, 2, 3, 4], [2, 2, 5, 5])
    found = {metric.name: metric for metric in task.metrics(before)}
    assert found["right by likelihood"].value == 2.5 / 4
    assert found["right by likelihood"].interval == wilson_interval(2.5, 4)
    assert found["ties by likelihood (count as half)"].value == 1
    changes = {change.name: change for change in task.compare(before, after)}
    assert changes["right by likelihood"].difference == 1 / 4
    old, new = np.array([0.5, 0, 1, 1]), np.array([1, 0.5, 1, 1])
    assert changes["right by likelihood"].interval == mean_change_interval(new - old)


def test_a_model_equal_to_its_reference_is_right_by_half():
    same = scores([1, 2], [3, 1], reference=np.array([[1.0, 3.0], [2.0, 1.0]]))
    found = {metric.name: metric.value for metric in PairsTask(title="", sequences=[], beta=1.0).metrics(same)}
    assert found["right by reward"] == 0.5 and found["reward margin"] == 0


def test_groups_have_their_own_accuracies(tmp_path):
    task = task_of(write(tmp_path / "pairs.jsonl", ROWS), by="kind")
    found = {metric.name: metric.value for metric in task.metrics(scores([1, 9, 9], [2, 3, 8]))}
    assert found["right by likelihood, kind long (2 rows)"] == 0.5
    assert found["right by likelihood, kind short (1 rows)"] == 0


def test_rows_of_another_kind_are_refused(tmp_path):
    expected = r"rows.jsonl: rows of another kind \(found texts .*'completion', expected pairs .*\)\. Use rows of"
    with pytest.raises(ValueError, match=expected):  # evaluate has no objective to set
        task_of(write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}]))
    with pytest.raises(ValueError, match=r"pairs.jsonl:1, 3: too long \(found 6 to 7 tokens"):
        task_of(write(tmp_path / "pairs.jsonl", ROWS), max_positions=4)
