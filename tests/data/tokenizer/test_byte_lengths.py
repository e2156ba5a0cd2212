"""Texts that are said to round-trip do, and known losses of tokenizers are never said to."""

import json

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, normalizers, pre_tokenizers

from qlora_jax.data.formats.row_format import Segment
from qlora_jax.data.loss_mask.token_spans import encode_segments
from qlora_jax.data.tokenizer.byte_lengths import byte_lengths, make_round_trips, space_prefix
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from tests.data.conftest import sentencepiece_tokenizer
from tests.io.tiny_tokenizers import gemma


def bare(text: str) -> str:
    return "".join(text.split())


# SmolLM2 lacks bytes of some control characters, and of planes 4 to 15.
@given(st.text(st.characters(codec="utf-8")))
@example("\x04")
@example("\U00040000")
@example("a<|im_end|> b")
def test_what_is_kept_decodes_to_itself(tokenizer: Tokenizer, text: str):
    if tokenizer.round_trips(text):
        assert bare(tokenizer.decode(tokenizer.encode(text))) == bare(text)
    row = [Segment(text, True)]
    encoded = encode_segments(tokenizer, row, tokenizer.encode_spans([text])[0])
    assert encoded.lossy == (bare(tokenizer.decode(tokenizer.encode(text))) != bare(text))


@pytest.mark.parametrize("prefix", ["never", "first", "every"])
def test_what_is_kept_by_a_tokenizer_that_spells_spaces_out_decodes_to_itself(prefix: str):
    tokenizer, kept = sentencepiece_tokenizer(prefix), []

    @given(st.text(st.characters(codec="utf-8")))
    @example("\u2581a")
    @example("<0x41>")
    @example("a </s> <table>\n\n b")
    def check(text: str):
        kept.append(tokenizer.round_trips(text))
        if kept[-1]:
            assert bare(tokenizer.decode(tokenizer.encode(text))) == bare(text)

    check()
    assert sum(kept) > len(kept) / 2 and not tokenizer.round_trips("\u2581a") and not tokenizer.round_trips("<0x41>")


def test_tokenizers_that_spell_spaces_out_are_told_by_all_their_parts():
    backend = sentencepiece_tokenizer("every").backend
    assert space_prefix(backend) == "every"
    whole = json.loads(backend.to_str())
    for change in (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, *whole["normalizer"]["normalizers"]]}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"decoder": {"type": "ByteFallback"}},
        {"model": {**whole["model"], "byte_fallback": False}},
        {"model": {**whole["model"], "ignore_merges": True}},
    ):
        changed = tokenizers.Tokenizer.from_str(json.dumps(whole | change))
        assert space_prefix(changed) is None and byte_lengths(changed) is None and not make_round_trips(changed)("a")
    normalized = [{**token, "normalized": True} for token in whole["added_tokens"]]
    assert byte_lengths(tokenizers.Tokenizer.from_str(json.dumps(whole | {"added_tokens": normalized}))) is None


def test_what_is_known_of_tokenizers(tokenizer: Tokenizer):
    assert (
        tokenizer.round_trips("naïve 👍🏽 123\n\t")
        and not tokenizer.round_trips("a\x04")
        and not tokenizer.round_trips("\U00040000")
    )

    def changed(**parts: object) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        for name, part in parts.items():
            setattr(backend, name, part)
        return backend

    nfc = make_round_trips(changed(normalizer=normalizers.NFC()))
    assert nfc("é") and not nfc("e\u0301")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    removing = pre_tokenizers.Sequence([pre_tokenizers.Split("x", "removed"), byte_level])
    for unknown in (
        {"normalizer": normalizers.Lowercase()},
        {"pre_tokenizer": removing},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"decoder": decoders.Fuse()},
    ):
        assert not make_round_trips(changed(**unknown))("a")


def test_a_run_of_spaces_has_a_byte_for_each():
    """Gemma's added tokens spell spaces with SPACE, which has three bytes in a text."""
    backend = tokenizers.Tokenizer.from_str(gemma())
    lengths = byte_lengths(backend)
    assert lengths is not None
    for text in ("a  b", "def f():\n        return 1\n\n    #" + " " * 40, "\t\tx <table> "):
        assert lengths.of_ids[backend.encode(text, add_special_tokens=False).ids].sum() == len(text)
