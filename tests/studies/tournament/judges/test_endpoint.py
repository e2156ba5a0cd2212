"""A judge behind an endpoint that fails, stalls and answers nonsense."""

import collections
import itertools
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.studies.tournament.judges.endpoint import EndpointJudge
from qlora_jax.studies.tournament.judges.judge import SYSTEM, Attempts, JudgeStopped
from qlora_jax.studies.tournament.settings import EndpointArgs
from tests.studies.tournament.judges.fake_endpoint import Answer, Plan, fake_endpoint
from tests.studies.tournament.tiny_tournament import (
    INSTRUCTION,
    arena_args,
    right_verdict,
    transcripts_of,
    write_judge_prompts,
    write_tournament,
)


def right(message: str, before: int) -> Answer:
    return Answer(f"A comparison.\n{right_verdict(message)}")


def judge_with(folder: Path, plan: Plan, found: list | None = None, **settings: Any) -> tuple[Any, Any, list]:
    """(the endpoint, the transcripts, the judgements) of all matches of a tiny tournament."""
    transcripts = transcripts_of(arena_args(**write_tournament(folder)))
    found = [] if found is None else found
    with fake_endpoint(plan) as endpoint:
        args = EndpointArgs(
            **{"url": endpoint.url, "model": "m", "prompts": write_judge_prompts(folder), "backoff": 0.01} | settings
        )
        EndpointJudge(args).judge(transcripts.matches(), transcripts, found.append)
    return endpoint, transcripts, found


def test_requests_are_the_references(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "secret")
    arrived = threading.Barrier(3)  # three requests have to wait at the same time: 24 are eight times three

    def plan(message: str, before: int) -> Answer:
        arrived.wait(60)
        return right(message, before)

    endpoint, transcripts, found = judge_with(tmp_path, plan, key_variable="TEST_KEY", concurrency=3, timeout=60)
    assert len(found) == len(endpoint.requests) == 24
    assert endpoint.most == 3
    assert {key for key in endpoint.keys} == {"Bearer secret"}
    for body in endpoint.requests:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.2, 1024)
        assert body["messages"][0] == {"role": "system", "content": SYSTEM}
    instructions = collections.Counter(
        body["messages"][1]["content"].split("[System]\n")[1] for body in endpoint.requests
    )
    assert instructions == {f"{INSTRUCTION}\n\n": 12, f"Run the code. {INSTRUCTION}\n\n": 12}
    match = found[0].match
    first, _ = transcripts.answers(match)
    expected = f"[Question]\n{transcripts.question(match)}\n\n[The Start of Assistant 1's Answer]\n{first}\n\n"
    assert any(body["messages"][1]["content"].startswith(expected) for body in endpoint.requests)
    assert {one.match for one in found} == {*transcripts.matches()}


def test_failures_stalls_and_nonsense_are_retried_and_counted(tmp_path):
    bad = {
        0: Answer(status=500),
        1: Answer(status=429, headers={"Retry-After": "0"}),
        2: Answer(seconds=2),
        3: Answer(trickle=0.05),
        4: Answer(body=b"<html>not JSON"),
        5: Answer(body=b'{"choices": []}'),
        6: Answer("I cannot decide."),
        7: Answer("1\nwas my verdict"),
    }
    order: dict[str, int] = {}
    lock = threading.Lock()

    def plan(message: str, before: int) -> Answer:
        with lock:
            kind = order.setdefault(message, len(order)) % len(bad)
        return bad[kind] if before == 0 else right(message, before)

    _, transcripts, found = judge_with(tmp_path, plan, timeout=1, retries=3)
    assert len(found) == 24
    for one in found:
        prompt = " ".join(transcripts.answers(one.match))
        assert one.verdict == right_verdict(prompt)
    total = Attempts(*map(sum, zip(*(one.attempts for one in found), strict=True)))
    assert total == Attempts(failed=12, timed_out=6, unreadable=6)


