"""The text of a reply while its tokens arrive: whole characters, and nothing of a text that ends it."""

from collections.abc import Sequence

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


class ReplyText:
    """The text of a reply up to the first of its stop texts; text that may become one waits."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._stream = TextStream(tokenizer)
        self._stops = stops
        self._waiting = ""
        self._ended = False

    def push(self, token: int) -> tuple[str, bool]:
        """Returns (text that can be shown, True if a stop text ends the reply)."""
        return self._add(self._stream.push(token))

    def flush(self) -> tuple[str, bool]:
        """Returns the same for the rest of the reply; call it after the last token."""
        if self._ended:
            return "", False
        text, stopped = self._add(self._stream.flush())
        if stopped:
            return text, True
        text, self._waiting = text + self._waiting, ""
        return text, False

    def _add(self, piece: str) -> tuple[str, bool]:
        text = self._waiting + piece
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self._ended = True
            return text[: min(ends)], True
        kept = max((overlap(text, stop) for stop in self._stops), default=0)
        self._waiting = text[len(text) - kept :]
        return text[: len(text) - kept], False


def overlap(text: str, mark: str) -> int:
    """Returns the length of the longest end of a text with which a mark begins, which the text does not have."""
    longest = min(len(text), len(mark) - 1)
    return next((size for size in range(longest, 0, -1) if mark.startswith(text[-size:])), 0)
