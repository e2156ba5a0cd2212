"""Predictions of heads: texts encoded as in training, and probabilities against scipy's."""

import dataclasses

import numpy as np
import pytest
import scipy.special

from qlora_jax.data.readers.files import Place, Row
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from qlora_jax.evaluation.heads.predictions import class_predictions, encode_texts, predicted_columns
from qlora_jax.evaluation.heads.rows import encode_head_rows
from qlora_jax.evaluation.task import TaskContext
from qlora_jax.io.open_model import open_model
from qlora_jax.objectives.head_objective import TrainedHead
from tests.e2e.project import write_model

CLASSES = TrainedHead(objective="classification", labels=("a", "b", "c"))
SEVERAL = TrainedHead(objective="multi_label", labels=("a", "b"))
NUMBER = TrainedHead(objective="regression")
REWARD = TrainedHead(objective="reward")
TEXTS = TrainedHead(objective="embedding", pooling="mean")
CHAT = [{"role": "user", "content": "say sun"}, {"role": "assistant", "content": "sun"}]
OTHER = [*CHAT[:1], {"role": "assistant", "content": "moon"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(open_model(write_model(tmp_path_factory.mktemp("model"))).tokenizer)


def rows_of(*columns: dict) -> list[Row]:
    return [Row(Place(number + 1, number), one) for number, one in enumerate(columns)]


@pytest.mark.parametrize(
    ("head", "trained", "new"),
    [
        (CLASSES, {"text": "a sun", "label": "b"}, {"text": "a sun"}),
        (CLASSES, {"sentence": "a sun", "label": "b"}, {"sentence": "a sun", "label": "unknown"}),
        (CLASSES, {"question": "why?", "sentence": "sun", "label": "a"}, {"question": "why?", "sentence": "sun"}),
        (NUMBER, {"sentence1": "sun", "sentence2": "moon", "label": 2}, {"sentence1": "sun", "sentence2": "moon"}),
        (SEVERAL, {"messages": CHAT, "label": ["a"]}, {"messages": CHAT}),
        (
            REWARD,
            {"prompt": "say sun", "chosen": "sun", "rejected": "moon"},
            {"prompt": "say sun", "completion": "sun"},
        ),
        (REWARD, {"chosen": CHAT, "rejected": OTHER}, {"messages": CHAT}),
        (TEXTS, {"anchor": "a sun", "positive": "the sun"}, {"text": "a sun"}),
    ],
)
def test_texts_are_those_that_training_encodes(tokenizer, head, trained, new):
    context = TaskContext(tokenizer=tokenizer, max_positions=256, stop_ids=frozenset(), head=head)
    expected = encode_head_rows("rows", rows_of(trained), None, context).texts[0]
    (found,) = encode_texts("rows", rows_of(new), head, tokenizer, 256).texts
    np.testing.assert_array_equal(found, expected)


PAIRS = dataclasses.replace(CLASSES, text_columns=(("sentence1", "sentence2"),))
SINGLE = dataclasses.replace(CLASSES, text_columns=(("sentence",),))


def test_the_columns_of_training_are_read_first(tokenizer):
    row = {"text": "a", "sentence": "sun", "question": "why?"}  # question-sentence has more columns
    for head, expected in ((SINGLE, "sun"), (CLASSES, "why?\nsun"), (NUMBER, "why?\nsun")):
        (found,) = encode_texts("rows", rows_of(row), head, tokenizer, 256).texts
        assert found.tolist() == tokenizer.encode(expected)
    renamed = {"premise": "sun", "hypothesis": "moon"}
    assert len(encode_texts("rows", rows_of(renamed), PAIRS, tokenizer, 256).texts) == 1


@pytest.mark.parametrize(
    ("head", "columns", "message"),
    [
        (PAIRS, {"text": "sun"}, "found text, expected sentence1 and sentence2.*{sentence1: COLUMN, sentence2: COLUMN"),
        (SINGLE, {"sentence1": "sun", "sentence2": "moon"}, "found sentence1 and sentence2, expected sentence.*COLUMN"),
    ],
)
def test_rows_with_another_number_of_texts_are_refused(tokenizer, head, columns, message):
    context = TaskContext(tokenizer=tokenizer, max_positions=256, stop_ids=frozenset(), head=head)
    with pytest.raises(ValueError, match=f"rows: the head was trained on rows with another number of texts .{message}"):
        encode_texts("rows", rows_of(columns), head, tokenizer, 256)
    with pytest.raises(ValueError, match=message):
        encode_head_rows("rows", rows_of(columns | {"label": "a"}), None, context)


@pytest.mark.parametrize(
    ("head", "rows", "message"),
    [
        (CLASSES, [], "rows: contains no texts .found 0"),
        (CLASSES, [{"review": "good"}], "found 'review', expected messages; .*; sentence; text"),
        (REWARD, [{"text": "sun"}], "found 'text', expected messages; prompt and .*'{prompt: COLUMN, completion"),
        (CLASSES, [{"text": "sun"}, {"text": " "}, {"text": 3}], r"(?s)2 of 3 rows.*rows:2: text is empty"),
        (CLASSES, [{"text": "sun" * 99}], "rows:1: too long .found 297 tokens; the model has 256"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(tokenizer, head, rows, message):
    with pytest.raises(ValueError, match=message):
        encode_texts("rows", rows_of(*rows), head, tokenizer, 256)


def test_an_output_of_unknown_meaning_may_be_a_number_or_a_reward(tokenizer):
    head = TrainedHead(objective="regression", described=False)
    for columns in ({"text": "sun"}, {"prompt": "say sun", "completion": "sun"}):
        assert len(encode_texts("rows", rows_of(columns), head, tokenizer, 256).texts) == 1


def test_probabilities_equal_those_of_scipy():
    logits = np.random.default_rng(0).normal(0, 300, (6, 3))  # most probabilities are 0 or 1 in f64
    found = class_predictions(logits, CLASSES)
    np.testing.assert_allclose(
        [[*one.probabilities.values()] for one in found], scipy.special.softmax(logits, axis=1), atol=1e-15
    )
    assert [one.labels for one in found] == [(CLASSES.labels[index],) for index in logits.argmax(axis=1)]
    several = class_predictions(np.array([[2.0, -3.0], [-1.0, -2.0], [0.5, 800.0]]), SEVERAL)
    assert [one.labels for one in several] == [("a",), (), ("a", "b")] and several[1].label == "a"
    np.testing.assert_allclose([*several[0].probabilities.values()], scipy.special.expit([2.0, -3.0]))


def test_columns_of_a_file():
    outputs = np.array([[3.0, -4.0]])
    assert predicted_columns(outputs, SEVERAL)[0]["prediction"] == ["a"]
    assert predicted_columns(outputs[:, :1], NUMBER) == [{"prediction": 3.0}]
    assert predicted_columns(outputs[:, :1], REWARD) == [{"reward": 3.0}]
    assert predicted_columns(outputs, TEXTS) == [{"embedding": [0.6, -0.8]}]
