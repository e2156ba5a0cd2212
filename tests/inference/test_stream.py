"""Text from a stream of tokens: nothing lost, nothing twice, no half characters."""

import hypothesis
from hypothesis import strategies as st

from qlora_jax.inference.engine.detokenizer import TextStream
from tests.inference.tiny import VOCAB, byte_tokenizer

TOKENIZER = byte_tokenizer()


def pieces_of(ids: list[int]) -> list[str]:
    stream = TextStream(TOKENIZER)
    return [*(stream.push(token) for token in ids), stream.flush()]


@hypothesis.given(st.text())
def test_characters_come_whole_and_as_soon_as_they_are(text):
    pieces = pieces_of(TOKENIZER.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:  # the character that stands for a broken one looks like one
        assert pieces[-1] == ""
        assert sorted(filter(None, pieces)) == sorted(text)


@hypothesis.given(st.lists(st.integers(0, VOCAB - 1)))
def test_pieces_join_to_the_decoding_of_any_ids(ids):
    assert "".join(pieces_of(ids)) == TOKENIZER.decode(ids)


def test_a_character_of_four_tokens():
    assert pieces_of(TOKENIZER.encode("a🙂b")) == ["a", "", "", "", "🙂", "b", ""]
