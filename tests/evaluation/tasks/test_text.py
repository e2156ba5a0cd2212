"""A text is scored in windows."""

import pytest

from qlora_jax.evaluation.tasks.text import text_task
from tests.inference.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()


def test_a_text_in_windows(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefghij")
    task = text_task(str(tmp_path / "text.txt"), TOKENIZER, window=4, stride=None, max_tokens=7, max_positions=4)
    assert [TOKENIZER.decode(ids.tolist()) for ids, _ in task.rows] == ["abcd", "efg"]
    assert task.title.endswith("2 windows of 4 tokens, 5 scored")
    with pytest.raises(ValueError, match=r"window: too long \(found 4; the model has 3"):
        text_task(str(tmp_path / "text.txt"), TOKENIZER, window=4, stride=None, max_tokens=7, max_positions=3)
