"""Teachers behind endpoints: their predictions are those of whole texts, and wrong replies raise errors."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.config import Config, DataArgs, DistillationArgs, ModelArgs
from qlora_jax.data.batching.batches import fill_batch
from qlora_jax.data.branch_tree import whole_texts
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.io.pretrained import open_base
from qlora_jax.openai_client import Endpoint
from qlora_jax.training.teacher import endpoint as of_endpoint
from qlora_jax.training.teacher.endpoint import PROBE, EndpointSource
from qlora_jax.training.teacher.logprob_cache import Arrays, Predictions, TeacherError
from qlora_jax.training.teacher.sources import open_teacher
from tests.e2e.project import served_teacher, write_model
from tests.studies.tournament.judges.fake_endpoint import Answer, FakeEndpoint, Plan, fake_endpoint
from tests.training.preference_rows import pair_rows, random_pairs

VOCABULARY, COUNT, LENGTH = 258, 5, 64
Reply = dict[str, Any]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(of_endpoint, "WAITS", (0.0, 0.0, 0.0))


def logps_after(ids: list[int]) -> np.ndarray:
    """The scripted teacher's log-probabilities of all tokens after these."""
    logits = np.random.default_rng(ids).normal(0, 3, VOCABULARY)
    return logits - np.log(np.exp(logits).sum())


def vllm_reply(ids: list[int], count: int = COUNT) -> Reply:
    """The reply of vLLM: the text's own token first, then the likeliest ones, and all of it once more by id."""
    places: list[dict[str, float] | None] = [None]
    for place in range(1, len(ids)):
        logps = logps_after(ids[:place])
        ranked = [ids[place], *np.argsort(-logps)[:count].tolist()]
        places.append({f"token_id:{token}": float(logps[token]) for token in ranked})
    logprobs = {"tokens": [f"token_id:{token}" for token in ids], "top_logprobs": places}
    offsets = {"token_logprobs": [None] * len(ids), "text_offset": [0] * len(ids)}
    return {"choices": [{"index": 0, "text": "...", "logprobs": logprobs | offsets, "prompt_logprobs": None}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return open_base(ModelArgs(path=str(model))).tokenizer


def vllm(tokenizer: Tokenizer, change: Callable[[Reply], object] = lambda reply: None) -> Plan:
    """A plan that answers as vLLM does, with a bos token before texts, and changes replies to token ids."""

    def answer(prompt: str, before: int) -> Answer:
        sent = json.loads(prompt)
        reply = vllm_reply([256, *tokenizer.encode(sent)] if isinstance(sent, str) else sent)
        if not isinstance(sent, str):
            change(reply)
        return Answer(body=json.dumps(reply).encode())

    return answer


def source_of(endpoint: FakeEndpoint, tokenizer: Tokenizer, tokens: int = VOCABULARY) -> EndpointSource:
    address = Endpoint(endpoint.url, "m", "secret", 20.0)
    return EndpointSource(endpoint=address, count=COUNT, tokenizer=tokenizer, tokens=tokens)


def packed_trees() -> tuple[Arrays, Predictions]:
    """A micro-batch of packed pairs, and what the scripted teacher says of each of their texts."""
    rows = pair_rows(random_pairs(4, vocabulary=200))
    chosen = np.array([[[2, 0], [1, 3]]])
    batch = fill_batch(rows, chosen, LENGTH, 0, packed=True)
    arrays = {name: array[0] for name, array in batch.arrays().items()}
    ids, logps = np.zeros((2, LENGTH, COUNT), np.int32), np.zeros((2, LENGTH, COUNT + 1), np.float32)
    for b in range(2):
        supervised = iter(np.flatnonzero(arrays["weights"][b]))
        for row in chosen[0, b].tolist():
            for text, mask in whole_texts(*rows.row(row), rows.branches_of(row)):
                for place in np.flatnonzero(mask):
                    found = logps_after(text[:place].tolist())
                    at = b, next(supervised)
                    ids[at] = np.argsort(-found)[:COUNT]
                    logps[at] = [*found[ids[at]], np.log(1 - np.exp(found[ids[at]]).sum())]
    return arrays, Predictions(ids, logps)


def test_packed_trees_get_the_predictions_of_their_texts(tokenizer):
    arrays, expected = packed_trees()
    with fake_endpoint(vllm(tokenizer)) as endpoint:
        found = source_of(endpoint, tokenizer).load(None, lambda *_: None).predict(arrays)
    is_supervised = arrays["weights"] > 0
    np.testing.assert_array_equal(found.ids[is_supervised], expected.ids[is_supervised])
    np.testing.assert_allclose(found.logps[is_supervised], expected.logps[is_supervised], rtol=1e-6)
    probe, *texts = endpoint.requests
    assert probe["prompt"] == PROBE and len(texts) == 8 and set(endpoint.keys) == {"Bearer secret"}
    assert {key: value for key, value in texts[0].items() if key != "prompt"} == {
        "model": "m",
        "max_tokens": 0,
        "echo": True,
        "logprobs": COUNT,
        "return_tokens_as_token_ids": True,
    }


def logprobs_of(reply: Reply) -> dict[str, Any]:
    return reply["choices"][0]["logprobs"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda reply: reply["choices"].clear(), "not a scored text: found no choices"),
        (lambda reply: reply["choices"][0].update(logprobs=None), "logprobs: found None, expected an object"),
        (lambda reply: logprobs_of(reply)["tokens"].pop(), "not a scored text: found .* the same number"),
        (lambda reply: logprobs_of(reply)["tokens"].__setitem__(1, "the"), "found the token 'the', expected token_id:"),
        (lambda reply: logprobs_of(reply)["tokens"].__setitem__(1, "token_id:9"), "scored other tokens than it got"),
        (
            lambda reply: logprobs_of(reply)["top_logprobs"].__setitem__(-1, {"token_id:1": -1.0}),
            "found 1 likeliest tokens in a place, expected 5",
        ),
        (
            lambda reply: logprobs_of(reply)["top_logprobs"].__setitem__(-1, {f"token_id:{i}": -1.0 for i in range(5)}),
            "add up to 1.839, expected at most 1",
        ),
        (
            lambda reply: logprobs_of(reply)["top_logprobs"].__setitem__(
                -1, {f"token_id:{i}": float("nan") for i in range(5)}
            ),
            "add up to nan, expected at most 1",
        ),
        (
            lambda reply: logprobs_of(reply)["top_logprobs"].__setitem__(
                -1, {f"token_id:{i}": -3.0 for i in range(VOCABULARY, VOCABULARY + 5)}
            ),
            "predicts the token 262, expected ids below 258",
        ),
        (lambda reply: reply.update(padding="." * 2_000_000), r"the reply is too large \(found more than \d+ bytes\)"),
    ],
    ids=[
        "no choice",
        "no logprobs",
        "other lengths",
        "texts",
        "other ids",
        "too few",
        "sum",
        "nan",
        "vocabulary",
        "large",
    ],
)
def test_a_wrong_reply_is_an_error_that_says_what_is_wrong(tokenizer, change, problem):
    arrays, _ = packed_trees()
    with fake_endpoint(vllm(tokenizer, change)) as endpoint:
        teacher = source_of(endpoint, tokenizer).load(None, lambda *_: None)
        with pytest.raises(ValueError, match=f"^distillation.teacher: .*{problem}"):
            teacher.predict(arrays)


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ([Answer(status=503)] * 4, "HTTP status 503"),
        ([Answer(body=b'{"choices": [')] * 4, "not a reply of completions: reply, line 1"),
        ([Answer(status=404, body=b"no model m")], "HTTP status 404: 'no model m'"),
        ([Answer(status=400, body=b'{"error": {"message": "at most 20"}}')], r"HTTP status 400: at most 20\."),
        ([Answer(body=json.dumps(vllm_reply([*PROBE.encode()])).encode())], "has another tokenizer"),
    ],
    ids=["down", "cut", "model", "logprobs", "tokenizer"],
)
def test_an_endpoint_that_cannot_teach_is_refused(tokenizer, answers, problem):
    with fake_endpoint(lambda prompt, before: answers[before]) as endpoint:
        with pytest.raises(TeacherError, match=rf"^distillation.teacher: http://127.0.0.1:\d+/v1: {problem}"):
            source_of(endpoint, tokenizer).load(None, lambda *_: None)
        assert len(endpoint.requests) == len(answers)


