"""Chooses the padding token of exported sequence heads.

transformers pools the rightmost token of a text whose id is not `pad_token_id`, even in a batch of one text. Many bases
name the token that ends a text as padding, so their texts would be pooled at the token before it.
"""

import dataclasses
from collections.abc import Collection, Iterator
from typing import NamedTuple

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.metadata import JsonObject
from qlora_jax.models.families.multimodal import text_config


class Padding(NamedTuple):
    """A padding token; both fields are None if no token is safe. transformers then pools texts one at a time."""

    id: int | None
    token: str | None


def head_padding(tokenizer: Tokenizer, config: JsonObject, stop: Collection[int]) -> Padding:
    """Returns a special token that ends no text: the base's own padding token, if it is one.

    Args:
      config: config.json of the base.
      stop: ids that end a reply.
    """
    config = {**text_config(config), **config}
    ends = {*stop, tokenizer.eos_id, tokenizer.unk_id, *_ids(config, "eos_token_id")}
    special = {
        index: token.content
        for index, token in sorted(tokenizer.backend.get_added_tokens_decoder().items())
        if token.special and index not in tokenizer.new_ids and (tokenizer.rows is None or index < tokenizer.rows)
    }
    for index in _candidates(config, tokenizer, special):
        token = special.get(index) or tokenizer.backend.id_to_token(index)
        if token is not None and index not in ends:
            return Padding(index, token)
    return Padding(None, None)


def padded_tokenizer(tokenizer: Tokenizer, padding: Padding) -> Tokenizer:
    """Returns the tokenizer with this padding token, so that transformers pads texts with the token it ignores."""
    if padding.token is None:
        return tokenizer
    return dataclasses.replace(tokenizer, special_tokens={**tokenizer.special_tokens, "pad_token": padding.token})


def _candidates(config: JsonObject, tokenizer: Tokenizer, special: dict[int, str]) -> Iterator[int]:
    """Yields ids, the best first. Those that a chat template spells are left out, because a turn may end in them."""
    named = {index for index in (tokenizer.pad_id, *_ids(config, "pad_token_id")) if index is not None}
    template = tokenizer.chat_template or ""
    yield from sorted(named)
    free = [index for index, token in special.items() if token not in template and index != tokenizer.bos_id]
    yield from sorted(free, key=lambda index: "pad" not in special[index].lower())
    if tokenizer.bos_id is not None:
        yield tokenizer.bos_id  # it begins a text


def _ids(config: JsonObject, name: str) -> list[int]:
    found = config.get(name)
    return [index for index in (found if isinstance(found, list) else [found]) if isinstance(index, int)]
