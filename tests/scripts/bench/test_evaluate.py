"""The evaluation benchmark: figures from scores."""

import json

import pytest

from scripts.bench import evaluate as bench

ROWS = [([1, 2, 3, 4], 2), ([5, 6, 7], 0)]  # two tokens scored in each: the first of a row never is


def turns(*seconds: float, nll=(1.0, 3.0)):
    return [[{"text": {"seconds": s, "nll": [*nll]}}] for s in seconds]


def test_the_loss_weighs_every_scored_token_the_same():
    assert bench.loss(ROWS, [1.0, 3.0]) == 1.0


def test_passages_without_the_question_after_them():
    lines = [json.dumps({"messages": [{"role": "user", "content": f"{x}\n\n{x}.\n\nWhich?"}]}) for x in "ab"]
    assert bench.passages("\n".join(lines)) == "a\n\na.\n\nb\n\nb."


def test_speed_is_against_the_fastest_that_multiplies_as_exactly():
    played = {
        "ours float32": turns(2.0, 4.0, 2.0),
        "transformers float32": turns(9.0, 9.0, 9.0, nll=(1.0, 3.4)),
        "transformers float32 rounded": turns(4.0, 4.0, 4.0),
        "ours bfloat16": turns(1.0, 2.0, 1.0),
        "transformers bfloat16": turns(3.0, 6.0, 3.0),
    }
    firsts = {name: {"text": {"seconds": 10.0}} for name in played}
    found = bench.figures("text", ROWS, firsts, played)
    assert found["speed"] == {"ours float32": 4.5, "ours bfloat16": 3.0}
    assert found["players"]["transformers float32"]["first_s"] == 1.0
    assert found["players"]["transformers float32"]["apart"] == pytest.approx(0.1)
    result = {"jobs": {"text": found}, "failures": {}}
    assert bench.disagreement(result) == ["text: 0.1 nats per token apart"]


def test_without_an_opponent_there_is_no_speed(capsys):
    found = bench.figures("text", ROWS, {"ours float32": {"text": {"seconds": 3.0}}}, {"ours float32": turns(2.0)})
    bench.show("none", {"jobs": {"text": found}, "failures": {"transformers float32": "ended (status 1)"}})
    printed = capsys.readouterr().out
    assert "transformers float32: NOT AVAILABLE: ended" in printed and found["speed"] == {}
