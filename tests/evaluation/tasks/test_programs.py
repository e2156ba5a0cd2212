"""Functions that a model writes are scored by running them; HumanEval's own solutions pass, and empty ones fail."""

import dataclasses
import gzip
import itertools
import json
import math

import numpy as np
import pytest

from qlora_jax.config.question_settings import QuestionArgs
from qlora_jax.evaluation.compared_models import check_same_inputs
from qlora_jax.evaluation.task import TaskContext
from qlora_jax.evaluation.tasks import programs
from qlora_jax.evaluation.tasks.programs import (
    ProgramScores,
    build,
    pass_at_k,
)
from qlora_jax.inference.decode import EndReason, Reply
from qlora_jax.inference.result_cache import NO_CACHE, open_cache
from qlora_jax.measures.statistics import mean_change_interval, mean_interval
from qlora_jax.sandbox.programs import Limits, Program, ProgramOutcome, source_of_chat, source_of_continuation
from qlora_jax.sandbox.runner import run_programs
from tests.e2e.project import TEMPLATE
from tests.inference.tiny import byte_tokenizer, tiny_parts
from tests.marks import EXHAUSTIVE, SLOW
from tests.sandbox.kernel import needs_seal

ADD = {
    "prompt": 'def add(a, b):\n    """Adds {a} and b."""\n',
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}
RIGHT, WRONG = "    return a + b\n", "    return a - b\n"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


OPEN = {"program_isolation": "none"}


def task_of(path, tokenizer=None, *, max_positions=500, **changes):
    settings = QuestionArgs(programs=path, **{"max_new_tokens": 20} | changes)
    return build(settings, TaskContext(tokenizer=tokenizer or byte_tokenizer(), max_positions=max_positions))


