"""Text as it comes: token ids in, whole characters out."""

from qlora_jax.data.tokenizer.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # what decoders write for bytes that are no character (yet)


class TextStream:
    """Pieces of text whose join is the decoding of all ids pushed so far, as soon as characters are whole.

    A token may hold some of a character's bytes; they are kept back until the rest is there. Pieces are taken from the
    decoding together with the tokens before, since decoders may treat the first token of a text in their own way.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that became whole with this token; may be empty."""
        self._pending.append(token)
        piece = self._piece()
        return "" if piece.endswith(_INCOMPLETE) else self._emit(piece)

    def flush(self) -> str:
        """What was kept back, at the end of the text."""
        return self._emit(self._piece())

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]

    def _emit(self, piece: str) -> str:
        if piece:
            self._context, self._pending = self._pending, []
        return piece
