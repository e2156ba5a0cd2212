"""The template is taken apart once for all conversations with the same roles."""

import pytest

from qlora_jax.data.loss_mask import span_cache
from qlora_jax.data.loss_mask.span_cache import make_segmenter
from qlora_jax.data.loss_mask.turn_branches import RowText
from qlora_jax.data.tokenizer.render_batches import run_together
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer


@pytest.mark.parametrize("name", ["smollm2", "llama3", "mistral", "modern", "thinking"])
def test_conversations_with_the_same_roles_share_spans(
    smollm2_source: dict, templates: dict, name: str, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": templates[name]})
    search, calls = make_segmenter(tokenizer), []
    conversation_segments = span_cache.conversation_segments
    monkeypatch.setattr(
        span_cache, "conversation_segments", lambda *args: calls.append(args) or conversation_segments(*args)
    )
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
