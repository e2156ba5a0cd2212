"""Reward functions run in processes with limits, and the replies that they fail on are named."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.config.parse import from_dict
from qlora_jax.config.rewards import REWARDS, RewardArgs
from qlora_jax.rewards import worker_process
from qlora_jax.rewards.functions import MOST_ENDED, Replies, RewardError, RewardFunctions

FILE = """
import asyncio, os, random, signal, subprocess, time
calls = []

def length(completions, **kwargs):
    return [float(len(c)) for c in completions]

def has_answer(completions, answer):
    return [(1 if a in c else 0) if a else None for c, a in zip(completions, answer)]

async def later(prompts, completions, **kwargs):
    await asyncio.sleep(0.001)
    return [0.5 * len(p) for p in prompts]

class Later:
    async def __call__(self, completion_ids, **kwargs):
        return [sum(ids) for ids in completion_ids]

summed = Later()

def logs(completions, log_metric, log_extra, trainer_state, **kwargs):
    for value in (1, 2):
        log_metric("size", value)
    log_extra("upper", [c.upper() for c in completions])
    return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

def draws(completions, **kwargs):
    return [random.random() for _ in completions]

def rank(completions, log_metric, log_extra, **kwargs):  # depends on the other replies
    log_metric("count", len(completions))
    log_extra("text", completions)
    return [sorted(completions).index(c) / (10 if "bad" in c else 1) for c in completions if 1 / len(c)]

def raises(completions, **kwargs):
    return [1 / len(c) for c in completions]

def hangs(completions, **kwargs):
    while "bad" in completions:
        time.sleep(0.01)
    return [1.0] * len(completions)

def waits(completions, **kwargs):
    time.sleep(5 if "wait" in completions else 0)
    return [len(c) for c in completions]

def hog(completions, **kwargs):
    return [bytearray(3 << 30 if c == "bad" else 1)[0] for c in completions]

def exits(completions, **kwargs):
    return [os._exit(7) if c == "bad" else 2.0 for c in completions]

def odd(completions, **kwargs):
    return [{"bad": float("nan"), "": float("inf"), "cc": "1"}.get(c, True) for c in completions]

def skips(completions, **kwargs):
    return [1.0 for c in completions if c]

def one_number(completions, **kwargs):
    return 1.0

def killed_once(completions, **kwargs):
    marker = __file__ + ".killed"
    if not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return [3.0] * len(completions)

def shares(completions, **kwargs):
    calls.append(1)
    return [len(calls)] * len(completions)

def shares_too(completions, **kwargs):
    calls.append(1)
    return [len(calls)] * len(completions)

def writes_pid_and_hangs(completions, **kwargs):
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


def replies(*completions: str, **columns: list[object]) -> Replies:
    count = len(completions)
    return Replies(
        prompts=[f"p{row // 2}" for row in range(count)],
        completions=completions,
        completion_ids=[[row, 1] for row in range(count)],
        columns=columns,
        labels=[f"prompts.jsonl:{1 + row // 2}" for row in range(count)],
        step=3,
        steps=12,
    )


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "rewards.py"
    path.write_text(FILE)
    return str(path)


def score(file, names, given, **settings):
    with RewardFunctions(RewardArgs(**settings), [f"{file}:{name}" for name in names]) as functions:
        return functions.score(given)


def test_functions_get_what_they_name(file):
    given = replies("a", "xyz", "", answer=["a", "", "b"])
    table = score(file, ["length", "has_answer", "later", "summed", "logs"], given)
    assert table.names == ("length", "has_answer", "later", "summed", "logs") and table.problems == []
    np.testing.assert_array_equal(table.rewards_NF, [[1, 1, 1, 1, 0.25], [3, np.nan, 1, 2, 0.25], [0, 0, 1, 3, 0.25]])
    assert table.metrics == {"size": 1.5}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("raises", "found ZeroDivisionError: division by zero at {file}:{line}"),
        ("skips", "found 0 rewards, expected 1"),
    ],
)
def test_the_reply_at_fault_is_named(file, name, text):
    line = 1 + FILE.splitlines().index("    return [1 / len(c) for c in completions]")
    table = score(file, [name, "length"], replies("a", "bb", "", "cc"), on_error="drop")
    assert table.problems == [(2, name, text.format(file=file, line=line))]
    np.testing.assert_array_equal(np.isnan(table.rewards_NF[:, 0]), [False, False, True, False])
    np.testing.assert_array_equal(table.rewards_NF[:, 1], [1, 2, 0, 2])


