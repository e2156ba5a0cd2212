"""The fast paths of the loss mask return the rows of its definition, for tokenizers x templates x conversations."""

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from qlora_jax.data.encoder import Encoder, encode_rows, make_encoder
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.formats.row_format import Segment
from qlora_jax.data.loss_mask.reference import EncodedRow, Learn, loss_mask, mask_segments
from qlora_jax.data.readers.files import Place, Problem, Row
from qlora_jax.data.tokenizer.chat_template import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.data.loss_mask.cases import TEMPLATES, as_lists, conversations, make_tokenizer

# SentencePiece's vocabulary here has no <|im_end|>, so a template has to end turns with eos_token.
COMBINATIONS = [
    *itertools.product(["byte-level", "swallowing"], ["smollm2", *TEMPLATES]),
    *itertools.product(["never", "first", "every"], ["llama3", "mistral", "zephyr"]),
]
QUESTION = {"role": "user", "content": "Body?"}
# A token that crosses the start of the answer, a character without a token, and a row for the fastest path.
HARD = [[QUESTION, {"role": "assistant", "content": text}] for text in ("    return", "a\x04", "fine")]


def fast_rows(encoder: Encoder, chats: Sequence[Sequence[Message]]) -> list[EncodedRow | str]:
    """Each chat's row, or its error, from one chunk that goes through all fast paths."""
    problems: list[Problem] = []
    texts = encoder.segment_rows([Row(Place(n + 1, n), {"messages": chat}) for n, chat in enumerate(chats)], problems)
    places, rows = encoder.mask_rows(texts, encoder.encode_texts(texts), problems)
    found = dict(problems) | dict(zip(places, rows, strict=True))
    return [found[place] for place in sorted(found)]


def reference_row(tokenizer: Tokenizer, chat: Sequence[Message], learn: Learn) -> EncodedRow | str:
    try:
        return loss_mask(tokenizer, chat, learn=learn)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(("name", "template"), COMBINATIONS)
def test_encoder_returns_the_reference_rows(smollm2_source: dict, smollm2_template: str, name: str, template: str):
    tokenizer = make_tokenizer(name, smollm2_source, smollm2_template, template)
    encoders = {learn: make_encoder(FORMATS["messages"], tokenizer, learn) for learn in get_args(Learn)}

    @settings(max_examples=25)
    @given(st.lists(conversations(template != "mistral"), min_size=1, max_size=3), st.sampled_from(get_args(Learn)))
    @example(HARD, "assistant")
    def check(chats: list[list[dict[str, str]]], learn: Learn):
        for fast, chat in zip(fast_rows(encoders[learn], chats), chats, strict=True):
            expected = reference_row(tokenizer, chat, learn)
            assert (fast if isinstance(fast, str) else as_lists(fast)) == (
                expected if isinstance(expected, str) else as_lists(expected)
            )

    check()


def supervised_text(tokenizer: Tokenizer, row: EncodedRow) -> str:
    return tokenizer.decode(row.ids[row.supervised].tolist())


def expected(messages: list[dict[str, str]], before: str, end: str, strip: bool = False) -> str:
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    return "".join(before + (content.strip() if strip else content) + end for content in contents)


# `modern` has {% generation %} marks; the others do not.
kinds_of_template = pytest.mark.parametrize(
    ("name", "before", "end", "strip", "system"),
    [
        ("smollm2", "", "<|im_end|>", False, True),
        ("llama3", "", "<|im_end|>", True, True),  # ends turns with eos_token, which is <|im_end|> here
        ("mistral", " ", "<|im_end|>", False, False),
        ("modern", "", "<|im_end|>", False, True),
    ],
)


@kinds_of_template
def test_mask_decodes_to_the_assistants_texts_and_ends(
    smollm2_source: dict, templates: dict, name: str, before: str, end: str, strip: bool, system: bool
):
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": templates[name]})

    @given(conversations(system))
    def check(messages: list[dict[str, str]]):
        row, whole = loss_mask(tokenizer, messages), tokenizer.encode(tokenizer.render(messages))
        assert supervised_text(tokenizer, row) == expected(messages, before, end, strip)
        assert tokenizer.decode(row.ids.tolist()) == tokenizer.render(messages)
        assert row.cut or row.ids.tolist() == whole

    check()


