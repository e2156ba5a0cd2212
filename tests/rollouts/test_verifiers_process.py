"""Addresses of environments, and the process that plays them: its results, its end, and its absence."""

import sys
import time

import pytest

from qlora_jax.verifiers import process
from qlora_jax.verifiers.process import Address, Stopped, VerifiersProcess, verifiers_rows

ECHO = """
import json, os, sys, time
for line in sys.stdin:
    command = json.loads(line)
    if "exit" in command:
        os._exit(command["exit"])
    for number in range(command.get("count", 0)):
        print(json.dumps({"number": number, "text": "x" * command.get("length", 0)}), flush=True)
    time.sleep(command.get("sleep", 0))
"""


def test_an_address_has_a_size_and_settings_below_each_other():
    found = Address.parse(
        "verifiers:org/name?size=3&taskset.split=test&agent.max_turns=2&agent.x.y=[1]&id=user-sim&agent.id=null"
    )
    settings = {
        "taskset": {"id": "org/name", "split": "test"},
        "agent": {"max_turns": 2, "x": {"y": [1]}, "id": "null"},
    }
    assert found == ("org/name", 3, settings | {"id": "user-sim"})
    assert Address.parse("verifiers:name") == ("name", None, {"taskset": {"id": "name"}})


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("size=none", "size: found 'none', expected a number from 1 on"),
        ("size=0", "size: found '0', expected a number from 1 on"),
        ("agent=1&agent.max_turns=2", "found 'agent.max_turns' below a value"),
    ],
)
def test_wrong_addresses(query, problem):
    with pytest.raises(ValueError, match=rf"verifiers:name\?{query}: {problem}"):
        Address.parse(f"verifiers:name?{query}")


def test_an_environment_that_the_command_line_does_not_name_runs_no_code(monkeypatch):
    monkeypatch.setattr(process, "_allowed", {"other"})
    monkeypatch.setattr(process, "verifiers_process", None)
    with pytest.raises(ValueError, match=r"does not name. Add --environment verifiers:name"):
        list(verifiers_rows("verifiers:name?size=2"))


@pytest.fixture
def echo(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(ECHO)
    monkeypatch.setattr(process, "_HERE", tmp_path)
    found = VerifiersProcess(sys.executable)
    yield found
    found.stop()


def test_results_come_in_order_and_the_process_stays(echo):
    for _ in range(2):
        results = echo.results({"count": 3, "length": 100_000}, lambda: None)
        assert [next(results)["number"] for _ in range(3)] == [0, 1, 2]
        results.close()
    first = echo._process.pid
    assert echo.call({"count": 1})["number"] == 0 and echo._process.pid == first


def test_a_process_that_ends_says_so_and_starts_again(echo):
    with pytest.raises(Stopped, match=r"ended its process \(exit status 3\)"):
        echo.call({"exit": 3})
    assert echo.call({"count": 1})["number"] == 0


def test_a_tick_that_raises_ends_the_process(echo):
    began = time.monotonic()

    def tick():
        if time.monotonic() - began > 0.5:
            raise Stopped("took long")

    results = echo.results({"count": 1, "sleep": 1000}, tick)
    assert next(results)["number"] == 0
    with pytest.raises(Stopped, match="took long"):
        next(results)
    assert echo._process is None
