"""Exact answers: extraction from texts, and greedy replies against a plain loop of the model."""

import gzip
import json
import re
import time

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from qlora_jax.answer_text import extract_answer
from qlora_jax.config.question_settings import QuestionArgs
from qlora_jax.evaluation.task import TaskContext
from qlora_jax.evaluation.tasks.answers import AnswerQuestion, AnswersTask, build, grade_replies
from qlora_jax.inference.decode import Reply
from qlora_jax.inference.result_cache import NO_CACHE, open_cache
from tests.inference.tiny import VOCAB, byte_tokenizer, full_logits, tiny_parts

GSM8K = r"#### (-?[0-9.,]+)"
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


def test_replies_are_grade_replies():
    questions = [AnswerQuestion(ids=[1], answers={"a", "b"})] * 4
    replies = [Reply([1], "stop"), Reply([2], "stop"), Reply([3], "length"), Reply([], "context")]
    texts = {1: "b", 2: "c", 3: "a"}
    scores = grade_replies(replies, questions, lambda reply: texts.get(reply.ids[0]) if reply.ids else None)
    assert scores.right.tolist() == [True, False, True, False]
    assert scores.unanswered.tolist() == [False, False, False, True]
    assert scores.cut_off.tolist() == [False, False, True, True]


def test_words_are_compared_after_they_are_normalized(tmp_path):
    rows = [{"question": "?", "answer": ["The Eiffel Tower", "a tower"]}, {"question": "?", "answer": "42"}]
    task = task_of(write(tmp_path / "q.jsonl", rows), answer_match="words")
    assert [asked.answers for asked in task.questions] == [{"eiffel tower", "tower"}, {"42"}]
    texts = {1: " the Eiffel tower!", 2: "It is 42, I think."}
    replies = [Reply([1], "stop"), Reply([2], "stop")]
    scores = grade_replies(replies, task.questions, lambda reply: extract_answer(texts[reply.ids[0]], None, "words"))
    metrics = {metric.name: metric for metric in task.metrics(scores)}
    assert metrics["exactly the answer"].value == 0.5 and metrics["contains an answer"].value == 1
    assert metrics["F1 of words"].value == pytest.approx((1 + 2 / 6) / 2)
    assert [change.name for change in task.compare(scores, scores)] == [*metrics][:3]


def test_words_that_are_all_wrong_have_an_interval_with_a_width(tmp_path):
    task = task_of(write(tmp_path / "q.jsonl", [{"question": "?", "answer": "42"}] * 3), answer_match="words")
    scores = grade_replies([Reply([1], "stop")] * 3, task.questions, lambda _: "no idea")
    metric = next(metric for metric in task.metrics(scores) if metric.name == "F1 of words")
    change = next(change for change in task.compare(scores, scores) if change.name == "F1 of words")
    assert metric.interval == pytest.approx(proportion_confint(0, 3, method="agresti_coull"), abs=1e-12)
    assert change.interval[0] < change.difference == 0 < change.interval[1]


def test_numbers_are_compared_by_value(tmp_path):
    task = task_of(
        write(tmp_path / "q.jsonl", [{"question": "?", "answer": "so #### 1,200"}]), r"####(.*)", answer_match="number"
    )
    assert task.questions[0].answers == {"1200"}
    assert extract_answer("#### $1200.00.", r"####(.*)", "number") == "1200"


def greedy(parts, prompt, count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(full_logits(parts, ids)[-1].argmax()))
    return ids[len(prompt) :]


