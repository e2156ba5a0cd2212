"""Fits a tokenizer to a model's embedding, so that every id has a row. A look-up beyond the rows gives other values."""

import dataclasses
import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import tokenizers

from qlora_jax.data.tokenizer.tokenizer import Tokenizer

_SHOWN = 5
# Without a padding token, padding gets another id. The other named tokens stand in rows.
_REMOVABLE_NAMES = {"pad_token"}


def fit_to_rows(tokenizer: Tokenizer, rows: int, new_tokens: Collection[str], path: Path) -> Tokenizer:
    """Returns the tokenizer without the tokens whose ids are `rows` or more.

    Added special tokens are removed with one warning that names them. From then on, a text that spells one raises an
    error. Tokens in `new_tokens` are removed without a warning: with_new_tokens adds them again, with rows that train.

    Args:
      rows: rows of the model's embedding.
      path: the model, for errors.

    Raises:
      ValueError: other tokens have no row; the message names them.
    """
    by_token = tokenizer.backend.get_vocab(with_added_tokens=True)
    beyond = {token: number for token, number in by_token.items() if number >= rows}
    if not beyond:
        return dataclasses.replace(tokenizer, rows=rows)
    required = {token for name, token in tokenizer.special_tokens.items() if name not in _REMOVABLE_NAMES}
    added = {token.content: token for token in tokenizer.backend.get_added_tokens_decoder().values()}
    removable = {token for token, entry in added.items() if entry.special or token in new_tokens} - required
    if wrong := {token: number for token, number in beyond.items() if token not in removable}:
        raise ValueError(
            f"{path}: tokens of the tokenizer have no row in the embedding (found {_listed(wrong)}; expected ids below "
            f"{rows}). Use the tokenizer that belongs to these weights, or list added tokens in model.new_tokens, "
            "which trains rows for them."
        )
    removed = sorted(beyond.keys() - set(new_tokens), key=by_token.__getitem__)
    if removed:
        names = ", ".join(map(repr, removed))
        warnings.warn(
            f"{path}: special tokens without a row in the embedding of {rows} rows are removed: {names}. A text that "
            "spells one raises an error.",
            stacklevel=2,
        )
    return _without(tokenizer, rows, frozenset(beyond), tuple(removed))


def _without(tokenizer: Tokenizer, rows: int, tokens: frozenset[str], refused: tuple[str, ...]) -> Tokenizer:
    """Returns the tokenizer without `tokens`, whose ids are `rows` or more."""
    whole = json.loads(tokenizer.exported)
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["id"] < rows]
    vocabulary = whole["model"]["vocab"]
    if isinstance(vocabulary, dict):
        whole["model"]["vocab"] = {token: number for token, number in vocabulary.items() if number < rows}
    else:  # Unigram: [token, score] in the order of ids
        whole["model"]["vocab"] = vocabulary[:rows]
    backend = tokenizers.Tokenizer.from_str(json.dumps(whole))
    exported = backend.to_str()
    backend.post_processor = None
    named = {name: token for name, token in tokenizer.special_tokens.items() if token not in tokens}
    return dataclasses.replace(
        tokenizer, backend=backend, exported=exported, special_tokens=named, rows=rows, refused=refused
    )


def _listed(tokens: Mapping[str, int]) -> str:
    first = sorted(tokens.items(), key=lambda item: item[1])[:_SHOWN]
    names = ", ".join(f"{token!r} = {number}" for token, number in first)
    return names if len(tokens) <= _SHOWN else f"{names} and {len(tokens) - _SHOWN} more"
