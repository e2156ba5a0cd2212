"""Variables for chat templates: the template gets those that it reads, and another raises an error that names it."""

import pytest

from qlora_jax.data.tokenizer.render_batches import template_variables
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, with_template_kwargs

# Reads three variables: one has a default as in SmolLM3's template, one is only tested.
THINKING = """{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif -%}
{%- macro turn(role, text) %}{{ '<|im_start|>' ~ role ~ '\n' ~ text ~ '<|im_end|>\n' }}{% endmacro -%}
{%- if custom_instructions is defined %}{{ turn('system', custom_instructions) }}{% endif -%}
{%- for message in messages %}{{ turn(message.role, message.content) }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if not enable_thinking %}{{ '<think>\n\n</think>\n' }}
{%- endif %}{{ ' ' * depth if depth else '' }}{% endif -%}"""


@pytest.fixture(scope="module")
def thinking(smollm2_source: dict) -> Tokenizer:
    return load_tokenizer({**smollm2_source, "chat_template": THINKING})


def test_names_that_the_template_reads():
    assert template_variables(THINKING) == {"enable_thinking", "custom_instructions", "depth"}
    assert (
        template_variables("{% for a, b in messages %}{{ a }}{{ bos_token }}{{ strftime_now('%x') }}{% endfor %}")
        == set()
    )
    assert template_variables("{% for %}") == set()  # rendering reports it
    assert template_variables("{{ 'a' * 10 ** 12 ~ x }}") == {"x"}  # nothing is computed


def test_every_rendering_gets_the_variables(thinking: Tokenizer):
    question = [{"role": "user", "content": "Hi"}]
    assert not thinking.render(question, add_generation_prompt=True).endswith("</think>\n")
    without = with_template_kwargs(thinking, {"enable_thinking": False}, "chat_template_kwargs")
    assert without.render(question, add_generation_prompt=True).endswith("assistant\n<think>\n\n</think>\n")
    spoken = with_template_kwargs(thinking, {"custom_instructions": "Be brief."}, "chat_template_kwargs")
    assert spoken.render(question).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_variables_that_nothing_reads_are_refused_by_name(thinking: Tokenizer, plain_tokenizer: Tokenizer):
    with pytest.raises(ValueError) as error:
        with_template_kwargs(
            thinking, {"enable_thinkin": False, "messages": "x", "turn": "y"}, "data.chat_template_kwargs"
        )
    told = str(error.value)
    assert told.startswith("data.chat_template_kwargs: ") and "found 'enable_thinkin', 'messages'" in told
    assert "did you mean 'enable_thinking'" in told and "'turn'" not in told.split("expected")[1]
    with pytest.raises(ValueError, match="no chat template"):
        with_template_kwargs(plain_tokenizer, {"enable_thinking": False}, "chat_template_kwargs")
