"""Whole tournaments with recorded replies: results, interruption, and what a second start does again."""

import collections
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.tournament.tournament import hold_tournament
from tests.marks import EXHAUSTIVE
from tests.studies.tournament.judges.fake_endpoint import Answer, fake_endpoint
from tests.studies.tournament.tiny_tournament import (
    arena_args,
    right_verdict,
    write_judge_prompts,
    write_lines,
    write_tournament,
)

ROOT = Path(__file__).resolve().parents[3]


def right(message: str, before: int) -> Answer:
    return Answer(f"A comparison.\n{right_verdict(message)}")


def endpoint_judge(folder: Path, url: str, **settings) -> dict:
    return {
        "kind": "endpoint",
        "url": url,
        "model": "m",
        "prompts": write_judge_prompts(folder),
        "backoff": 0.01,
    } | settings


def hold(settings: dict, **judges: dict):
    return hold_tournament(arena_args(**settings, judges=judges), ProgressReporter())


def lines_of(settings: dict, judge: str) -> list[dict]:
    path = Path(settings["output"]) / "judgements" / f"{judge}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_an_endpoint_and_a_person(tmp_path):
    settings = write_tournament(tmp_path)
    with fake_endpoint(right) as endpoint:
        results = hold(settings, gpt=endpoint_judge(tmp_path, endpoint.url), anna={"kind": "person"})
    gpt, anna = results.judges["gpt"], results.judges["anna"]
    # On the first prompt alpha and gamma tie, which is 2 of 24 in both orders.
    assert (gpt.matches, gpt.first_better, gpt.second_better, gpt.ties, gpt.missing) == (24, 11, 11, 2, 0)
    assert (anna.matches, anna.missing) == (12, 12)
    assert [*results.standings] == ["gpt"]
    by_gpt = results.standings["gpt"]
    assert [one.system for one in by_gpt.bradley_terry.systems] == ["alpha-system", "beta-system", "gamma-system"]
    against_gamma = by_gpt.wins["alpha-system"]["gamma-system"]
    assert (against_gamma.wins, against_gamma.games) == (7, 8)
    stored = json.loads((tmp_path / "arena/results.json").read_text())
    assert stored["settings"]["judges"]["gpt"]["model"] == "m"
    assert stored["judges"]["gpt"]["attempts"] == {"failed": 0, "timed_out": 0, "unreadable": 0}
    assert stored["standings"]["gpt"]["elo"]["systems"][0]["system"] == "alpha-system"
    page = (tmp_path / "arena/results.html").read_text()
    assert "Ranking by gpt" in page and "A good reply to 1." in page and "drawn at random (seed 0)" in page


@pytest.mark.slow  # statsmodels takes seconds to import
def test_judges_of_every_recorded_kind_are_compared_and_pooled(tmp_path):
    settings = write_tournament(tmp_path)
    rows = [
        {"question_id": 10 + i, "model_a": "alpha-system", "model_b": "beta-system", "verdict": 1 + i % 3}
        for i in range(4)
    ]
    verdicts = {"kind": "verdicts", "path": write_lines(tmp_path / "verdicts.jsonl", rows)}
    with fake_endpoint(right) as endpoint:
        judges = {"gpt": endpoint_judge(tmp_path, endpoint.url), "file": verdicts}
        hold(settings, **judges, anna={"kind": "person"})
        key = json.loads((tmp_path / "arena/keys/anna.json").read_text())
        answers = tmp_path / "answers.json"
        answers.write_text(json.dumps({"page": key["page"], "verdicts": dict.fromkeys(key["matches"], 3)}))
        results = hold(settings, **judges, anna={"kind": "person", "answers": str(answers)})
    file, anna = results.judges["file"], results.judges["anna"]
    assert (file.first_better, file.second_better, file.ties, file.missing) == (2, 1, 1, 20)
    assert (anna.matches, anna.ties, anna.missing) == (12, 12, 0)
    assert [*results.standings] == ["all judges", "gpt", "file", "anna"]
    assert results.agreement.judges == ["anna", "file", "gpt"]
    assert "Fleiss" in (tmp_path / "arena/results.html").read_text()


