"""The key of the cache covers all of this package's code."""

import shutil
from pathlib import Path

import pytest

from qlora_jax.config.schema import DataArgs
from qlora_jax.data import prepare
from qlora_jax.data.prepare import Preparation
from qlora_jax.data.tokenizer.tokenizer import Tokenizer


@pytest.mark.parametrize("file", ["prepare.py", "loss_mask/spans.py", "tokenizer/chat_template.py"])
def test_a_changed_source_file_changes_the_key(
    plain_tokenizer: Tokenizer, write_rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
):
    path = write_rows([{"text": "a"}])
    preparation = Preparation(
        path=path,
        row_format="auto",
        split=None,
        hashed=False,
        tokenizer=plain_tokenizer,
        data=DataArgs(train=path),
    )
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
