"""The beginning that texts share, such as a template's system message, which is encoded once for all of them."""

from collections.abc import Sequence
from os.path import commonprefix

from qlora_jax.data.tokenizer.tokenizer import Tokenizer


def shared_prefix(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[str, list[int]]:
    """(head, its ids): every text begins with `head`, and has its ids and then those of the rest alone.

    That is known where a special token ends it: a tokenizer takes these out of a text before it looks at what lies
    between them. Without one there is no head: ("", []). Nor is there where a tokenizer treats the beginning of a text
    in a way of its own.
    """
    lengths = tokenizer.byte_lengths
    if lengths is None or lengths.prefix == "first":
        return "", []
    *_, last = (None, *tokenizer.special_text.finditer(commonprefix(texts)))  # noqa: RUF071 (characters are meant)
    if last is None or not _stands_alone(tokenizer, last.group()):
        return "", []
    head = last.string[: last.end()]
    ids = tokenizer.encode(head)
    # Another added token may lie over the beginning of this one.
    return (head, ids) if ids[-1] == tokenizer.backend.token_to_id(last.group()) else ("", [])


def _stands_alone(tokenizer: Tokenizer, token: str) -> bool:
    """Whether it is found in a text as an added token, whatever follows it."""
    added = tokenizer.backend.get_added_tokens_decoder().values()
    found = [other for other in added if token in other.content]
    return len(found) == 1 and not found[0].rstrip and not found[0].single_word
