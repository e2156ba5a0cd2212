"""The key of the cache covers all of this package's code."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from qlora_jax.config.schema import DataArgs
from qlora_jax.data import prepare
from qlora_jax.data.prepare import Preparation
from qlora_jax.data.tokenizer.tokenizer import Tokenizer


def prepared(tokenizer: Tokenizer, path: str) -> Preparation:
    data = DataArgs(train=path)
    return Preparation(path=path, row_format="auto", split=None, hashed=False, tokenizer=tokenizer, data=data)


def test_settings_that_change_rows_change_the_key(tokenizer: Tokenizer, write_rows):
    one = prepared(tokenizer, write_rows([{"text": "a", "label": 1}]))
    variables = dataclasses.replace(tokenizer, chat_template_kwargs={"enable_thinking": False})
    others = [{"objective": "classification"}, {"labels": ("a",)}, {"labels": ("b",)}, {"tokenizer": variables}]
    keys = [one.key(), *(dataclasses.replace(one, **changed).key() for changed in others)]
    assert len({*keys}) == len(keys) and prepared(tokenizer, one.path).key() == keys[0]


@pytest.mark.parametrize("file", ["prepare.py", "loss_mask/spans.py", "tokenizer/chat_template.py"])
def test_a_changed_source_file_changes_the_key(
    plain_tokenizer: Tokenizer, write_rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
):
    path = write_rows([{"text": "a"}])
    preparation = prepared(plain_tokenizer, path)
    key = preparation.key()
    copy = Path(shutil.copytree(Path(prepare.__file__).parent, tmp_path / "data"))
    monkeypatch.setattr(prepare, "__file__", str(copy / "prepare.py"))
    prepare.code_digest.cache_clear()
    assert preparation.key() == key
    with (copy / file).open("a") as source:
        source.write("# changed\n")
    prepare.code_digest.cache_clear()
    assert preparation.key() != key
    prepare.code_digest.cache_clear()
