"""Conversations, rows of segments and tokenizers that are hard to mask."""

import json

from hypothesis import strategies as st

from qlora_jax.data.branch_tree import Branch
from qlora_jax.data.formats.row_format import Segment
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.data.conftest import LLAMA3, MISTRAL, MODERN, THINKING, ZEPHYR, sentencepiece_tokenizer

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

short_texts = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["    return", "é\u0301", " ", "<|im_end|>", "</s>", "<s>", "<table>", "fox jumps"]
)
segment_lists = st.lists(st.builds(Segment, short_texts, st.booleans()), min_size=1, max_size=5)


@st.composite
def conversations(draw: st.DrawFn, system: bool = True) -> list[dict[str, str]]:
    """Alternating turns, sometimes a system turn first, sometimes a last question without an answer."""
    messages = [{"role": "system", "content": draw(text)}] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(text)})
        messages.append({"role": "assistant", "content": draw(answers)})
    return [*messages, {"role": "user", "content": draw(text)}] if draw(st.booleans()) else messages


TEMPLATES = {"llama3": LLAMA3, "mistral": MISTRAL, "modern": MODERN, "thinking": THINKING, "zephyr": ZEPHYR}


def make_tokenizer(name: str, smollm2_source: dict, smollm2_template: str, template: str = "smollm2") -> Tokenizer:
    """A byte-level tokenizer, one whose special tokens swallow the spaces after them, or a SentencePiece tokenizer."""
    if name in ("never", "first", "every"):
        source = {"tokenizer_json": sentencepiece_tokenizer(name).to_json(), "bos_token": "<s>", "eos_token": "</s>"}
    else:
        source, whole = smollm2_source, json.loads(smollm2_source["tokenizer_json"])
        for token in whole["added_tokens"]:
            token["rstrip"] = name == "swallowing"
        source = {**source, "tokenizer_json": json.dumps(whole)}
    return load_tokenizer({**source, "chat_template": TEMPLATES.get(template, smollm2_template)})


def as_lists(row: EncodedRow) -> tuple[list[int], list[bool], int, bool, bool, tuple[Branch, ...]]:
    return row.ids.tolist(), row.supervised.tolist(), row.source, row.cut, row.lossy, row.branches