def test_a_short_failure_is_waited_for(tokenizer):
    plan = vllm(tokenizer)
    with fake_endpoint(lambda prompt, before: plan(prompt, before) if before else Answer(status=500)) as endpoint:
        arrays, expected = packed_trees()
        found = source_of(endpoint, tokenizer).load(None, lambda *_: None).predict(arrays)
    np.testing.assert_array_equal(found.ids[arrays["weights"] > 0], expected.ids[arrays["weights"] > 0])


def test_stored_predictions_belong_to_an_address_and_a_model(tokenizer):
    def key(url: str = "http://a/v1", model: str = "m", count: int = 5) -> str:
        address = Endpoint(url, model, None, 1.0)
        return EndpointSource(endpoint=address, count=count, tokenizer=tokenizer, tokens=258).key

    assert key() == key("http://a/v1/") != key("http://b/v1")
    assert len({key(), key(model="n"), key(count=6)}) == 3


def test_our_own_server_predicts_what_the_same_model_does_here(model, tokenizer):
    arrays, _ = packed_trees()
    here = DistillationArgs(teacher=str(model))
    features = open_base(ModelArgs(path=str(model))).features
    with served_teacher(model) as url:
        found = []
        for args in here, dataclasses.replace(here, teacher=url, teacher_model="model"):
            base = ModelArgs(path=str(model), compute_dtype="float32")
            config = Config(
                model=base, data=DataArgs(train="rows.jsonl"), objective="distill", distillation=args, output="o"
            )
            source = open_teacher(config, tokenizer, features)
            assert source is not None
            found.append(source.load(None, lambda *_: None).predict(arrays))
    local, remote = (each.logps[arrays["weights"] > 0] for each in found)
    np.testing.assert_allclose(remote[:, :-1], local[:, :-1], atol=1e-4)
    np.testing.assert_allclose(np.exp(remote[:, -1]), np.exp(local[:, -1]), atol=1e-4)
    same = [np.sort(each.ids[arrays["weights"] > 0], axis=1) for each in found]
    assert np.mean(same[0] == same[1]) > 0.99
