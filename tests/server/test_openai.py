"""OpenAI's own client against the server: chats, streams, choices, log-probabilities, completions, embeddings."""

import openai
import pytest

from tests.server.conftest import Start, echo
from tests.server.scripted_engine import scored

HI = [{"role": "user", "content": "Hi"}]
REPLY = "I am a. Straße, naïve café: 1, 2, 3."


@pytest.fixture(scope="module")
def served(serve: Start):
    with serve(echo) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_is_answered_by_the_model_that_is_named(client, tokenizer):
    found = client.chat.completions.create(model="a", messages=HI)
    assert found.choices[0].message.content == REPLY
    assert found.choices[0].finish_reason == "stop" and found.model == "a"
    prompt = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert found.usage.prompt_tokens == len(prompt)
    assert found.usage.completion_tokens == len(tokenizer.encode(REPLY))
    assert "the base" in client.chat.completions.create(model="base", messages=HI).choices[0].message.content


def test_a_stream_adds_up_to_the_reply(client):
    options = {"include_usage": True}
    chunks = [*client.chat.completions.create(model="a", messages=HI, stream=True, stream_options=options)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == REPLY
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 10 and chunks[0].usage is None
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 10


def test_settings_reach_the_engine(client, served):
    client.chat.completions.create(
        model="a",
        messages=HI,
        n=3,
        seed=7,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"5": -100, "6": 1.5},
        max_completion_tokens=99,
        stop=["zzz"],
        extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "stop_token_ids": [9]},
    )
    first, second, third = served.engine.seen[-3:]
    assert (first.repeat, second.repeat, third.repeat) == (0, 1, 2)
    sampling = first.sampling
    assert (sampling.seed, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 0.5, 0.9, 3)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.25, -0.5)
    assert sampling.logit_bias == ((5, -100.0), (6, 1.5))
    assert first.max_new_tokens == 99 and first.stop_texts == ("zzz",) and 9 in first.stop_ids
    client.chat.completions.create(model="a", messages=HI)
    client.chat.completions.create(model="a", messages=HI)
    unseeded = served.engine.seen[-2:]
    assert unseeded[0].sampling.temperature == 1 and unseeded[0].max_new_tokens == 300
    assert unseeded[0].sampling.seed != unseeded[1].sampling.seed


def test_choices_come_with_their_index(client):
    found = client.chat.completions.create(model="a", messages=HI, n=2)
    assert [(choice.index, choice.message.content) for choice in found.choices] == [(0, REPLY), (1, REPLY)]
    chunks = client.chat.completions.create(model="a", messages=HI, n=2, stream=True)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: REPLY, 1: REPLY}


def test_a_reply_ends_at_its_limit_or_before_a_stop_text(client):
    cut = client.chat.completions.create(model="a", messages=HI, max_tokens=3)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3
    stopped = client.chat.completions.create(model="a", messages=HI, stop=[" café", "never"])
    assert stopped.choices[0].message.content == "I am a. Straße, naïve" and stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_every_token(client, tokenizer, stream):
    ids = tokenizer.encode(REPLY)
    found = client.chat.completions.create(
        model="a", messages=HI, logprobs=True, top_logprobs=2, stream=stream, extra_body={"return_token_ids": True}
    )
    if stream:
        chunks = [chunk for chunk in found if chunk.choices]
        tokens = [token for chunk in chunks for token in (chunk.choices[0].logprobs or EMPTY).content]
        sent = [token for chunk in chunks for token in (chunk.choices[0].model_extra.get("token_ids") or [])]
        prompt = chunks[0].model_extra["prompt_token_ids"]
    else:
        tokens, sent = found.choices[0].logprobs.content, found.choices[0].model_extra["token_ids"]
        prompt = found.model_extra["prompt_token_ids"]
    assert sent == ids and tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == REPLY
    assert [token.logprob for token in tokens] == [scored(token, 2).log_p for token in ids]
    assert all(len(token.top_logprobs) == 2 and token.top_logprobs[0].token == token.token for token in tokens)


class EMPTY:
    content = ()