@kinds_of_template
def test_the_last_turn_alone_or_all_is_learned(
    smollm2_source: dict, templates: dict, name: str, before: str, end: str, strip: bool, system: bool
):
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": templates[name]})

    @given(conversations(system))
    def check(messages: list[dict[str, str]]):
        every, last, whole = (loss_mask(tokenizer, messages, learn=learn) for learn in ("assistant", "last", "all"))
        answer = [message for message in messages if message["role"] == "assistant"][-1:]
        assert supervised_text(tokenizer, last) == expected(answer, before, end, strip)
        assert supervised_text(tokenizer, whole) == tokenizer.render(messages)
        # The setting does not change ids.
        assert every.ids.tolist() == last.ids.tolist() == whole.ids.tolist()
        assert every.source == last.source == whole.source == every.supervised.argmax()

    check()


def test_generation_marks_hold_what_the_mask_does(smollm2_source: dict, templates: dict):
    """Replaces generation marks by visible characters, and compares the text between them with the mask."""
    marked = (
        templates["modern"]
        .replace("{% generation %}", "{{ '\u27e6' }}")
        .replace("{% endgeneration %}", "{{ '\u27e7' }}")
    )
    ours, shown = (load_tokenizer({**smollm2_source, "chat_template": t}) for t in (templates["modern"], marked))

    @given(conversations())
    def check(messages: list[dict[str, str]]):
        if not any(mark in message["content"] for mark in "\u27e6\u27e7" for message in messages):
            inside = re.findall("\u27e6(.*?)\u27e7", shown.render(messages), re.DOTALL)
            assert supervised_text(ours, loss_mask(ours, messages)) == "".join(inside)

    check()


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", ["smollm2", "llama3", "mistral", "modern", None])
@pytest.mark.parametrize("family", ["smollm2", "sentencepiece"])
def test_bos_is_there_once_where_it_is_wanted(
    smollm2_source: dict, sentencepiece_like: Tokenizer, templates: dict, family: str, name: str | None, adds_bos: bool
):
    if family == "smollm2":
        tokenizer = load_tokenizer({**smollm2_source, "bos_token": "<|endoftext|>", "add_bos_token": adds_bos})
    else:
        tokenizer = dataclasses.replace(sentencepiece_like, add_bos_token=adds_bos)
    template = templates[name] if name else None
    tokenizer = dataclasses.replace(tokenizer, chat_template=template)
    wanted = adds_bos if template is None else "bos_token" in template
    if family == "sentencepiece" and template is not None and "eos_token" not in template:
        return  # it has no <|im_end|>
    bos = tokenizer.special_tokens["bos_token"]
    for prompt in ("the cat sat", bos + "the cat sat"):
        data = {"prompt": prompt, "completion": "yes no"}
        ids = encode_rows("x", [Row(Place(1, 0), data)], FORMATS["completion"], tokenizer)[0].ids.tolist()
        begins = [token == tokenizer.bos_id for token in ids[:2]]
        if template is None:
            assert begins == [wanted or prompt.startswith(bos), False]
        else:
            assert begins == [wanted, False]


def test_the_prompts_ids_are_those_of_generation(tokenizer: Tokenizer):
    @given(conversations())
    def check(messages: list[dict[str, str]]):
        turn = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
        row = loss_mask(tokenizer, messages[: turn + 1])
        prompt = tokenizer.encode(tokenizer.render(messages[:turn], add_generation_prompt=True))
        assert row.ids[: row.supervised.argmax()].tolist() == prompt

    check()