def test_replies_to_a_prompt_that_fail_alike_have_one_line(tmp_path):
    path = tmp_path / "one.py"
    path.write_text("def one(**columns): return [1.0]\n")
    given = dataclasses.replace(replies("a", "b", "c"), labels=["p:1", "p:1", "p:2"])
    with pytest.raises(RewardError) as error:
        score(path, ["one"], given)
    assert [line.split()[0] for line in str(error.value).splitlines()[1:-1]] == ["p:1:", "p:2:"]


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("hangs", {"timeout": 1.0}, "took more than 1 s (rewards.timeout is 1)"),
        ("hog", {"memory": "1GiB"}, "needed more than 1,024 MiB (rewards.memory)"),
        ("exits", {}, "ended its process (exit status 7)"),
    ],
)
def test_limits_end_a_call_and_the_function_starts_again(file, name, settings, text):
    args = RewardArgs(on_error="drop", **settings)
    with RewardFunctions(args, [f"{file}:{name}"]) as functions:
        table = functions.score(replies("a", "bad", "c"))
        assert table.problems == [(1, name, text)]
        assert np.isfinite(functions.score(replies("a", "c")).rewards_NF).all()


def test_a_run_that_stops_names_file_and_line(file):
    text = f"prompts.jsonl:2: {file}:exits: ended its process (exit status 7)"
    with pytest.raises(RewardError, match=re.escape(text)):
        score(file, ["length", "exits"], replies("a", "b", "bad", "c"))


def test_after_some_ended_calls_the_others_are_not_tried(file):
    table = score(file, ["exits"], replies(*["bad"] * (MOST_ENDED + 2)), on_error="drop")
    assert [problem.text.startswith("not tried") for problem in table.problems] == [False] * MOST_ENDED + [True] * 2


def test_values_that_are_not_rewards(file):
    table = score(file, ["odd"], replies("a", "bad", "", "cc"), on_error="drop")
    assert table.problems == [
        (1, "odd", "found nan, expected a finite number or None"),
        (2, "odd", "found inf, expected a finite number or None"),
        (3, "odd", "found str '1', expected a number or None"),
    ]
    assert table.rewards_NF[0, 0] == 1
    with pytest.raises(RewardError, match="found float as its result, expected a list of rewards"):
        score(file, ["one_number"], replies("a"))


def test_the_other_replies_are_scored_together(file):
    table = score(file, ["rank"], replies("b", "", "a", "c"), on_error="drop")
    np.testing.assert_array_equal(table.rewards_NF[:, 0], [1, np.nan, 0, 2])
    assert table.metrics == {"count": 3}


def test_rewards_do_not_depend_on_the_number_of_workers(file, tmp_path):
    other = tmp_path / "other.py"
    other.write_text("import random\ndef other(completions, **kwargs): return [random.random() for _ in completions]\n")
    tables = []
    for workers in (1, 2, 5):
        names = [*(f"{file}:{name}" for name in ("draws", "shares", "shares_too")), f"{other}:other"]
        with RewardFunctions(RewardArgs(workers=workers), names) as functions:
            tables.append(functions.score(replies("a", "b")).rewards_NF)
    np.testing.assert_array_equal(tables[0], tables[1])
    np.testing.assert_array_equal(tables[0], tables[2])
    np.testing.assert_array_equal(tables[0][0, 1:3], [1, 2])  # a file's functions share its variables
    assert tables[0][0, 0] != tables[0][0, 3]


def test_a_process_that_somebody_kills_starts_again(file):
    table = score(file, ["killed_once"], replies("a", "b"))
    np.testing.assert_array_equal(table.rewards_NF, [[3], [3]])