def test_recorded_verdicts_need_nothing_else(tmp_path):
    rows = [
        {"question_id": i, "model_a": a, "model_b": b, "verdict": verdict}
        for i in range(6)
        for (a, b), verdict in {("x", "y"): 1 + i % 2, ("y", "x"): 3, ("x", "z <b>"): 1, ("z <b>", "x"): 1}.items()
    ]
    path = write_lines(tmp_path / "verdicts.jsonl", rows)
    settings = {"output": str(tmp_path / "new/arena"), "orderings": 50}
    results = hold(settings, gpt4={"kind": "verdicts", "path": path})
    assert results.systems == ["x", "y", "z <b>"]
    assert results.judges["gpt4"].matches == 24 and results.agreement is None
    assert results.standings["gpt4"].problems == []
    page = (tmp_path / "new/arena/results.html").read_text()
    assert "z &lt;b&gt;" in page and "z <b>" not in page


def test_one_judged_prompt_is_counted(tmp_path):
    rows = [{"question_id": 1, "model_a": a, "model_b": b, "verdict": 1} for a, b in (("x", "y"), ("y", "x"))]
    verdicts = {"kind": "verdicts", "path": write_lines(tmp_path / "verdicts.jsonl", rows)}
    results = hold({"output": str(tmp_path / "arena")}, gpt4=verdicts)
    assert results.prompts == 1 and results.standings["gpt4"].elo is None
    assert "2 systems, 1 judge, 1 prompt with a verdict" in (tmp_path / "arena/results.html").read_text()


def test_passwords_in_addresses_are_not_stored(tmp_path):
    settings = write_tournament(tmp_path, prompts=1, systems=2)
    results = hold(settings, gpt=endpoint_judge(tmp_path, "http://user:hidden@127.0.0.1/v1"))
    assert results.stopped["gpt"].startswith("http://***@127.0.0.1/v1: not the address of a host")
    files = [path for path in (tmp_path / "arena").rglob("*") if path.is_file()]
    assert not [path.name for path in files if "hidden" in path.read_text()]
    stored = json.loads((tmp_path / "arena/results.json").read_text())
    assert stored["settings"]["judges"]["gpt"]["url"] == "http://***@127.0.0.1/v1"


def test_an_interrupted_tournament_judges_only_what_is_missing(tmp_path):
    settings = write_tournament(tmp_path)
    started = threading.Event()

    def plan(message: str, before: int) -> Answer:
        with endpoint.lock:
            number = len(endpoint.requests)
        if number == 9 and not started.is_set():
            started.set()
            os.kill(os.getpid(), signal.SIGINT)
        return Answer(f"A comparison.\n{right_verdict(message)}", seconds=0.02)

    with fake_endpoint(plan) as endpoint:
        judge = endpoint_judge(tmp_path, endpoint.url, concurrency=2)
        with pytest.raises(KeyboardInterrupt):
            hold(settings, gpt=judge)
        kept, sent = len(lines_of(settings, "gpt")), len(endpoint.requests)
        assert 7 <= kept <= sent < 24
        again = hold(settings, gpt=judge)
        # Only requests that were on their way are sent again.
        assert len(endpoint.requests) <= 24 + 2 and max(endpoint.seen.values()) <= 2
        lines = lines_of(settings, "gpt")
        assert len(lines) == len({(one["prompt"], one["first"], one["second"]) for one in lines}) == 24
        whole = hold(settings | {"output": str(tmp_path / "whole")}, gpt=judge)
        count = len(endpoint.requests)
        hold(settings, gpt=judge)
        assert len(endpoint.requests) == count
    assert again.judges == whole.judges and again.standings == whole.standings


def test_failed_matches_are_judged_by_the_next_start(tmp_path):
    settings = write_tournament(tmp_path)
    broken = True

    def plan(message: str, before: int) -> Answer:
        return Answer(status=500) if broken and "number 3" in message else right(message, before)

    with fake_endpoint(plan) as endpoint:
        judge = endpoint_judge(tmp_path, endpoint.url, retries=1)
        first = hold(settings, gpt=judge)
        assert (first.judges["gpt"].missing, first.judges["gpt"].attempts.failed) == (6, 12)
        broken = False
        second = hold(settings, gpt=judge)
    assert (second.judges["gpt"].missing, second.judges["gpt"].attempts.failed) == (0, 12)
    assert len(endpoint.requests) == 18 + 12 + 6