def test_end_of_turn_is_supervised_where_pad_is_eos_and_the_newline_behind_it_is_not(tokenizer: Tokenizer):
    assert tokenizer.pad_id == tokenizer.eos_id == 2
    row = loss_mask(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Paris"}])
    ends = np.flatnonzero(row.ids == 2)
    assert row.supervised[ends].tolist() == [False, False, True]  # system, user, assistant
    assert row.ids[-2:].tolist() == [2, 198] and not row.supervised[-1]


def test_a_token_over_the_boundary_is_cut_and_told(tokenizer: Tokenizer):
    question = {"role": "user", "content": "Body?"}
    row = loss_mask(tokenizer, [question, {"role": "assistant", "content": "    return"}])
    assert row.cut
    prompt = tokenizer.encode(tokenizer.render([question], add_generation_prompt=True))
    assert row.ids.tolist() == prompt + tokenizer.encode("    return<|im_end|>") + tokenizer.encode("\n")
    assert not loss_mask(tokenizer, [question, {"role": "assistant", "content": "return"}]).cut


def test_an_assistants_first_turn_needs_no_question(tokenizer: Tokenizer):
    messages = [{"role": "assistant", "content": "Welcome"}, {"role": "user", "content": "Hi"}]
    assert supervised_text(tokenizer, loss_mask(tokenizer, messages)) == "Welcome<|im_end|>"
    system = [{"role": "system", "content": "s"}, *messages]
    assert supervised_text(tokenizer, loss_mask(tokenizer, system)) == "Welcome<|im_end|>"


def test_what_the_template_has_the_model_write_is_supervised(smollm2_source: dict, templates: dict):
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": templates["thinking"]})
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "think"}]
    assert supervised_text(tokenizer, loss_mask(tokenizer, messages)) == "<think>\n\n</think>\n\nthink<|im_end|>"
    longer = [*messages, {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
    row = loss_mask(tokenizer, longer)
    first = "<think>\n\n</think>\n\nthink<|im_end|>"  # a branch: the template writes it differently later
    assert supervised_text(tokenizer, row) == f"<think>\n\n</think>\n\nb<|im_end|>{first}"
    assert tokenizer.decode(row.ids[row.branches[0].begin :].tolist()) == f"\n{first}"


def test_special_tokens_that_swallow_spaces(smollm2_source: dict):
    """Phi-3's <|end|> takes the newline after it, and its <|assistant|> the one before the answer."""
    whole = json.loads(smollm2_source["tokenizer_json"])
    for token in whole["added_tokens"]:
        token["rstrip"] = True
    tokenizer = load_tokenizer({**smollm2_source, "tokenizer_json": json.dumps(whole)})
    template = (
        "{% for m in messages %}{{ ('<repo_name>' if m.role == 'assistant' else '<reponame>') + '\n' + m.content + "
        "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<repo_name>\n' }}{% endif %}"
    )
    tokenizer = dataclasses.replace(tokenizer, chat_template=template)
    row = loss_mask(tokenizer, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b"}])
    assert not row.cut
    assert supervised_text(tokenizer, row) == "a b<|im_end|>"


@pytest.fixture(scope="module")
def sentencepiece_like() -> Tokenizer:
    """A tokenizer like Llama 2's: spaces become a letter, and one is added before every text."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.train_from_iterator(["the cat sat on the mat and the dog ran [INST] [/INST] yes no"] * 9, trainer)
    backend.pre_tokenizer = None
    return load_tokenizer(
        {
            "tokenizer_json": backend.to_str(),
            "chat_template": "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if "
            "m.role == 'user' else ' ' + m.content + ' ' + eos_token }}{% endfor %}",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
        }
    )


def test_tokenizers_that_put_a_space_before_every_text(sentencepiece_like: Tokenizer):
    messages = [
        {"role": "user", "content": "the dog ran"},
        {"role": "assistant", "content": "the cat sat"},
        {"role": "user", "content": "and the mat"},
        {"role": "assistant", "content": "yes"},
    ]
    row = loss_mask(sentencepiece_like, messages)
    assert not row.cut and row.ids.tolist() == sentencepiece_like.encode(sentencepiece_like.render(messages))
    tokens = [sentencepiece_like.backend.id_to_token(token) for token in row.ids[row.supervised].tolist()]
    assert "".join(tokens) == "▁the▁cat▁sat▁</s>▁yes▁</s>"


def test_segments_that_do_not_decode_to_the_text_are_refused(sentencepiece_like: Tokenizer):
    row = [Segment("the c", False), Segment("at", True)]
    with pytest.raises(ValueError, match="the tokenizer can't encode the two separately"):
        mask_segments(sentencepiece_like, row)
