"""A shared prefix is encoded once, and every text has the same ids as alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from qlora_jax.data.loss_mask.spans import shared_prefix
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.data.conftest import sentencepiece_tokenizer

PIECES = ["<s>", "<", "s>", "<s>x", "a<s", ">", " ", "a", "x", "\n", "é", "e\u0301"]


def built(*added: AddedToken, nfc: bool) -> Tokenizer:
    """A byte-level tokenizer of single bytes, the merges `ax`, ` a` and `>>`, and these added tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "ax", "Ġa", ">>"])}
    backend = Backend(models.BPE(vocabulary, [("a", "x"), ("Ġ", "a"), (">", ">")]))
    backend.normalizer = normalizers.NFC() if nfc else None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([*added])
    return load_tokenizer({"tokenizer_json": backend.to_str()})


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    head, ids = shared_prefix(tokenizer, texts)
    assert all(text.startswith(head) for text in texts)
    return [ids + tokenizer.encode(text[len(head) :]) for text in texts]


START = AddedToken("<s>", special=True)
KINDS = {
    "plain": [START],
    "normalized": [AddedToken("<s>", special=True, normalized=True)],
    "followed by spaces": [AddedToken("<s>", special=True, rstrip=True)],
    "a word": [AddedToken("<s>", special=True, single_word=True)],
    "in a longer one": [START, AddedToken("<s>x", normalized=False)],
    "behind an overlapping one": [START, AddedToken("a<s", normalized=False)],
}


@pytest.mark.parametrize("nfc", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_text_has_its_own_ids(kind: str, nfc: bool):
    check(built(*KINDS[kind], nfc=nfc), PIECES)


@pytest.mark.parametrize("prefix", ["never", "first", "every"])
def test_every_text_has_its_own_ids_with_sentencepiece(prefix: str):
    check(sentencepiece_tokenizer(prefix), ["</s>", "<s>", "<table>", " ", "\n", "fox", " jumps", "\u2581"])


def check(tokenizer: Tokenizer, alphabet: list[str]) -> None:
    pieces = st.lists(st.sampled_from(alphabet), max_size=6).map("".join)

    @given(pieces, st.lists(pieces, min_size=1, max_size=4))
    def every_text(head: str, tails: list[str]):
        texts = [head + tail for tail in tails]
        assert ids_of(tokenizer, texts) == [tokenizer.encode(text) for text in texts]

    every_text()


def test_a_shared_system_message_is_the_prefix(tokenizer: Tokenizer):
    texts = [tokenizer.render([{"role": "user", "content": text}]) for text in ("Hello", "Good morning")]
    head, ids = shared_prefix(tokenizer, texts)
    assert "system\nYou are a helpful" in head
    assert head.endswith("<|im_end|>\n<|im_start|>")
    assert ids == tokenizer.encode(head)


@pytest.mark.parametrize("texts", [[], ["", "<s>"], ["a", "b"], ["a b", "a c"]])
def test_without_a_shared_special_token_there_is_no_prefix(texts: list[str]):
    assert shared_prefix(built(START, nfc=False), texts) == ("", [])
