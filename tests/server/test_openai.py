"""OpenAI's own client against the server: chats, streams, choices, log-probabilities, errors."""

import openai
import pytest

from tests.server.conftest import Start, echo

HI = [{"role": "user", "content": "Hi"}]
REPLY = "I am a. Straße, naïve café: 1, 2, 3."


@pytest.fixture(scope="module")
def client(serve: Start):
    with serve(echo) as served:
        yield openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_a_chat_is_answered_by_the_model_that_is_named(client, tokenizer):
    found = client.chat.completions.create(model="a", messages=HI)
    assert found.choices[0].message.content == REPLY
    assert found.choices[0].finish_reason == "stop" and found.model == "a"
    prompt = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert found.usage.prompt_tokens == len(prompt)
    assert found.usage.completion_tokens == len(tokenizer.encode(REPLY))
    assert "the base" in client.chat.completions.create(model="base", messages=HI).choices[0].message.content


def test_a_stream_adds_up_to_the_reply(client):
    chunks = [
        *client.chat.completions.create(model="a", messages=HI, stream=True, stream_options={"include_usage": True})
    ]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == REPLY
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 10 and chunks[0].usage is None
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 10
