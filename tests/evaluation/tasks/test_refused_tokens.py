"""Evaluation files that spell a token without a row in the embedding raise an error with file and line."""

import dataclasses
import json
from pathlib import Path

import pytest

from qlora_jax.config.question_settings import QuestionArgs
from qlora_jax.evaluation.task import TaskContext
from qlora_jax.evaluation.tasks import letters
from qlora_jax.evaluation.tasks.choices import choices_task
from qlora_jax.evaluation.tasks.text import text_task
from tests.inference.tiny import byte_tokenizer

TOKENIZER = dataclasses.replace(byte_tokenizer(), refused=("<image>",))
LIMITS = {"max_rows": None, "max_positions": 500}
CONTEXT = TaskContext(tokenizer=TOKENIZER, max_positions=500)
TASKS = {
    "choices": lambda path: choices_task(path, TOKENIZER, **LIMITS),
    "letters": lambda path: letters.build(
        QuestionArgs(letters=path), TaskContext(tokenizer=TOKENIZER, max_positions=500)
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_questions(tmp_path: Path, name: str) -> None:
    question = {"question": "2 + 2?", "options": ["3", "4"], "answer": "4"}
    rows = [question, question | {"question": "an <image>?"}]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"1 of 2 rows(.|\n)*questions\.jsonl:2: a text spells '<image>'"):
        TASKS[name](str(path))


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("an <image> of text")
    with pytest.raises(ValueError, match=r"a\.txt: a text spells '<image>'"):
        text_task(str(tmp_path / "a.txt"), TOKENIZER, window=8, stride=None, max_tokens=None, max_positions=500)