def test_a_killed_trainer_leaves_no_process(file):
    program = (
        "from tests.rewards.test_functions import *\n"
        f"RewardFunctions(RewardArgs(), [{file + ':writes_pid_and_hangs'!r}]).score(replies('a'))"
    )
    root = str(Path(__file__).resolve().parents[2])
    trainer = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, cwd=root)
    assert trainer.stderr is not None
    worker = int(trainer.stderr.readline())
    os.kill(worker, 0)
    trainer.kill()
    trainer.wait()
    trainer.stderr.close()
    for _ in range(500):
        if not Path(f"/proc/{worker}").exists() or " Z " in Path(f"/proc/{worker}/stat").read_text():
            return
        time.sleep(0.01)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the process of reward functions lives on")


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("import re\nimport absent_module\n", "f", ":2: cannot be imported (found ModuleNotFoundError: No module"),
        ("def f(:\n", "f", ":1: cannot be imported (found SyntaxError"),
        ("import sys\nsys.exit(3)\n", "f", ":2: cannot be imported (found SystemExit: 3"),
        ("import os\nos._exit(3)\n", "f", ": cannot be imported (ended its process (exit status 3))"),
        ("def g(x): ...\nf = 3\n", "f", ": f is not a function (found int). Name one of"),
        ("def g(x): ...\n", "f", ": f is not a function (found g in the file). Name one of"),
        ("x = 3\n", "f", ": f is not a function (found no function in the file). Name one of"),
        ("\ndef f(prompts, /): ...\n", "f", ":2: f cannot be called with keywords (found the positional-only"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, text, name, message):
    path = tmp_path / "json.py"  # also the name of a module of Python
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}{message}")):
        RewardFunctions(RewardArgs(), [f"{path}:{name}"])


def test_a_missing_file():
    with pytest.raises(ValueError, match=r"\n  missing\.py: no such file\. Correct the path$"):
        RewardFunctions(RewardArgs(), ["missing.py:f"])


def test_an_import_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(worker_process, "IMPORT_SECONDS", 0.1)
    path = tmp_path / "slow.py"
    path.write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(ValueError, match=r"slow.py: cannot be imported .took more than 0.5 s .rewards.timeout is 0.5"):
        RewardFunctions(RewardArgs(timeout=0.5), [f"{path}:f"])


def test_a_package_declares_a_function_by_an_entry_point(tmp_path, monkeypatch):
    (tmp_path / "vowels.py").write_text(
        "from qlora_jax.config.rewards import RewardDeclaration\n"
        "DECLARATION = RewardDeclaration(implementation='vowels:share', settings=('pattern',))\n"
        "def share(completions, pattern): return [len([x for x in c if x in pattern]) / len(c) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("vowels", "vowels:DECLARATION", REWARDS.group)
    monkeypatch.setattr(REWARDS, "_values", dict(REWARDS.items()))
    monkeypatch.setattr(REWARDS, "_found", {"vowels": point}, raising=False)
    args = from_dict(RewardArgs, {"functions": ["vowels"], "pattern": "aeiou"})
    with RewardFunctions(args, []) as functions:
        np.testing.assert_array_equal(functions.score(replies("abe", "xy")).rewards_NF, [[2 / 3], [0]])


def test_a_reply_after_an_interrupt_is_not_for_the_next_call(file):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with RewardFunctions(RewardArgs(), [f"{file}:waits"]) as functions:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                functions.score(replies("wait", "a"))
            np.testing.assert_array_equal(functions.score(replies("bb", "c")).rewards_NF, [[2], [1]])
    finally:
        signal.signal(signal.SIGALRM, before)


def test_arguments_that_are_not_columns(file):
    with RewardFunctions(RewardArgs(), [f"{file}:has_answer", f"{file}:length"]) as functions:
        functions.check_columns(["prompt", "answer"])
        with pytest.raises(ValueError, match=r"rewards.py:\d+: has_answer needs the argument 'answer' .found the col"):
            functions.check_columns(["prompt", "solution"])
        with pytest.raises(ValueError, match="column 'prompts' has the name of an argument"):
            functions.check_columns(["prompts", "answer"])
