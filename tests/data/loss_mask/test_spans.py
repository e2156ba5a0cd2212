"""Templates without exact spans raise an error that says why."""

import pytest

from qlora_jax.data.loss_mask.spans import conversation_segments
from qlora_jax.data.loss_mask.turns import turn_marks
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", r"writes '\\n' after"),
        ("{% for m in messages %}{{ m.content + '.<|im_end|>' }}{% endfor %}", r"writes '\.<\|im_end\|>' after"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "drops or rewrites the assistant's texts",
        ),
    ],
)
def test_templates_without_an_end_of_turn_are_refused(smollm2_source: dict, template: str, told: str):
    with pytest.raises(ValueError, match=told):
        turn_marks(load_tokenizer({**smollm2_source, "chat_template": template}))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("{{ m.content | replace('s', 'z') + '<|im_end|>' }}", "rewrites the assistant's texts"),
        ("{{ m.content + '<|im_end|>' if loop.last or m.role == 'user' }}", "drops, repeats or reorders"),
        ("{{ m.content + ('<|endoftext|>' if loop.index == 4 else '<|im_end|>') }}", r"ends message 3 with"),
        ("{{ messages | length ~ m.content + '<|im_end|>' }}", "differently once an answer follows"),
    ],
)
def test_templates_without_exact_spans_are_refused(smollm2_source: dict, body: str, told: str):
    template = f"{{% for m in messages %}}{body}{{% endfor %}}"
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": template})
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "as"}
    with pytest.raises(ValueError, match=told):
        conversation_segments(tokenizer, turn_marks(tokenizer), [question, answer, question, answer])
