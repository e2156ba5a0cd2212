"""Masks from offsets equal the reference, and texts that round-trip are not decoded."""

import dataclasses
from typing import get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qlora_jax.data.formats.row_format import Segment
from qlora_jax.data.loss_mask.reference import Learn, mask_segments
from qlora_jax.data.loss_mask.spans import conversation_segments
from qlora_jax.data.loss_mask.token_spans import encode_segments
from qlora_jax.data.loss_mask.turns import turn_marks
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from tests.data.loss_mask.cases import as_lists, make_tokenizer, segment_lists


@pytest.mark.parametrize("name", ["byte-level", "swallowing", "never", "first", "every"])
def test_offsets_return_the_reference_rows(smollm2_source: dict, smollm2_template: str, name: str):
    tokenizer = make_tokenizer(name, smollm2_source, smollm2_template)

    @given(segment_lists, st.sampled_from(get_args(Learn)))
    @example([Segment("a", False), Segment("", True), Segment("b", False)], "assistant")  # `ab` is one token
    @example([Segment("a", True), Segment("", False), Segment("", True)], "last")
    def check(row: list[Segment], learn: Learn):
        (encoding,) = tokenizer.encode_spans(["".join(segment.text for segment in row)])
        try:
            expected = mask_segments(tokenizer, row, learn)
        except ValueError as error:
            with pytest.raises(ValueError, match=str(error)):
                encode_segments(tokenizer, row, encoding, learn)
            return
        assert as_lists(encode_segments(tokenizer, row, encoding, learn)) == as_lists(expected)

    check()


def test_a_text_that_is_kept_is_not_decoded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Decoding would take as long as the rest of the mask."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    segments = conversation_segments(tokenizer, turn_marks(tokenizer), messages).segments
    encoding = tokenizer.encode_spans(["".join(segment.text for segment in segments)])[0]
    mute = dataclasses.replace(tokenizer)
    monkeypatch.setattr(Tokenizer, "decode", lambda *_: pytest.fail("decoded"))
    assert not encode_segments(mute, segments, encoding).lossy