def test_a_judge_that_stops_leaves_the_others(tmp_path):
    settings = write_tournament(tmp_path)
    with fake_endpoint(right) as good, fake_endpoint(lambda message, before: Answer(status=401)) as bad:
        judges = {"bad": endpoint_judge(tmp_path, bad.url), "good": endpoint_judge(tmp_path, good.url)}
        results = hold(settings, **judges)
    assert results.judges["bad"].missing == 24 and "HTTP status 401" in results.stopped["bad"]
    assert results.judges["good"].missing == 0


def test_a_new_system_adds_matches_and_changed_texts_are_refused(tmp_path):
    two, three = write_tournament(tmp_path, systems=2), write_tournament(tmp_path, systems=3)
    with fake_endpoint(right) as endpoint:
        judge = endpoint_judge(tmp_path, endpoint.url)
        hold(two, gpt=judge)
        assert len(endpoint.requests) == 8
        hold(three, gpt=judge)
        assert len(endpoint.requests) == 24
        rows = [{"question_id": 10 + i, "reply": f"A poor reply to {i}."} for i in range(4)]
        three["systems"]["alpha-system"]["replies"] = write_lines(tmp_path / "new.jsonl", rows)
        with pytest.raises(ValueError, match=r"gpt.jsonl: 16 judgements are on other texts, such as that on alpha-sys"):
            hold(three, gpt=judge)
        with pytest.raises(ValueError, match=r"gpt.jsonl: made with other inputs: temperature"):
            hold(two, gpt=judge | {"temperature": 0.5})
    assert len(endpoint.requests) == 24


def test_what_cannot_be_used_is_found_before_anything_is_asked(tmp_path):
    settings = write_tournament(tmp_path, prompts=1)
    with fake_endpoint(right) as endpoint:
        judge = endpoint_judge(tmp_path, endpoint.url)
        hold(settings, second=judge, anna={"kind": "person"})
        sent = len(endpoint.requests)
        with pytest.raises(ValueError, match=r"second.jsonl: made with other inputs: temperature"):
            hold(settings, new=judge, second=judge | {"temperature": 0.5})
        with pytest.raises(OSError, match="no-such"):
            hold(settings, new=judge, anna={"kind": "person", "answers": str(tmp_path / "no-such")})
        rows = [{"question_id": 10, "reply": "A poor reply to 0."}]
        settings["systems"]["alpha-system"]["replies"] = write_lines(tmp_path / "new.jsonl", rows)
        with pytest.raises(ValueError, match=r"second.jsonl: 4 judgements are on other texts"):
            hold(settings, new=judge, second=judge)
        with pytest.raises(ValueError, match=r"anna.html: 2 of its 3 pairs have other texts now"):
            hold(settings, new=judge, anna={"kind": "person"})
        assert len(endpoint.requests) == sent
    assert not (tmp_path / "arena/judgements/new.jsonl").exists()  # so that its settings may still change


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=EXHAUSTIVE)])
def test_a_stopped_command_loses_no_judgement(tmp_path, how):
    settings = write_tournament(tmp_path)
    answered: collections.Counter[str] = collections.Counter()

    def plan(message: str, before: int) -> Answer:
        answered[message] += 1
        return Answer(f"A comparison.\n{right_verdict(message)}", seconds=0.1)

    with fake_endpoint(plan) as endpoint:
        judge = endpoint_judge(tmp_path, endpoint.url, concurrency=2)
        config = tmp_path / "arena.json"  # JSON is YAML
        config.write_text(json.dumps(settings | {"judges": {"gpt": judge}}))
        command = [sys.executable, "-m", "qlora_jax.arena", "--config", str(config)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while sum(answered.values()) < 10 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(how)
        process.communicate(timeout=30)
        assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
        kept = {(one["prompt"], one["first"], one["second"]) for one in lines_of(settings, "gpt")}
        assert len(kept) >= 7
        results = hold(settings, gpt=judge)
    assert (results.judges["gpt"].missing, results.judges["gpt"].ties) == (0, 2)
    assert len(lines_of(settings, "gpt")) == 24 and len(endpoint.requests) <= 24 + 2
