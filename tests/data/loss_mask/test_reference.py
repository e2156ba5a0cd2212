"""Masks: exactly what the model has to write, token for token, through templates without generation marks."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from qlora_jax.data.encoder import encode_rows
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.loss_mask import span_cache
from qlora_jax.data.loss_mask.by_offsets import EncodedRow, Learn, encode_segments
from qlora_jax.data.loss_mask.span_cache import make_segmenter
from qlora_jax.data.loss_mask.spans import Segment, conversation_segments, turn_marks
from qlora_jax.data.readers.files import Place, Row
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer

# SmolLM2's vocabulary lacks the bytes of some control characters, and of planes 4 to 15.
characters = st.characters(codec="utf-8", max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d")
text = st.text(characters, max_size=40) | st.sampled_from(
    [
        "    return 5",
        "\n\nx",
        "5",
        " 5",
        "'s",
        "é\u0301",
        "👍🏽",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "x\t",
        "\u2028",
    ]
)
answers = text.filter(lambda content: content.strip())


@st.composite
def conversations(draw: st.DrawFn, system: bool = True) -> list[dict[str, str]]:
    """Alternating turns, sometimes a system turn first, sometimes a last question that nobody answers."""
    messages = [{"role": "system", "content": draw(text)}] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(text)})
        messages.append({"role": "assistant", "content": draw(answers)})
    return [*messages, {"role": "user", "content": draw(text)}] if draw(st.booleans()) else messages


def encode(tokenizer: Tokenizer, messages: list[dict[str, str]], learn: Learn = "assistant") -> EncodedRow:
    segments = conversation_segments(tokenizer, turn_marks(tokenizer), messages)
    rendered = tokenizer.render(messages)
    assert "".join(segment.text for segment in segments) == rendered
    return encode_segments(tokenizer, segments, tokenizer.encode_spans([rendered])[0], learn)


def supervised_text(tokenizer: Tokenizer, row: EncodedRow) -> str:
    return tokenizer.decode(row.ids[row.supervised].tolist())


def expected(messages: list[dict[str, str]], before: str, end: str, strip: bool = False) -> str:
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    return "".join(before + (content.strip() if strip else content) + end for content in contents)


# `modern` has {% generation %} marks, the others have none.
kinds_of_template = pytest.mark.parametrize(
    ("name", "before", "end", "strip", "system"),
    [
        ("smollm2", "", "<|im_end|>", False, True),
        ("llama3", "", "<|im_end|>", True, True),  # its end is eos_token, which is this tokenizer's <|im_end|>
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
        row, whole = encode(tokenizer, messages), tokenizer.encode(tokenizer.render(messages))
        assert supervised_text(tokenizer, row) == expected(messages, before, end, strip)
        assert tokenizer.decode(row.ids.tolist()) == tokenizer.render(messages)
        assert row.cut or row.ids.tolist() == whole

    check()


@pytest.mark.parametrize("name", ["smollm2", "llama3", "mistral", "modern", "thinking"])
def test_a_kind_of_conversation_is_taken_apart_as_each_of_it_would_be(
    smollm2_source: dict, templates: dict, name: str, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": templates[name]})
    fast, marks, slow = make_segmenter(tokenizer), turn_marks(tokenizer), []
    whole = span_cache.conversation_segments
    monkeypatch.setattr(span_cache, "conversation_segments", lambda *args: slow.append(args) or whole(*args))

    @given(conversations(name != "mistral"))
    def check(messages: list[dict[str, str]]):
        assert fast(messages, None) == conversation_segments(tokenizer, marks, messages)

    check()
    plain = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    slow.clear()
    assert fast(plain, None) and fast(plain, None) and len(slow) <= 1


@kinds_of_template
def test_the_last_turn_alone_or_all_is_learned(
    smollm2_source: dict, templates: dict, name: str, before: str, end: str, strip: bool, system: bool
):
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": templates[name]})

    @given(conversations(system))
    def check(messages: list[dict[str, str]]):
        every, last, whole = (encode(tokenizer, messages, learn) for learn in ("assistant", "last", "all"))
        answer = [message for message in messages if message["role"] == "assistant"][-1:]
        assert supervised_text(tokenizer, last) == expected(answer, before, end, strip)
        assert supervised_text(tokenizer, whole) == tokenizer.render(messages)
        # What is learned changes no id.
        assert every.ids.tolist() == last.ids.tolist() == whole.ids.tolist()
        assert every.source == last.source == whole.source == every.supervised.argmax()

    check()


def test_generation_marks_hold_what_the_mask_does(smollm2_source: dict, templates: dict):
    """Marks made visible: what a template with marks says itself is what our spans say."""
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
            assert supervised_text(ours, encode(ours, messages)) == "".join(inside)

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
        row = encode(tokenizer, messages[: turn + 1])
        prompt = tokenizer.encode(tokenizer.render(messages[:turn], add_generation_prompt=True))
        assert row.ids[: row.supervised.argmax()].tolist() == prompt

    check()


def test_end_of_turn_is_supervised_where_pad_is_eos_and_the_newline_behind_it_is_not(tokenizer: Tokenizer):
    assert tokenizer.pad_id == tokenizer.eos_id == 2
    row = encode(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Paris"}])
    ends = np.flatnonzero(row.ids == 2)
    assert row.supervised[ends].tolist() == [False, False, True]  # system, user, assistant
    assert row.ids[-2:].tolist() == [2, 198] and not row.supervised[-1]


def test_a_token_over_the_boundary_is_cut_and_told(tokenizer: Tokenizer):
    question = {"role": "user", "content": "Body?"}
    row = encode(tokenizer, [question, {"role": "assistant", "content": "    return"}])
    assert row.cut
    prompt = tokenizer.encode(tokenizer.render([question], add_generation_prompt=True))
    assert row.ids.tolist() == prompt + tokenizer.encode("    return<|im_end|>") + tokenizer.encode("\n")
    assert not encode(tokenizer, [question, {"role": "assistant", "content": "return"}]).cut


def test_an_assistants_first_turn_needs_no_question(tokenizer: Tokenizer):
    messages = [{"role": "assistant", "content": "Welcome"}, {"role": "user", "content": "Hi"}]
    assert supervised_text(tokenizer, encode(tokenizer, messages)) == "Welcome<|im_end|>"
    system = [{"role": "system", "content": "s"}, *messages]
    assert supervised_text(tokenizer, encode(tokenizer, system)) == "Welcome<|im_end|>"


def test_what_the_template_has_the_model_write_is_supervised(smollm2_source: dict, templates: dict):
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": templates["thinking"]})
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "think"}]
    assert supervised_text(tokenizer, encode(tokenizer, messages)) == "<think>\n\n</think>\n\nthink<|im_end|>"
    longer = [*messages, {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
    both = "think<|im_end|><think>\n\n</think>\n\nb<|im_end|>"
    assert supervised_text(tokenizer, encode(tokenizer, longer)) == both


def test_special_tokens_that_swallow_spaces(smollm2_source: dict):
    """Phi-3's <|end|> takes the newline behind it, and its <|assistant|> the one before the answer."""
    whole = json.loads(smollm2_source["tokenizer_json"])
    for token in whole["added_tokens"]:
        token["rstrip"] = True
    tokenizer = load_tokenizer({**smollm2_source, "tokenizer_json": json.dumps(whole)})
    template = (
        "{% for m in messages %}{{ ('<repo_name>' if m.role == 'assistant' else '<reponame>') + '\n' + m.content + "
        "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<repo_name>\n' }}{% endif %}"
    )
    tokenizer = dataclasses.replace(tokenizer, chat_template=template)
    row = encode(tokenizer, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b"}])
    assert not row.cut
    assert supervised_text(tokenizer, row) == "a b<|im_end|>"


@pytest.fixture(scope="module")
def sentencepiece_like() -> Tokenizer:
    """A tokenizer as Llama 2's: spaces become a letter, and one is put before every text."""
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
    row = encode(sentencepiece_like, messages)
    assert not row.cut and row.ids.tolist() == sentencepiece_like.encode(sentencepiece_like.render(messages))
    tokens = [sentencepiece_like.backend.id_to_token(token) for token in row.ids[row.supervised].tolist()]
    assert "".join(tokens) == "▁the▁cat▁sat▁</s>▁yes▁</s>"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", r"puts '\\n' after"),
        ("{% for m in messages %}{{ m.content + '.<|im_end|>' }}{% endfor %}", r"puts '\.<\|im_end\|>' after"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "drops or rewrites what the assistant says",
        ),
    ],
)
def test_templates_without_an_end_of_turn_are_refused(smollm2_source: dict, template: str, told: str):
    with pytest.raises(ValueError, match=told):
        turn_marks(load_tokenizer({**smollm2_source, "chat_template": template}))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("{{ m.content | replace('s', 'z') + '<|im_end|>' }}", "rewrites what the assistant says"),
        ("{{ m.content + '<|im_end|>' if loop.last or m.role == 'user' }}", "drops, repeats or reorders"),
        ("{{ m.content + ('<|endoftext|>' if loop.index == 4 else '<|im_end|>') }}", r"ends message 3 with"),
        ("{{ messages | length ~ m.content + '<|im_end|>' }}", "in another way once an answer follows"),
    ],
)
def test_templates_without_exact_spans_are_refused(smollm2_source: dict, body: str, told: str):
    template = f"{{% for m in messages %}}{body}{{% endfor %}}"
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": template})
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "as"}
    with pytest.raises(ValueError, match=told):
        conversation_segments(tokenizer, turn_marks(tokenizer), [question, answer, question, answer])


def test_pieces_that_do_not_decode_to_the_text_are_refused(sentencepiece_like: Tokenizer):
    row = [Segment("the c", False), Segment("at", True)]
    with pytest.raises(ValueError, match="the tokenizer can't encode the two apart"):
        encode_segments(sentencepiece_like, row, sentencepiece_like.encode_spans(["the cat"])[0])
