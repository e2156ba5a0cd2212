"""Labels are scored as replies to a prompt made of a row's columns; the likeliest one is predicted."""

import gzip
import json

import numpy as np
import pytest

from qlora_jax.config.question_settings import QuestionArgs
from qlora_jax.evaluation.task import TaskContext
from qlora_jax.evaluation.tasks.labels import LabelsTask, build, parse_prompt, predict
from qlora_jax.inference.result_cache import NO_CACHE, open_cache
from qlora_jax.measures.metrics import RowScores
from tests.evaluation.reference import expected_scores
from tests.inference.tiny import byte_tokenizer, tiny_parts

TOKENIZER = byte_tokenizer()
SENTIMENT = dict(label_prompt="{sentence}\nMood:", label_texts={"0": "bad", "1": "fine"})


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


def task_of(path, label_score="sum", *, max_positions=200, **changes) -> LabelsTask:
    settings = QuestionArgs(labels=str(path), label_score=label_score, **SENTIMENT | changes)
    return build(settings, TaskContext(tokenizer=TOKENIZER, max_positions=max_positions))


def decoded(rows):
    return [(TOKENIZER.decode(ids.tolist()), TOKENIZER.decode(ids[scored].tolist())) for ids, scored in rows]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_only_the_label_is_scored(tmp_path):
    rows = [{"sentence": "so so ", "label": 1}, {"sentence": "{label}", "label": "0"}]
    task = task_of(write(tmp_path / "rows.jsonl", rows))
    assert decoded(task.options[0]) == [("so so\nMood: bad", " bad"), ("so so\nMood: fine", " fine")]
    assert decoded(task.options[1])[0] == ("{label}\nMood: bad", " bad")
    assert task.answers.tolist() == [1, 0] and task.size == 4


@pytest.mark.parametrize(
    "label_score", ["calibrated", *(pytest.param(how, marks=pytest.mark.slow) for how in ("sum", "mean"))]
)
def test_the_likeliest_label_is_predicted(parts, tmp_path, label_score):
    rows = [{"sentence": text, "label": False} for text in ("a dog", "b", "see no sun", "rain", "it is fine")]
    texts = {"false": "no", "true": "certainly", "maybe": "a"}
    task = task_of(write(tmp_path / "rows.jsonl", rows), label_score, label_texts=texts)
    nll = np.array([[expected_scores(parts, *option)[0] for option in options] for options in task.options])
    if label_score == "mean":
        nll /= [len(" no"), len(" certainly"), len(" a")]
    if label_score == "calibrated":
        (empty,) = task_of(
            write(tmp_path / "empty.jsonl", [{"sentence": "N/A", "label": "false"}]), label_texts=texts
        ).options
        nll -= [expected_scores(parts, *option)[0] for option in empty]
    predicted = nll.argmin(axis=1)
    cache = open_cache(tmp_path / "cache", parts)
    scores = task.score(parts, lambda done: None, cache)
    assert scores.tolist() == predicted.tolist()
    assert task.score(parts, lambda done: None, cache).tolist() == predicted.tolist() and cache.hits == cache.misses
    metrics = {metric.name: metric for metric in task.metrics(scores)}
    assert metrics["right label"].value == (predicted == 0).mean()
    assert [*metrics] == ["right label", "F1 (mean over 3 labels)", "Matthews correlation", "ties (counted as wrong)"]
    changes = {change.name: change for change in task.compare(scores, task.answers)}
    assert changes["right label"].difference == 1 - (predicted == 0).mean()
    assert {change.interval for change in task.compare(scores, scores)} == {None, (0, 0)}


def test_rows_whose_likelihoods_are_not_numbers_are_named(parts, tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [{"sentence": text, "label": 0} for text in "abcd"])
    nll = np.arange(8.0)
    nll[[3, 6]] = np.nan
    scores = RowScores(nll=nll, tokens=np.ones(8, np.int64), exact=nll > 0, begins=nll > 0)
    monkeypatch.setattr("qlora_jax.evaluation.tasks.labels.score_rows", lambda *args: scores)
    with pytest.raises(ValueError) as error:
        task_of(path).score(parts, lambda done: None, NO_CACHE)
    assert str(error.value).startswith(
        f"{path}: 2 of 4 rows can't be used:\n  {path}:2, 4: labels: a likelihood is not"
    )
    scores.nll[[3, 6]] = np.inf  # a label that cannot be is a number
    assert task_of(path).score(parts, lambda done: None, NO_CACHE).tolist() == [0, 0, 0, 1]


