"""Tokens without a row in the model's embedding: removed, made trainable, or refused."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.data.tokenizer.embedding_rows import fit_to_rows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, with_new_tokens
from tests.data.loading import load, question
from tests.io.tiny_tokenizers import byte_level

MODEL = Path("model")
SIZE = load_tokenizer({"tokenizer_json": byte_level()}).vocab_size


def _with_added(special: bool, token: str = "<image>", **named: str) -> Tokenizer:
    """Returns a tokenizer of SIZE tokens and one more."""
    whole = json.loads(byte_level())
    extra = {**whole["added_tokens"][0], "id": SIZE, "content": token, "special": special}
    whole["added_tokens"] = [*whole["added_tokens"], extra]
    return load_tokenizer({"tokenizer_json": json.dumps(whole), "eos_token": "<|im_end|>", **named})


def _fitted(tokenizer: Tokenizer, rows: int = SIZE, new: tuple[str, ...] = ()) -> Tokenizer:
    with pytest.warns(UserWarning, match=r"model: special tokens .* rows are removed: '<image>'\. A text"):
        return fit_to_rows(tokenizer, rows, new, MODEL)


def test_a_tokenizer_that_fits_stays_as_it_is() -> None:
    tokenizer = _with_added(special=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = fit_to_rows(tokenizer, SIZE + 1, (), MODEL)
    assert (fitted.exported, fitted.rows, fitted.refused) == (tokenizer.exported, SIZE + 1, ())


def test_a_special_token_without_a_row_is_removed_and_a_text_that_spells_it_is_refused() -> None:
    fitted = _fitted(_with_added(special=True))
    assert fitted.vocab_size == SIZE and "<image>" not in fitted.to_json()
    assert fitted.encode("an image") == load_tokenizer({"tokenizer_json": byte_level()}).encode("an image")
    for encode in (fitted.encode_batch, fitted.encode_spans, fitted.encode_fast, lambda texts: fitted.encode(texts[1])):
        with pytest.raises(ValueError, match="spells '<image>', a special token without a row"):
            encode(["a", "an <image>"])


def test_rows_that_spell_it_are_listed_by_line(write_rows: Callable[..., str]) -> None:
    path = write_rows([question(1), {"prompt": "an <image>", "completion": "yes"}, question(2, "<image>")])
    with pytest.raises(ValueError, match=r"2 of 3 rows(.|\n)*:2, 3: a text spells '<image>'"):
        load(_fitted(_with_added(special=True)), train=path)


def test_a_padding_token_without_a_row_is_not_named_any_more() -> None:
    fitted = _fitted(_with_added(special=True, pad_token="<image>"))
    assert fitted.pad_id is None and fitted.special_tokens == {"eos_token": "<|im_end|>"}


@pytest.mark.parametrize(
    ("tokenizer", "rows", "listed"),
    [
        (lambda: _with_added(special=False, token="<tool2>"), SIZE, f"'<tool2>' = {SIZE}; expected ids below {SIZE}"),
        (lambda: _with_added(special=True, bos_token="<image>"), SIZE, f"'<image>' = {SIZE}; "),
        (lambda: _with_added(special=True), SIZE - 10, f"= {SIZE - 6} and 5 more; expected ids below {SIZE - 10}"),
    ],
)
def test_other_tokens_without_a_row_are_errors(tokenizer: Callable[[], Tokenizer], rows: int, listed: str) -> None:
    with pytest.raises(ValueError, match=f"model: tokens of the tokenizer have no row .*{listed}"):
        fit_to_rows(tokenizer(), rows, (), MODEL)


@pytest.mark.parametrize("special", [False, True])
def test_a_token_that_is_to_train_gets_a_row(special: bool) -> None:
    fitted = fit_to_rows(_with_added(special=special), SIZE, ("<new>", "<image>"), MODEL)
    grown = with_new_tokens(fitted, ["<new>"], ["<image>"])
    assert (grown.new_ids, grown.rows, grown.refused) == ((SIZE, SIZE + 1), SIZE + 2, ())
    assert grown.encode("<image><new>") == [SIZE + 1, SIZE]


def test_new_tokens_take_the_place_of_a_removed_one() -> None:
    grown = with_new_tokens(_fitted(_with_added(special=True), new=("<new>",)), ["<new>"], [])
    assert (grown.encode("<new>"), grown.rows) == ([SIZE], SIZE + 1)
    with pytest.raises(ValueError, match="spells '<image>'"):
        grown.encode("<image>")


def test_the_vocabulary_of_a_gguf_file_is_fitted_too() -> None:
    tokens = ["a", "b", "ab", "<end>", "<image>"]
    metadata: dict[str, Any] = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [1, 1, 1, 3, 3]}
    tokenizer = load_tokenizer({"gguf": {**metadata, "merges": ["a b"]}, "eos_token": "<end>"})
    with pytest.warns(UserWarning, match="'<image>'"):
        fitted = fit_to_rows(tokenizer, 4, (), MODEL)
    assert fitted.backend.get_vocab(with_added_tokens=True) == {token: id_ for id_, token in enumerate(tokens[:4])}
