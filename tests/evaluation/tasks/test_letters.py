"""Questions by letter: prompts, exemplars, the likeliest letter, ties, subjects."""

import dataclasses
import json

import numpy as np
import pytest

from qlora_jax.config.question_settings import QuestionArgs
from qlora_jax.evaluation.task import TaskContext
from qlora_jax.evaluation.tasks.letters import LetterQuestion, build, mean_over_subjects, score_letters
from qlora_jax.measures.statistics import stratified_bootstrap, stratified_paired_bootstrap, wilson_interval
from tests.inference.tiny import VOCAB, byte_tokenizer, full_logits, tiny_parts

TOKENIZER = byte_tokenizer()
QUESTION = {"question": "2 + 2?", "options": ["3", "4"], "answer": "4", "subject": "high_school_math"}
HEADER = "The following are multiple choice questions (with answers)"
MADE = f"{HEADER} about  high school math.\n\n2 + 2?\nA. 3\nB. 4\nAnswer:"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def task_of(path, *, max_positions=500, **settings):
    asked = QuestionArgs(letters=str(path), **{"num_shots": 2} | settings)
    return build(asked, TaskContext(tokenizer=TOKENIZER, max_positions=max_positions))


def text_of(question: LetterQuestion) -> str:
    return TOKENIZER.decode(question.ids.tolist())


def letters_of(question: LetterQuestion) -> str:
    return TOKENIZER.decode(list(question.letters))


def test_prompts_are_mmlus(tmp_path):
    whole = {"subject": "anatomy", "input": "Which?\nA. a\nB. b\nC. c\nD. d\nAnswer:", "output": "C"}
    task = task_of(write(tmp_path / "q.jsonl", [QUESTION, whole]))
    made, given = task.questions
    assert text_of(made) == MADE + " " and letters_of(made) == "AB" and made.answer == 1  # the space is a token here
    assert text_of(given) == whole["input"] + " " and letters_of(given) == "ABCD" and given.answer == 2
    assert task.subjects == ["high_school_math", "anatomy"]
    nameless = {key: QUESTION[key] for key in ("question", "options", "answer")}
    task = task_of(write(tmp_path / "n.jsonl", [nameless, QUESTION]))
    assert text_of(task.questions[0]).startswith(f"{HEADER}.\n\n2") and task.subjects is None


def test_both_files_may_call_their_columns_otherwise(tmp_path):
    named = {"question": "problem", "subject": "topic"}
    row = {"problem": "2 + 2?", "topic": "high_school_math", "options": ["3", "4"], "answer": "4"}
    path = write(tmp_path / "q.jsonl", [row])
    task = task_of(path, file_columns=named, shots=path, num_shots=1)
    assert text_of(task.questions[0]) == MADE.replace("2 + 2?", "2 + 2?\nA. 3\nB. 4\nAnswer: B\n\n2 + 2?") + " "


def test_examples_are_the_first_of_the_subject(tmp_path):
    def shot(subject, n):
        return {"question": f"{n}?", "options": ["x", "y"], "answer": n % 2, "subject": subject}

    shots = [shot("other", 9), shot("high_school_math", 1), shot("high_school_math", 2), shot("high_school_math", 3)]
    how = {"shots": write(tmp_path / "s.jsonl", shots)}
    (question,) = task_of(write(tmp_path / "q.jsonl", [QUESTION]), **how).questions
    exemplars = "1?\nA. x\nB. y\nAnswer: B\n\n2?\nA. x\nB. y\nAnswer: A\n\n"
    assert text_of(question) == MADE.replace("2 + 2?", exemplars + "2 + 2?") + " "
    with pytest.raises(
        ValueError,
        match=r"(?s)1 of 1 rows.*shots: too few examples of subject 'other' \(found 1, expected 2\)",
    ):
        task_of(write(tmp_path / "o.jsonl", [QUESTION | {"subject": "other"}]), **how)
    with pytest.raises(ValueError, match="to which no examples are added"):
        task_of(write(tmp_path / "w.jsonl", [{"input": "x", "output": "A"}]), **how)


