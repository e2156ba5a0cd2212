"""Opening a model whose tokenizer has tokens that the embedding has no row for."""

import json
from pathlib import Path

import pytest

from qlora_jax.config import ModelArgs
from qlora_jax.io.export.gguf_metadata import export_spec
from qlora_jax.io.gguf.tokenizer_metadata import PREFIX
from qlora_jax.io.gguf.writer import typed_keys, write_gguf
from qlora_jax.io.pretrained import open_base
from tests.io.tiny_models import random_weights, tiny_config, write_folder
from tests.io.tiny_tokenizers import byte_level

ROWS = 380


def _folder(path: Path, *, special: bool) -> Path:
    """Writes a model of ROWS rows, whose tokenizer has a token with the id ROWS."""
    tokenizer = json.loads(byte_level())
    names = [f"<filler {number}>" for number in range(len(tokenizer["model"]["vocab"]) + 1, ROWS)]
    for number, name in zip(range(ROWS - len(names), ROWS + 1), [*names, "<image>"], strict=True):
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": number, "content": name})
    tokenizer["added_tokens"][-1]["special"] = special
    config = tiny_config(vocab_size=ROWS)
    return write_folder(path, config, random_weights(config), **{"tokenizer.json": json.dumps(tokenizer)})


def _gguf(folder: Path, path: Path, *, special: bool) -> Path:
    """Writes the model of `folder` to a GGUF file whose vocabulary has one token more than rows."""
    opened = open_base(ModelArgs(path=str(folder)))
    spec = export_spec(opened).spec
    keys = {key.name: key.value for key in spec.keys} | {f"{PREFIX}scores": []}
    keys[f"{PREFIX}tokens"] = [*keys[f"{PREFIX}tokens"], "<image>"]
    keys[f"{PREFIX}token_type"] = [*keys[f"{PREFIX}token_type"], 3 if special else 4]
    del keys["llama.vocab_size"]
    names = list(opened.source.tensors)
    values = (opened.source.tensors[name].read() for name in names)
    write_gguf(path, spec._replace(keys=typed_keys(keys)), names, values, "float32")
    return path


@pytest.fixture(params=["folder", "gguf"])
def model(request: pytest.FixtureRequest, tmp_path: Path):
    """Returns a function of `special`: the path of a model with one token more than rows."""

    def write(special: bool) -> str:
        folder = _folder(tmp_path / "model", special=special)
        if request.param == "folder":
            return str(folder)
        with pytest.warns(UserWarning, match="<image>"):
            return str(_gguf(_folder(tmp_path / "other", special=True), tmp_path / "model.gguf", special=special))

    return write


def test_a_special_token_is_removed_with_a_warning(model) -> None:
    with pytest.warns(UserWarning, match=r"special tokens without a row in the embedding of 380 rows .* '<image>'"):
        opened = open_base(ModelArgs(path=model(special=True)))
    assert opened.tokenizer.rows == opened.tokenizer.vocab_size == opened.features.vocab_size == ROWS
    with pytest.raises(ValueError, match="spells '<image>'"):
        opened.tokenizer.encode("an <image>")


def test_any_other_token_is_an_error(model) -> None:
    path = model(special=False)
    with pytest.raises(ValueError, match=rf"{Path(path).name}: tokens .*found '<image>' = {ROWS}; expected ids below"):
        open_base(ModelArgs(path=path))


@pytest.mark.parametrize("special", [False, True])
def test_a_token_that_is_to_train_gets_a_row(model, special: bool) -> None:
    opened = open_base(ModelArgs(path=model(special=special), new_tokens=["<image>", "<new>"]))
    assert opened.tokenizer.encode("<new><image>") == [ROWS + 1, ROWS]
    assert opened.full_features.vocab_size == opened.tokenizer.rows == ROWS + 2
