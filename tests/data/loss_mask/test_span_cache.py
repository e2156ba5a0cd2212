"""The template is taken apart once for all conversations of the same kind."""

from typing import Any

import pytest

from qlora_jax.data.loss_mask import span_cache
from qlora_jax.data.loss_mask.span_cache import make_segmenter
from qlora_jax.data.loss_mask.spans import conversation_segments
from qlora_jax.data.loss_mask.turn_branches import RowText
from qlora_jax.data.loss_mask.turns import turn_marks
from qlora_jax.data.tokenizer.render_batches import run_together
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.data.loss_mask.reasoning_templates import REASONING_TEMPLATES

Chat = list[dict[str, Any]]


@pytest.mark.parametrize("name", ["smollm2", "llama3", "mistral", "modern", "thinking"])
def test_conversations_with_the_same_roles_share_spans(
    smollm2_source: dict, templates: dict, name: str, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": templates[name]})
    search, calls = make_segmenter(tokenizer), []
    search_turns = span_cache.search_turns
    monkeypatch.setattr(span_cache, "search_turns", lambda *args: calls.append(args) or search_turns(*args))
    for text in ("a", "b"):
        chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
        (row,) = run_together([search(chat, None)], tokenizer.start_rendering)
        assert isinstance(row, RowText)
        assert (
            "".join(segment.text for segment in row.segments if segment.supervised)
            .strip()
            .startswith((text, "<think>"))
        )
    assert len(calls) == 1


def chat(answers: list[dict[str, Any]], question: bool = False) -> Chat:
    messages: Chat = []
    for number, answer in enumerate(answers):
        messages += [{"role": "user", "content": f"q{number}"}, {"role": "assistant", **answer}]
    return [*messages, {"role": "user", "content": "q"}] if question else messages


def rendered_by(tokenizer: Tokenizer, chats: list[Chat]) -> list[tuple[RowText | ValueError, int]]:
    """The row of each conversation by the fast path, and the number of texts that it had rendered."""
    search, found = make_segmenter(tokenizer), []
    for messages in chats:
        counts: list[int] = []

        def start(groups: Any, counts: list[int] = counts) -> Any:
            counts += map(len, groups)
            return tokenizer.start_rendering(groups)

        (row,) = run_together([search(messages, None)], start)
        found.append((row, sum(counts)))
    return found


PLAIN, OTHER = {"content": "a"}, {"content": "<b> b"}
FIELD, SPACED = {"content": "a", "reasoning_content": "r"}, {"content": "a", "reasoning_content": "\nr\n"}
TAGGED, EMPTY = {"content": "<think>\nthink\n</think>\n\na"}, {"content": "<think></think>a"}


@pytest.mark.parametrize(
    ("name", "answers", "question", "texts"),
    [
        ("qwen3", [PLAIN, OTHER, PLAIN], False, 3),
        ("qwen3", [PLAIN, OTHER], True, 3),  # the whole conversation ends with a question, so it is one more
        ("qwen3", [TAGGED, PLAIN, TAGGED, EMPTY], False, 4),
        ("qwen3", [FIELD, PLAIN, FIELD], False, 3),
        ("qwen3", [SPACED], False, 1),
        ("thinking", [TAGGED, TAGGED], False, 2),
        ("harmony", [FIELD, FIELD], False, 2),
        ("smollm3", [TAGGED, TAGGED], False, 1),  # the template writes all turns alike
        ("chatml", [PLAIN, FIELD], False, 1),
    ],
)
def test_a_row_with_branches_needs_a_text_per_turn(
    smollm2_source: dict, name: str, answers: list[dict[str, Any]], question: bool, texts: int
):
    """The rows equal those of the slow path, which renders each turn's prompt too."""
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": REASONING_TEMPLATES[name]})
    messages = chat(answers, question)
    ((row, count),) = rendered_by(tokenizer, [messages])
    assert row == conversation_segments(tokenizer, turn_marks(tokenizer), messages)
    assert count == texts


@pytest.mark.parametrize(
    ("change", "answers"),
    [
        ("{% if 'odd' in m.content %}!{% endif %}", [{"content": "odd"}, PLAIN]),  # depends on the content
        ("", [{"content": " a "}, {"content": "a", "reasoning_content": "  r"}]),  # space that the template keeps
    ],
)
def test_a_row_that_the_placeholders_do_not_describe_takes_the_slow_path(
    smollm2_source: dict, change: str, answers: list[dict[str, Any]]
):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + change + "{% if loop.last and m.role == 'assistant' %}"
        "<think>{{ m.reasoning_content | default('') | trim }}</think>{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": template})
    slow = conversation_segments
    for messages in (chat(answers), chat([PLAIN, PLAIN])):
        ((row, _),) = rendered_by(tokenizer, [messages])
        try:
            expected: RowText | str = slow(tokenizer, turn_marks(tokenizer), messages)
        except ValueError as error:
            expected = str(error)
        assert (str(row) if isinstance(row, ValueError) else row) == expected


def test_a_call_without_text_takes_the_slow_path(smollm2_source: dict):
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": REASONING_TEMPLATES["qwen3"]})
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    messages = [{"role": "user", "content": "q"}, call]
    ((row, _),) = rendered_by(tokenizer, [messages])
    assert row == conversation_segments(tokenizer, turn_marks(tokenizer), messages)