def test_completions_continue_a_text(client, tokenizer, served):
    found = client.completions.create(model="plain", prompt="Once upon", max_tokens=4, logprobs=1)
    choice = found.choices[0]
    assert (
        choice.text == tokenizer.decode(tokenizer.encode("I am the base. Stra")[:4])
        and choice.finish_reason == "length"
    )
    assert served.engine.seen[-1].prompt == tokenizer.encode("Once upon")
    assert "".join(choice.logprobs.tokens) == choice.text and choice.logprobs.text_offset[:2] == [0, 1]
    chunks = [*client.completions.create(model="a", prompt="Once", stream=True, max_tokens=100)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == REPLY
    several = client.completions.create(model="a", prompt=["x y", "z"], n=2, max_tokens=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.usage.prompt_tokens == len(tokenizer.encode("x y")) + 1


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("as_ids", [False, True])
def test_a_harness_gets_the_log_probabilities_of_its_prompts(client, tokenizer, max_tokens, as_ids):
    """lm-evaluation-harness' local-completions sends `echo`, `logprobs` and a batch of texts or ids."""
    texts = ["The cat sat.", "Naïve"]
    ids = [tokenizer.encode(text) for text in texts]
    found = client.completions.create(
        model="a", prompt=ids if as_ids else texts, max_tokens=max_tokens, logprobs=1, echo=True, temperature=0
    )
    for text, own, choice in zip(texts, ids, found.choices, strict=True):
        logprobs = choice.logprobs
        assert choice.text.startswith(text) and len(logprobs.tokens) == len(own) + max_tokens
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        assert logprobs.token_logprobs[1 : len(own)] == [scored(token, 1).log_p for token in own[1:]]
        assert all(
            log_p == max(top.values())
            for log_p, top in zip(logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True)
        )
        assert [
            text[start:].startswith(token)
            for start, token in zip(logprobs.text_offset[:2], logprobs.tokens, strict=False)
        ] == [True, True]


@pytest.mark.parametrize("stream", [False, True])
def test_a_student_gets_the_likeliest_tokens_by_their_ids(client, tokenizer, stream):
    ids = tokenizer.encode("The cat sat.")
    asked = {"max_tokens": 2, "echo": True} if not stream else {"stream": True, "max_tokens": 1}
    named = {"return_tokens_as_token_ids": True}
    found = client.completions.create(model="a", prompt=ids, logprobs=64, extra_body=named, **asked)
    logprobs = (next(iter(found)) if stream else found).choices[0].logprobs
    tokens, top = [int(token.removeprefix("token_id:")) for token in logprobs.tokens], logprobs.top_logprobs[-1]
    assert stream or tokens[: len(ids)] == ids
    assert top == {f"token_id:{token}": log_p for token, log_p in scored(tokens[-1], 64).likeliest}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logprobs": 257}, "logprobs: found 257, expected at most 256"),
        ({"logprobs": 256, "prompt": [[1] * 500] * 9}, "logprobs: found 1,156,500 log-probabilities of prompts, expe"),
    ],
)
def test_too_many_log_probabilities_are_refused(client, fields, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(**{"model": "a", "prompt": [1, 2], "echo": True, "max_tokens": 0, **fields})


def test_embeddings_of_runs_with_that_head(client, tokenizer):
    found = client.embeddings.create(model="vectors", input=["one", "two three"])
    lengths = [len(tokenizer.encode(text)) for text in ("one", "two three")]
    assert [row.embedding for row in found.data] == [[length, 1.0, -0.5] for length in lengths]
    assert found.usage.prompt_tokens == sum(lengths)
    plain = client.embeddings.create(model="vectors", input="one", encoding_format="float")
    assert plain.data[0].embedding == found.data[0].embedding
    with pytest.raises(openai.BadRequestError, match="a has no embedding head"):
        client.embeddings.create(model="a", input="x")
    with pytest.raises(openai.BadRequestError, match="vectors gives embeddings"):
        client.chat.completions.create(model="vectors", messages=HI)


def test_models_are_those_that_are_served(client):
    assert [(model.id, model.model_extra["parent"]) for model in client.models.list()] == [
        ("base", None),
        ("a", "base"),
        ("plain", None),
        ("vectors", "base"),
    ]
    assert client.models.retrieve("a").model_extra["root"] == "/models/a"


@pytest.mark.parametrize(
    ("error", "fields", "message"),
    [
        (openai.NotFoundError, {"model": "b"}, "model: 'b' is not served"),
        (openai.BadRequestError, {"model": "plain"}, "plain has no chat template"),
        (openai.BadRequestError, {"messages": []}, "messages: found"),
        (
            openai.BadRequestError,
            {"messages": [{"role": "user", "content": "x " * 600}]},
            "has .* tokens; prompt and reply have room for 512",
        ),
        (openai.BadRequestError, {"max_tokens": 301}, "max_tokens: found 301, expected at most 300"),
        (openai.BadRequestError, {"max_tokens": 3, "max_completion_tokens": 3}, "which means the same"),
        (openai.BadRequestError, {"temperature": 3}, "temperature: found 3, expected at most 2"),
        (openai.BadRequestError, {"store": True}, "store: not implemented"),
        (openai.BadRequestError, {"logit_bias": {"99999999": 1}}, "logit_bias: 99999999 is not a token"),
        (openai.BadRequestError, {"logit_bias": {"5": 1, "05": 2}}, "logit_bias.05"),
        (openai.BadRequestError, {"top_logprobs": 2}, "top_logprobs: requires logprobs"),
        (openai.BadRequestError, {"audio": {"voice": "x", "format": "wav"}}, "audio: not implemented"),
        (openai.BadRequestError, {"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template: not implemented"),
        (openai.BadRequestError, {"extra_body": {"chat_template_kwargs": {"zz": 1}}}, "chat_template_kwargs: .*zz"),
        (
            openai.BadRequestError,
            {"reasoning_effort": "low"},
            "reasoning_effort: the model's chat template does not",
        ),
        (
            openai.BadRequestError,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]}]},
            "messages.0.content.0.type: found 'image_url', expected 'text'",
        ),
        (
            openai.BadRequestError,
            {"messages": [{"role": "user", "content": "x", "name": "Bo"}]},
            "name: not implemented",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused(client, served, error, fields, message):
    before = len(served.engine.seen)
    with pytest.raises(error, match=message) as found:
        client.chat.completions.create(**{"model": "a", "messages": HI, **fields})
    assert len(served.engine.seen) == before
    body = found.value.response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}


def test_values_that_change_nothing_are_accepted(client):
    found = client.chat.completions.create(
        model="a",
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        modalities=["text"],
        response_format={"type": "text"},
        extra_body={"best_of": 1, "ignore_eos": False, "audio": None, "prompt_cache_key": "k"},
    )
    assert found.choices[0].message.content == REPLY
