"""Decodes a stream of token ids into text, in whole characters."""

from qlora_jax.data.tokenizer.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"  # decoders write this for bytes that are not (yet) a character


class TextStream:
    """Decodes ids one by one; the pieces joined are the decoding of all ids.

    A token may contain only some bytes of a character. These wait until the character is complete. Each piece is
    decoded together with the tokens before it, because decoders may treat the first token of a text differently.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Adds a token and returns the text that it completes, which may be empty."""
        self._pending.append(token)
        piece = self._piece()
        return "" if piece.endswith(_INCOMPLETE) else self._emit(piece)

    def flush(self) -> str:
        """Returns the text still waiting; call it after the last token."""
        return self._emit(self._piece())

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]

    def _emit(self, piece: str) -> str:
        if piece:
            self._context, self._pending = self._pending, []
        return piece