def test_a_match_without_a_verdict_is_reported(tmp_path):
    def plan(message: str, before: int) -> Answer:
        return (
            Answer("no idea")
            if "number 1" in message
            else Answer(status=400)
            if "number 2" in message
            else right(message, 0)
        )

    endpoint, _, found = judge_with(tmp_path, plan, retries=1, concurrency=1)
    by_prompt = collections.Counter((one.match.prompt, one.verdict in (1, 2, 3), one.attempts) for one in found)
    assert by_prompt == {
        ("10", True, Attempts()): 6,
        ("11", False, Attempts(unreadable=2)): 6,
        ("12", False, Attempts(failed=1)): 6,  # such a request fails again, so it is sent once
        ("13", True, Attempts()): 6,
    }
    assert {one.verdict for one in found if one.match.prompt == "11"} == {-1}
    assert {one.verdict for one in found if one.match.prompt == "12"} == {None}
    assert all("HTTP status 400" in one.problem for one in found if one.match.prompt == "12")
    assert len(endpoint.requests) == 6 + 12 + 6 + 6


def test_a_prompt_that_is_too_long_does_not_stop_the_judge(tmp_path):
    settings = write_tournament(tmp_path)
    settings["systems"]["delta-system"] = settings["systems"]["beta-system"]  # 12 matches per prompt
    transcripts = transcripts_of(arena_args(**settings))

    def plan(message: str, before: int) -> Answer:
        return Answer(status=400) if "number 1" in message else right(message, before)

    found = []
    with fake_endpoint(plan) as endpoint:
        args = EndpointArgs(url=endpoint.url, model="m", prompts=write_judge_prompts(tmp_path), concurrency=1)
        EndpointJudge(args).judge(transcripts.matches(), transcripts, found.append)
    verdicts = collections.Counter((one.match.prompt, one.verdict is None) for one in found)
    assert verdicts == {("10", False): 12, ("11", True): 12, ("12", False): 12, ("13", False): 12}


def test_a_reply_that_was_on_its_way_when_the_judge_stopped_is_recorded(tmp_path):
    first, refused, found = threading.Lock(), threading.Event(), []

    def plan(message: str, before: int) -> Answer:
        if first.acquire(blocking=False):
            refused.wait(10)
            return right(message, 0)._replace(seconds=0.5)
        refused.set()
        return Answer(status=401)

    with pytest.raises(JudgeStopped, match="HTTP status 401"):
        judge_with(tmp_path, plan, found, concurrency=2)
    assert [one.verdict in (1, 2, 3) for one in found] == [True]


@pytest.mark.parametrize(
    ("answer", "most", "message"),
    [
        (Answer(status=401), 4, r"HTTP status 401.*Check url, model and key_variable"),
        (Answer(status=302, headers={"Location": "http://127.0.0.1:1/"}), 4, r"HTTP status 302"),
        (Answer(status=503), 14, r"no reply to 10 matches in succession \(last: HTTP status 503"),
    ],
)
def test_a_judge_that_never_answers_stops(tmp_path, answer, most, message):
    requests = []

    def plan(text: str, before: int) -> Answer:
        requests.append(text)
        return answer

    with pytest.raises(JudgeStopped, match=message) as error:
        judge_with(tmp_path, plan, retries=0)
    assert len(requests) <= most
    assert "secret" not in str(error.value)


def test_ctrl_c_ends_at_once_and_nothing_is_sent_or_recorded_later(tmp_path):
    numbers, released = itertools.count(1), threading.Event()

    def plan(message: str, before: int) -> Answer:
        if (number := next(numbers)) == 9:  # the 8th waits, so both threads do
            os.kill(os.getpid(), signal.SIGINT)
        if number >= 8:
            released.wait(60)
        return right(message, before)

    transcripts = transcripts_of(arena_args(**write_tournament(tmp_path)))
    found = []
    with fake_endpoint(plan) as endpoint:
        args = EndpointArgs(url=endpoint.url, model="m", prompts=write_judge_prompts(tmp_path), concurrency=2)
        with pytest.raises(KeyboardInterrupt):
            EndpointJudge(args).judge(transcripts.matches(), transcripts, found.append)
        assert (len(endpoint.requests), len(found)) == (9, 7)
        released.set()
        time.sleep(0.5)
        assert (len(endpoint.requests), len(found)) == (9, 7)


def test_a_missing_key_is_reported_before_anything_is_sent(tmp_path, monkeypatch):
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(ValueError, match=r"key_variable: the environment variable TEST_KEY is not set"):
        judge_with(tmp_path, right, key_variable="TEST_KEY")