def test_rows_that_can_not_be_asked_are_told(tmp_path):
    rows = [{"input": "x", "output": "E"}, {"question": "x"}, QUESTION | {"options": [*map(str, range(27))]}]
    with pytest.raises(ValueError, match="3 of 3 rows") as error:
        task_of(write(tmp_path / "q.jsonl", rows))
    for words in (
        "found output 'E', expected a prompt and one of A, B, C, D",
        "no column 'options' or 'answer' (found 'question'",
        "options: too many (found 27",
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="tokens; the model has 50"):
        task_of(write(tmp_path / "q.jsonl", [QUESTION]), max_positions=50)


def test_the_answer_is_the_letter_with_the_largest_logit():
    parts, rng = tiny_parts(), np.random.default_rng(0)
    questions, expected = [], []
    for length in (3, 40, 41, 100, 7):
        ids = rng.integers(0, VOCAB, length).astype(np.int32)
        letters = rng.choice(VOCAB, 4, replace=False).tolist()
        logits = np.asarray(full_logits(parts, ids.tolist()))[-1, letters]
        questions += [LetterQuestion(ids=ids, letters=letters, answer=answer) for answer in range(4)]
        expected += [answer == logits.argmax() for answer in range(4)]
    done = []
    scores = score_letters(parts, questions, done.append)
    assert scores.right.tolist() == expected and not scores.tied.any() and done[-1] == 20


def test_a_shared_first_place_is_a_tie_and_not_right():
    parts = tiny_parts()
    question = LetterQuestion(ids=np.arange(5, dtype=np.int32), letters=[3, 7], answer=0)
    table = parts.base["model"]["embed_tokens"]["weight"]
    table.set_value(table.get_value().at[7].set(table.get_value()[3]))
    scores = score_letters(parts, [question, dataclasses.replace(question, letters=[7, 3])])
    assert scores.tied.all() and not scores.right.any()


def test_subjects_count_alike():
    right = np.array([1, 1, 1, 0, 0], bool)
    assert mean_over_subjects(right, ["a", "a", "a", "a", "b"]) == pytest.approx((3 / 4 + 0) / 2)
    many = np.arange(1000) % 4 > 0
    low, high = stratified_bootstrap(many, ["one"] * 1000)
    assert (low, high) == pytest.approx(wilson_interval(750, 1000), abs=3e-3)
    halves = stratified_bootstrap(many, ["one"] * 500 + ["two"] * 500)
    assert halves == pytest.approx((low, high), abs=4e-3)


def test_pairs_of_two_models_within_subjects():
    """Changes d of n pairs a subject: sqrt(sum over subjects of (mean d^2 - mean^2) / n) / subjects."""
    rng = np.random.default_rng(0)
    before, subjects = rng.random(2000) < 0.5, np.repeat(["one", "two"], 1000)
    after = np.where(rng.random(2000) < 0.1, True, before)
    low, high = stratified_paired_bootstrap(before, after, list(subjects))
    changes = (after.astype(float) - before).reshape(2, 1000)
    middle, spread = changes.mean(), np.sqrt(changes.var(axis=1).sum() / 1000) / 2
    np.testing.assert_allclose([low, high], [middle - 1.96 * spread, middle + 1.96 * spread], atol=0.1 * spread)
    assert stratified_paired_bootstrap(before, before, list(subjects)) == (0.0, 0.0)


def test_ids_without_a_row_are_errors():
    question = LetterQuestion(ids=np.array([1, VOCAB], np.int32), letters=(2, 3), answer=0)
    with pytest.raises(
        ValueError, match=rf"question 0: an id has no row in the embedding .found ids 1 to {VOCAB}, expected 0 to"
    ):
        score_letters(tiny_parts(), [question])