@pytest.mark.slow
def test_the_scores_order_labels_differently(parts, tmp_path):
    """A test of `likelihoods` must not pass with any of the three."""
    rows = [{"sentence": text, "label": 0} for text in ("a dog", "b", "see no sun", "rain", "it is fine")]
    path = write(tmp_path / "rows.jsonl", rows)
    texts = {"0": "no", "1": "certainly", "2": "a"}
    predicted = [
        task_of(path, how, label_texts=texts).score(parts, lambda done: None, NO_CACHE).tolist()
        for how in ("sum", "mean", "calibrated")
    ]
    assert len({str(one) for one in predicted}) == 3


def test_no_label_is_predicted_where_several_are_likeliest():
    assert predict(np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0], [3.0, 3.0, 3.0], [0.0, 0.0, 1.0]])).tolist() == [
        3,
        1,
        3,
        2,
    ]


def test_a_tie_is_reported_and_not_right(parts, tmp_path):
    task = task_of(write(tmp_path / "rows.jsonl", [{"sentence": "x", "label": 0}] * 3))
    tied = np.array([2, 0, 1])
    metrics = {metric.name: metric.value for metric in task.metrics(tied)}
    assert (metrics["right label"], metrics["ties (counted as wrong)"]) == (pytest.approx(1 / 3), 1)


def test_tab_separated_rows_keep_quotes_and_lose_the_byte_order_mark(tmp_path):
    text = '\ufeffQuality\t#1 ID\t#1 String\t#2 String\n1\t7\t"So, he said.\tHe said "so".\n0\t8\tA "\tB\n'
    with gzip.open(tmp_path / "pairs.tsv.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    task = task_of(
        tmp_path / "pairs.tsv.gz",
        label_prompt="{#1 String} / {#2 String}",
        label_texts={"0": "no", "1": "yes"},
        file_columns={"label": "Quality"},
    )
    assert [decoded(options)[0][0] for options in task.options] == ['"So, he said. / He said "so". no', 'A " / B no']
    assert task.answers.tolist() == [1, 0]


def test_rows_that_do_not_fit_are_reported_together(tmp_path):
    rows = [{"sentence": "x", "label": 2}, {"text": "x", "label": 1}, {"sentence": None, "label": 1}, {"sentence": "x"}]
    with pytest.raises(ValueError, match=r"2 of 4 rows(?s:.*)found 2, expected one of label_texts: '0', '1'") as error:
        task_of(write(tmp_path / "rows.jsonl", rows))
    assert "no column 'label'" in str(error.value)
    with pytest.raises(ValueError, match=r"label_prompt: no column 'sentence' \(found 'text', 'label'\)"):
        task_of(write(tmp_path / "rows.jsonl", rows[1:2]))
    with pytest.raises(ValueError, match="sentence: found None, expected a text or a number"):
        task_of(write(tmp_path / "rows.jsonl", rows[2:3]))
    with pytest.raises(ValueError, match="too long"):
        task_of(write(tmp_path / "rows.jsonl", [{"sentence": "x" * 300, "label": 1}]))


def test_prompts_with_places_for_columns():
    assert parse_prompt("{a}{b c}: {{x}}").fill({"a": 1, "b c": " two "}) == "1two: {x}"
    for wrong in ("no column", "{a", "a}", "{}", "{a:b}", "{a!r}"):
        with pytest.raises(ValueError, match=r"^label_prompt: .*expected columns such as \{text\}"):
            parse_prompt(wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tsv", "columns", "prompt", "count", "positive"),
    [
        ("sst2_dev.tsv.gz", "sst2_dev.tsv.gz", None, "{sentence}", 872, 444),
        ("mrpc_test.txt.gz", "mrpc.tsv.gz", {"label": "Quality"}, "{#1 String} {#2 String}", 1725, 1147),
    ],
)
def test_real_files(local_data, tmp_path, name, tsv, columns, prompt, count, positive):
    (tmp_path / tsv).symlink_to(local_data(name))
    task = task_of(tmp_path / tsv, label_prompt=prompt, file_columns=columns, max_positions=999)
    assert (len(task.answers), task.answers.sum()) == (count, positive)
