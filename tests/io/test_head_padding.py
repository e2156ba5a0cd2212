"""The padding token of exported heads ends no text, whatever the base calls padding."""

import dataclasses

import pytest

from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, with_new_tokens
from qlora_jax.io.head_file import Padding, head_padding, padded_tokenizer
from tests.io.tiny_tokenizers import byte_level

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"


def tokenizer_of(**special: str) -> Tokenizer:
    return load_tokenizer({"tokenizer_json": byte_level(), "chat_template": None, **special})


@pytest.mark.parametrize(
    ("special", "template", "stop", "config", "expected"),
    [
        ({"eos_token": END, "bos_token": END, "unk_token": END}, None, [0], {}, Padding(1, START)),
        ({"eos_token": STOP, "pad_token": STOP, "bos_token": START}, TEMPLATE, [2], {}, Padding(0, END)),
        ({"eos_token": STOP, "pad_token": STOP, "bos_token": START}, TEMPLATE, [0, 2], {}, Padding(1, START)),
        ({"eos_token": STOP, "pad_token": START}, None, [2], {}, Padding(1, START)),
        ({"eos_token": STOP}, None, [], {"pad_token_id": 1, "eos_token_id": [0, 2]}, Padding(1, START)),
        ({"eos_token": STOP, "pad_token": STOP}, TEMPLATE, [0, 2], {}, Padding(None, None)),
    ],
    ids=["free", "template", "begin", "own", "config", "none"],
)
def test_padding_is_a_special_token_that_ends_no_text(special, template, stop, config, expected):
    tokenizer = dataclasses.replace(tokenizer_of(**special), chat_template=template)
    padding = head_padding(tokenizer, config, stop)
    assert padding == expected
    assert padded_tokenizer(tokenizer, padding).pad_id == (tokenizer.pad_id if padding.id is None else padding.id)


def test_a_token_named_as_padding_comes_first_and_new_tokens_never():
    tokenizer = tokenizer_of(eos_token=STOP, pad_token=STOP)
    new = with_new_tokens(tokenizer, [], ["<|pad|>"])
    assert head_padding(new, {}, [2]) == Padding(0, END)
    assert head_padding(dataclasses.replace(new, new_ids=()), {}, [2]).token == "<|pad|>"