def test_replies_are_those_of_a_plain_loop_and_are_cached(parts, tmp_path):
    rng, tokenizer = np.random.default_rng(0), byte_tokenizer()
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (5, 40, 9, *[12] * 64)]
    written = [greedy(parts, prompt, 4) for prompt in prompts]
    texts = [tokenizer.decode(ids).strip() for ids in written]
    texts[1] = "something else"
    questions = [AnswerQuestion(ids=ids, answers={text}) for ids, text in zip(prompts, texts, strict=True)]
    task = AnswersTask(
        title="",
        questions=questions,
        tokenizer=tokenizer,
        pattern=None,
        max_new_tokens=4,
        stop_ids=[],
        until=None,
    )
    done = []
    for misses in (2, 0):
        cache = open_cache(tmp_path, parts)
        scores = task.score(parts, done.append, cache)
        assert (cache.misses, cache.hits) == (misses, 2 - misses)
        assert scores.right.tolist() == [place != 1 for place in range(67)]
        assert scores.cut_off.all()
    assert done == [64, 67] * 2


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_pattern_of_a_stranger_takes_no_time(tmp_path):
    """Python's engine would take years for each of the answers."""
    started = time.process_time()
    task = task_of(write(tmp_path / "q.jsonl", [{"question": "?", "answer": "a" * 5000 + "!"}]), "((a+)+)+!")
    assert extract_answer("a" * 5000, task.pattern) is None
    assert time.process_time() - started < 5


def task_of(path, pattern=None, **more):
    settings = QuestionArgs(answers=path, answer_pattern=pattern, max_new_tokens=8, **more)
    return build(settings, TaskContext(tokenizer=byte_tokenizer(), max_positions=100))


def test_a_task_of_a_file(parts, tmp_path):
    rows = [{"question": "2+2?", "answer": "so #### 4"}, {"prompt": "x", "answer": ["#### 1,000", "#### 7"]}]
    task = task_of(write(tmp_path / "q.jsonl", rows), GSM8K)
    assert [asked.answers for asked in task.questions] == [{"4"}, {"1000", "7"}]
    assert byte_tokenizer().decode([*task.questions[0].ids]) == "Question: 2+2?\nAnswer:"
    scores = task.score(parts, lambda done: None, NO_CACHE)
    names = {metric.name: metric.value for metric in task.metrics(scores)}
    assert set(names) == {
        "exactly the answer",
        "no answer found (counted as wrong)",
        "replies cut off (8 tokens)",
    }
    (change,) = task.compare(scores, scores)
    assert (change.difference, change.p) == (0, 1)


def test_columns_of_other_names_and_long_values(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"problem": "2+2?", "solution": "4"}])
    (asked,) = task_of(path, file_columns={"question": "problem", "answer": "solution"}).questions
    assert asked.answers == {"4"}
    with pytest.raises(
        ValueError, match=r"q.jsonl:1: no .*--file_columns '{question: problem, answer: solution}' \(--questions"
    ):
        task_of(path)
    long = write(tmp_path / "long.jsonl", [{"question": "2+2?", "answer": {"text": "4" * 999}}])
    with pytest.raises(ValueError, match=r"answer: found {'text': '4+\.\.\., expected a text"):
        task_of(long)


def test_a_reply_in_plain_text_ends_where_the_next_question_begins(tmp_path):
    task = task_of(write(tmp_path / "q.jsonl", [{"question": "2+2?", "answer": "4"}]))
    assert task._text(byte_tokenizer().encode(" 4\nQuestion: 3+3?")) == " 4"


def test_rows_that_do_not_fit_are_told_all_at_once(tmp_path):
    rows = [{"question": "a", "answer": 4}, {"answer": "b"}, {"question": "a", "answer": "none"}]
    with pytest.raises(ValueError, match=r"3 of 3 rows") as error:
        task_of(write(tmp_path / "q.jsonl", rows), NUMBER)
    for line, words in enumerate(
        ("answer: found 4, expected", "no column 'question'", "no match of answer_pattern"), 1
    ):
        assert words in str(error.value).splitlines()[line]
    with pytest.raises(ValueError, match=r"105 tokens and 8 of the reply; the model has 100"):
        task_of(write(tmp_path / "long.jsonl", [{"question": "a" * 87, "answer": "b"}]))


def test_gsm8k_answers_are_found_in_every_row(local_data):
    with gzip.open(local_data("gsm8k_train.jsonl.gz"), "rt", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in file]
    found = [extract_answer(answer, GSM8K) for answer in answers]
    assert len(found) == 7473 and found[:3] == ["72", "10", "5"]
    assert all(number is not None and re.fullmatch(r"-?\d+(\.\d+)?", number) for number in found)
    assert found == [answer.rpartition("#### ")[2].replace(",", "") for answer in answers]