@pytest.mark.parametrize(("samples", "passed", "k"), [(5, 2, 1), (5, 2, 3), (5, 0, 2), (4, 4, 4), (6, 5, 2), (1, 1, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_one_that_passed(samples, passed, k):
    subsets = [*itertools.combinations([True] * passed + [False] * (samples - passed), k)]
    assert pass_at_k(samples, passed, k) == pytest.approx(np.mean([any(subset) for subset in subsets]), abs=1e-15)


def test_pass_at_k_of_many_samples_is_exact():
    assert pass_at_k(200, 1, 100) == 0.5
    assert math.isclose(pass_at_k(10_000, 1, 1), 1e-4, rel_tol=1e-9)


def test_a_continuation_ends_before_the_next_definition():
    prompt = ADD["prompt"]
    assert source_of_continuation(prompt, RIGHT + "\ndef main():\n    x\n# b") == prompt + RIGHT
    assert source_of_continuation(prompt, RIGHT + "print(add(1, 2))") == prompt + RIGHT.removesuffix("\n")
    assert source_of_continuation(prompt, RIGHT) == prompt + RIGHT


@pytest.mark.parametrize(
    ("reply", "source"),
    [
        ("Sure!\n```python\ndef add(a, b):\n    return a\n```\nDone.", "{prompt}\ndef add(a, b):\n    return a\n"),
        ("```\nx = 1\n```\n```py\ndef add(a, b): return a\n```", "{prompt}\ndef add(a, b): return a\n"),
        ("def add(a, b):\n    return a", "{prompt}\ndef add(a, b):\n    return a"),
        ("```python\n    return a\n```", "{prompt}    return a\n"),
        ("```python\ndef add(a, b):\n    return", "{prompt}\ndef add(a, b):\n    return"),
        ("    return a\ndef other(): pass", "{prompt}    return a"),
    ],
)
def test_code_is_found_in_a_chat(reply, source):
    assert source_of_chat(ADD["prompt"], reply, "add") == source.replace("{prompt}", ADD["prompt"])


def answer_with(monkeypatch, *replies: str, ended: EndReason = "stop"):
    """Makes the model reply to every prompt with these."""
    encoded = [Reply(byte_tokenizer().encode(reply), ended) for reply in replies]
    monkeypatch.setattr(programs, "sampled_replies", lambda parts, prompts, **how: [encoded] * len(prompts))


@needs_seal
def test_replies_are_run(monkeypatch, tmp_path):
    path = write(tmp_path / "p.jsonl", [ADD, ADD | {"test": ADD["test"].replace("3", "-1")}])
    sampled = dict(pass_at=[1, 3], program_samples=3, program_temperature=1.0)
    task, cache = task_of(path, **sampled), open_cache(tmp_path / "cache", tiny_parts())
    answer_with(monkeypatch, RIGHT, WRONG, "    return 1 / 0\n")
    scores = task.score(tiny_parts(), lambda done: None, cache)
    assert [[programs.REASONS[one] for one in row] for row in scores.outcomes] == [
        ["passed", "wrong", "error"],
        ["wrong", "passed", "error"],
    ]
    metrics = {metric.name: metric.value for metric in task.metrics(scores)}
    assert metrics == {
        "pass@1": pytest.approx(1 / 3),
        "pass@3": 1,
        "failed: a test is not met": 2,
        "failed: an error": 2,
        "failed: a limit, or ended early": 0,
        "programs cut off (20 tokens)": 0,
    }
    monkeypatch.setattr(programs, "run_programs", None)
    assert (task.score(tiny_parts(), lambda done: None, cache).outcomes == scores.outcomes).all()
    better = ProgramScores(outcomes=np.zeros((2, 3), np.int64), cut_off=0)
    first, second = task.compare(scores, better)
    assert (first.name, first.difference) == ("pass@1", pytest.approx(2 / 3))
    assert first.interval == pytest.approx(mean_change_interval(np.full(2, 2 / 3))) and second.difference == 0
    equal = {metric.name: metric.interval for metric in task.metrics(scores)}["pass@1"]
    assert equal == pytest.approx(mean_interval(np.full(2, 1 / 3))) and equal[0] < 1 / 3 < equal[1]


@pytest.mark.parametrize(
    ("template", "replies", "cut_off"),
    [
        (None, [RIGHT, RIGHT + "\ndef main():\n    x"], 1),
        (TEMPLATE, [f"```python\n{RIGHT}", f"```python\n{RIGHT}```\nThis adds"], 1),
    ],
    ids=["continued", "chat"],
)
def test_only_programs_that_the_limit_ended_are_cut_off(monkeypatch, tmp_path, template, replies, cut_off):
    tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=template)
    task = task_of(
        write(tmp_path / "p.jsonl", [ADD]), tokenizer, program_samples=2, program_isolation="none", max_positions=900
    )
    monkeypatch.setattr(programs, "run_programs", lambda found, *args, **how: [ProgramOutcome("passed")] * len(found))
    expected_by_end: dict[EndReason, int] = {"length": cut_off, "stop": 0}
    for ended, expected in expected_by_end.items():
        answer_with(monkeypatch, *replies, ended=ended)
        assert task.score(tiny_parts(), lambda done: None, NO_CACHE).cut_off == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": [ADD | {"entry_point": "plus"}]},
        {"rows": [ADD | {"test": "pass"}]},
        {"program_samples": 2},
        {"program_temperature": 0.5},
        {"max_new_tokens": 21},
        {"program_seconds": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_runs_with_other_functions_or_replies_are_not_compared(tmp_path, changes):
    path, other = write(tmp_path / "a.jsonl", [ADD]), write(tmp_path / "b.jsonl", changes.get("rows", [ADD]))
    settings = {name: value for name, value in changes.items() if name != "rows"} | OPEN
    tasks, same = [task_of(path, **OPEN)], [task_of(path, **OPEN)]
    tokenizers = (byte_tokenizer(), byte_tokenizer())
    check_same_inputs(tasks, same, ("a", "b"), tokenizers)
    with pytest.raises(ValueError, match="not comparable"):
        check_same_inputs(tasks, [task_of(other, **settings)], ("a", "b"), tokenizers)


@needs_seal
def test_a_model_is_asked(tmp_path):
    parts, path = tiny_parts(), write(tmp_path / "p.jsonl", [ADD])
    task = task_of(path)
    assert byte_tokenizer().decode([*task.problems[0].ids]) == ADD["prompt"]
    scores = task.score(parts, lambda done: None, NO_CACHE)
    assert scores.outcomes.tolist() == [[programs.REASONS.index("error")]] and scores.cut_off == 1
    (change,) = task.compare(scores, scores)
    assert change.p == 1 and task.metrics(scores)[0].interval is not None
    chat = task_of(path, dataclasses.replace(byte_tokenizer(), chat_template=TEMPLATE), max_positions=900)
    assert f"```python\n{ADD['prompt']}```" in byte_tokenizer().decode([*chat.problems[0].ids])


@needs_seal
def test_rows_that_do_not_fit_are_reported_together(tmp_path):
    rows = [ADD, ADD | {"test": 3}, ADD | {"prompt": "def add(:"}, {"prompt": "x"}]
    with pytest.raises(ValueError, match="3 of 4 rows") as error:
        task_of(write(tmp_path / "p.jsonl", rows))
    for words in ("test: found 3, expected a text", "prompt: not Python (invalid syntax", "no column 'test' or 'entry"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"too long \(found 41 tokens and 20 of the reply; the model has 60"):
        task_of(write(tmp_path / "p.jsonl", [ADD]), max_positions=60)


def test_without_isolation_nothing_runs_unless_the_user_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(programs, "seal_problem", lambda: "Linux is required (found darwin)")
    path = write(tmp_path / "p.jsonl", [ADD])
    with pytest.raises(
        ValueError, match=r"program_isolation: .* cannot seal .*Linux is required .*program_isolation=none"
    ):
        task_of(path)
    task = task_of(path, **OPEN)
    assert task.title.endswith("not isolated")
    answer_with(monkeypatch, RIGHT)
    assert task.score(tiny_parts(), lambda done: None, NO_CACHE).pass_at(1).tolist() == [1]


def test_its_memory_is_that_of_a_full_batch_of_samples(tmp_path):
    sampled = OPEN | dict(program_samples=20, program_temperature=1.0, program_top_p=0.9)
    programs_of_model = [*task_of(write(tmp_path / "p.jsonl", [ADD] * 3), **sampled).lower(tiny_parts())]
    assert [one.shape for one in programs_of_model] == [
        "prompts, 16 rows, 80 cache pages",
        "replies, 16 rows, 80 cache pages",
    ]


def humaneval(rows) -> dict[str, list[Program]]:
    """HumanEval with its solutions, and with bodies that return None."""
    return {
        kind: [
            Program(
                source=row["prompt"] + (row["canonical_solution"] if kind == "right" else "    return None\n"),
                entry_point=row["entry_point"],
                setup=row["prompt"],
                test=row["test"],
            )
            for row in rows
        ]
        for kind in ("right", "empty")
    }


@needs_seal
@pytest.mark.parametrize(
    ("step", "count"),
    [(41, 4), pytest.param(4, 41, marks=SLOW), pytest.param(1, 164, marks=EXHAUSTIVE)],
)
def test_humaneval(committable_data, step, count):
    with gzip.open(committable_data("HumanEval.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][::step]
    written = humaneval(rows)
    outcomes = {kind: run_programs(of_kind, Limits(waiting_seconds=60)) for kind, of_kind in written.items()}
    failed = {row["task_id"]: one for row, one in zip(rows, outcomes["right"], strict=True) if not one.passed}
    passed = [row["task_id"] for row, one in zip(rows, outcomes["empty"], strict=True) if one.passed]
    assert failed == {} and passed == []
    assert len(outcomes["right"]) == len(rows) == count
