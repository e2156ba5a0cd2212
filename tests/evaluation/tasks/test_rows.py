"""Rows of training data are scored on the tokens that training learns."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.data.batching.batches import fill_batch
from qlora_jax.data.encoder import encode_rows
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.readers.files import Place, Row
from qlora_jax.data.rows import token_rows
from qlora_jax.evaluation.tasks.rows import joined_scores, rows_task
from qlora_jax.inference.result_cache import NO_CACHE
from qlora_jax.measures.metrics import RowScores
from qlora_jax.measures.statistics import bootstrap, paired_bootstrap
from qlora_jax.training.step import evaluation_loss
from tests.inference.tiny import byte_tokenizer, tiny_parts

TOKENIZER = byte_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_score_what_training_learns(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "ab", "completion": "cd"}] * 3)
    task = rows_task(path, TOKENIZER, max_rows=2, max_positions=5)
    assert len(task.rows) == 2
    assert [TOKENIZER.decode(ids[scored].tolist()) for ids, scored in task.rows] == ["cd<end>"] * 2
    np.testing.assert_array_equal(task.rows[0][1], [False, False, True, True, True])


def test_the_given_start_of_an_answer_is_not_scored(tmp_path):
    good, bad = {"prompt": "ab", "completion": "T: cd"}, {"prompt": "ab", "completion": "cd"}
    limits = dict(max_rows=None, max_positions=99, answer_start="T:")
    task = rows_task(write(tmp_path / "rows.jsonl", [good] * 2), TOKENIZER, **limits)
    assert [TOKENIZER.decode(ids[scored].tolist()) for ids, scored in task.rows] == [" cd<end>"] * 2
    with pytest.raises(ValueError, match=r"rows.jsonl:2: the answer begins with 'cd', expected 'T:'"):
        rows_task(write(tmp_path / "rows.jsonl", [good, bad]), TOKENIZER, **limits)


def test_losses_of_the_groups_of_a_column(tmp_path):
    languages = ["de", "fr", "de", "eo", "de"]
    rows = [{"prompt": "ab", "completion": "c" * (n + 1), "lang": lang} for n, lang in enumerate(languages)]
    task = rows_task(write(tmp_path / "rows.jsonl", rows), TOKENIZER, max_rows=None, max_positions=99, by="lang")
    before, after = (
        RowScores(nll=nll, tokens=np.arange(2, 7), exact=np.ones(5, bool), begins=np.ones(5, bool))
        for nll in (np.arange(5.0), np.arange(5.0) ** 2)
    )
    found = {metric.name: metric for metric in task.metrics(before)}
    assert [*found][4:] == [f"loss per token, lang {group}" for group in ("de (3 rows)", "fr (1 rows)", "eo (1 rows)")]
    german = found["loss per token, lang de (3 rows)"]
    assert german.value == (0 + 2 + 4) / (2 + 4 + 6)
    assert german.interval == bootstrap(np.array([0.0, 2, 4]), np.array([2, 4, 6]))
    changes = {change.name: change for change in task.compare(before, after)}
    assert changes["loss per token, lang de (3 rows)"].difference == pytest.approx((4 + 16 - 6) / 12)
    expected = paired_bootstrap(np.array([0.0, 2, 4]), np.array([0.0, 4, 16]), np.array([2, 4, 6]))
    assert changes["loss per token, lang de (3 rows)"].interval == expected


def test_a_row_without_the_column_of_groups_is_reported(tmp_path):
    rows = [{"prompt": "ab", "completion": "c", "lang": "de"}, {"prompt": "ab", "completion": "c", "lang": None}]
    with pytest.raises(ValueError, match=r"rows.jsonl:2: by: found None in column 'lang', expected a text"):
        rows_task(write(tmp_path / "rows.jsonl", rows), TOKENIZER, max_rows=None, max_positions=99, by="lang")


TEMPLATE = "{% for m in messages %}{{ '*' if loop.last and m.role == 'assistant' }}{{ m.content }}<end>{% endfor %}"
SEVERAL = dataclasses.replace(TOKENIZER, chat_template=TEMPLATE)


def turns(*contents: str) -> dict[str, object]:
    roles = itertools.cycle(["user", "assistant"])
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]}


ROWS = [turns("q", "a"), turns("question", "answer", "more", "yes", "why", "so"), turns("two", "b", "c", "d")]


def test_a_row_of_several_texts_scores_each_turn_behind_its_own_prompt(tmp_path):
    """The template writes the last answer in another way, so the others are learned in branches."""
    task = rows_task(write(tmp_path / "rows.jsonl", ROWS), SEVERAL, max_rows=None, max_positions=99)
    decoded = [(SEVERAL.decode(ids[~mask].tolist()), SEVERAL.decode(ids[mask].tolist())) for ids, mask in task.rows]
    prompts = [
        "question<end>answer<end>more<end>yes<end>why<end>",
        "question<end>",
        "question<end>answer<end>more<end>",
    ]
    several = zip(prompts, ["*so<end>", "*answer<end>", "*yes<end>"], strict=True)
    assert decoded == [
        ("q<end>", "*a<end>"),
        *several,
        ("two<end>b<end>c<end>", "*d<end>"),
        ("two<end>", "*b<end>"),
    ]
    assert task.title.endswith("answers of 3 rows in 6 texts") and task.size == 6


@pytest.mark.slow
def test_a_row_of_several_texts_has_the_loss_of_training(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    task = rows_task(path, SEVERAL, max_rows=None, max_positions=99)
    parts, (row_format, places) = tiny_parts(), (FORMATS["messages"], [Place(n + 1, n) for n in range(3)])
    encoded = encode_rows(path, [Row(place, row) for place, row in zip(places, ROWS, strict=True)], row_format, SEVERAL)
    batch = fill_batch(token_rows(path, encoded, places), np.arange(3)[None, :, None], 128, 0)
    trained = evaluation_loss(parts, {name: jnp.asarray(array[0]) for name, array in batch.arrays().items()})
    scores = task.score(parts, lambda done: None, NO_CACHE)
    np.testing.assert_allclose(scores.nll, np.asarray(trained), rtol=1e-5)
    assert scores.tokens.tolist() == batch.weights[0].sum(axis=1).tolist() == [3, 17, 6]


def test_a_row_is_exact_if_all_its_texts_are(tmp_path):
    task = rows_task(
        write(tmp_path / "rows.jsonl", [turns("q", "a"), turns("q", "a", "r", "b")]),
        SEVERAL,
        max_rows=None,
        max_positions=99,
    )
    texts = RowScores(
        nll=np.array([1.0, 2, 4]),
        tokens=np.array([3, 4, 5]),
        exact=np.array([True, True, False]),
        begins=np.array([False, True, True]),
    )
    assert task.row_of_text is not None
    found = joined_scores(texts, task.row_of_text)
    assert (found.nll.tolist(), found.tokens.tolist()) == ([1, 6], [3, 9])
    assert (found.exact.tolist(), found.begins.tolist()) == ([True, False], [False, True])


def test_answer_start_refuses_rows_of_several_texts(tmp_path):
    path = write(tmp_path / "rows.jsonl", [turns("q", "a"), turns("q", "a", "r", "b")])
    with pytest.raises(ValueError, match=r"rows.jsonl:2: the chat template writes a turn .* Remove answer_start"):
        rows_task(path, SEVERAL, max_rows=None, max_positions=99, answer_start="*")
