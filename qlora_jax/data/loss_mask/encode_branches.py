"""Encodes rows with branches. Each turn's prompt has the ids that inference gives the model, to the id.

A tokenizer finds special tokens before it splits the text between them. So texts are encoded in pieces that end with
special tokens, and equal pieces of all rows only once: a history that ten turns share is encoded once.

A turn begins where the ids of its prompt, encoded alone, end. If a token of the whole text crosses that place or the
end of the turn, the turn becomes a branch: the ids of its prompt, then those of its reply.
"""

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from qlora_jax.data.loss_mask.by_offsets import is_lossy
from qlora_jax.data.loss_mask.reference import EncodedRow, TokenText, join_texts, separate_turn
from qlora_jax.data.loss_mask.shared_prefix import is_always_found
from qlora_jax.data.loss_mask.turn_branches import RowText
from qlora_jax.data.tokenizer.tokenizer import Tokenizer


class _Pieces(NamedTuple):
    """A text in pieces, which join to it, and the turns in it.

    Fields:
      ends: index of the character after each piece.
      spans: [start, stop) of each turn, in characters.
    """

    texts: list[str]
    ends: list[int]
    spans: list[tuple[int, int]]

    def before(self, at: int) -> tuple[int, str]:
        """Returns the number of whole pieces before the character `at`, and the text between them and it."""
        count = bisect.bisect_right(self.ends, at)
        start = self.ends[count - 1] if count else 0
        return count, self.texts[count][: at - start] if at > start else ""

    def wanted(self) -> Iterator[str]:
        """Yields the texts to encode."""
        yield from self.texts
        yield from (self.before(at)[1] for at in itertools.chain.from_iterable(self.spans))


Ids = Mapping[str, list[int]]


def encode_branched(tokenizer: Tokenizer, rows: Sequence[RowText]) -> list[EncodedRow | ValueError]:
    """Returns the same rows as `reference.mask_branches`, or the errors that it raises."""
    ends_piece = functools.cache(functools.partial(_ends_piece, tokenizer))
    splits = [[_split(tokenizer, ends_piece, text, spans) for text, spans in row.texts()] for row in rows]
    found = _encode(tokenizer, splits)
    return [_encoded_row(tokenizer, row, pieces, found) for row, pieces in zip(rows, splits, strict=True)]


def _encoded_row(tokenizer: Tokenizer, row: RowText, pieces: Sequence[_Pieces], found: Ids) -> EncodedRow | ValueError:
    if not all([_is_whole(tokenizer, text, found) for one in pieces for text in one.texts[:-1]]):
        pieces = [_Pieces([text], [len(text)], spans) for text, spans in row.texts()]
        found = _encode(tokenizer, [pieces])
    texts = dict.fromkeys(text for one in pieces for text in one.texts)
    lossy = any([is_lossy(tokenizer, text, found[text]) for text in texts])
    try:
        return join_texts([*_sequences(tokenizer, pieces, found)], lossy)
    except ValueError as error:
        return error


def _split(tokenizer: Tokenizer, ends_piece: Callable[[str], bool], text: str, spans: list[tuple[int, int]]) -> _Pieces:
    """Returns the text in pieces that end with special tokens."""
    ends = [match.end() for match in tokenizer.special_text.finditer(text) if ends_piece(match.group())]
    if not ends or ends[-1] < len(text):
        ends.append(len(text))
    return _Pieces([text[start:end] for start, end in zip([0, *ends], ends, strict=False)], ends, spans)


def _ends_piece(tokenizer: Tokenizer, token: str) -> bool:
    """Returns True if a text can be encoded in two parts, the first of which ends with this special token."""
    lengths = tokenizer.byte_lengths
    return lengths is not None and lengths.prefix != "first" and is_always_found(tokenizer, token)


def _is_whole(tokenizer: Tokenizer, piece: str, found: Ids) -> bool:
    """Returns True if the last id of a piece is a special token. Another added token may overlap its beginning."""
    token = tokenizer.backend.id_to_token(found[piece][-1])
    return token is not None and piece.endswith(token) and tokenizer.special_text.fullmatch(token) is not None


def _encode(tokenizer: Tokenizer, splits: Sequence[Sequence[_Pieces]]) -> Ids:
    wanted = [*dict.fromkeys(text for row in splits for pieces in row for text in pieces.wanted())]
    return dict(zip(wanted, [encoding.ids for encoding in tokenizer.encode_fast(wanted)], strict=True))


def _sequences(tokenizer: Tokenizer, texts: Sequence[_Pieces], found: Ids) -> Iterator[TokenText]:
    """Yields the trunk, and each branch. Turns that a token crosses become branches, which come last."""
    apart: list[TokenText] = []
    for pieces in texts:
        ids = [found[text] for text in pieces.texts]
        starts = [0, *itertools.accumulate(map(len, ids))]
        whole, spans = [*itertools.chain.from_iterable(ids)], []
        for start, stop in pieces.spans:
            (count, before), (last, reply) = pieces.before(start), pieces.before(stop)
            begin, end = starts[count] + len(found[before]), starts[last] + len(found[reply])
            prompt = whole[: starts[count]] + found[before]
            if whole[:begin] == prompt and whole[starts[last] : end] == found[reply]:
                spans.append((begin, end))
                continue
            text = "".join(pieces.texts)[:stop]
            apart.append(separate_turn(tokenizer, prompt, text[start:], tokenizer.encode(text)))
        if spans or pieces is texts[0]:
            yield TokenText(whole, spans)
    yield from apart
