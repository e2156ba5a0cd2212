"""Fast path: encodes the prefix that texts share, such as a template's system message, once for all of them."""

from collections.abc import Sequence
from os.path import commonprefix

from qlora_jax.data.tokenizer.tokenizer import Tokenizer


def shared_prefix(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[str, list[int]]:
    """Returns (prefix, its ids). The ids of each text are those of the prefix, then those of the rest of the text.

    This holds if a special token ends the prefix: a tokenizer finds special tokens before it splits the text between
    them. Returns ("", []) if no special token ends a common prefix, or if the tokenizer treats the beginning of a text
    differently from the rest.
    """
    lengths = tokenizer.byte_lengths
    if lengths is None or lengths.prefix == "first":
        return "", []
    *_, last = (None, *tokenizer.special_text.finditer(commonprefix(texts)))  # noqa: RUF071 (characters, not paths)
    if last is None or not is_always_found(tokenizer, last.group()):
        return "", []
    prefix = last.string[: last.end()]
    ids = tokenizer.encode(prefix)
    # Another added token may overlap the beginning of this one.
    return (prefix, ids) if ids[-1] == tokenizer.backend.token_to_id(last.group()) else ("", [])


def is_always_found(tokenizer: Tokenizer, token: str) -> bool:
    """Returns True if the tokenizer finds this added token in any text, whatever follows it."""
    added = tokenizer.backend.get_added_tokens_decoder().values()
    found = [other for other in added if token in other.content]
    return len(found) == 1 and not found[0].rstrip and not found[0].single_word
