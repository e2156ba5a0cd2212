"""The data report of pairs and labels: lengths of the parts, dropped pairs, length bias, labels, and both answers."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_jax.data.report.text import example_rows, legend, print_report, report_lines
from qlora_jax.data.row_counts import NumberSummary, RowCounts
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from tests.data.loading import load

WORDS = [(3, 1), (2, 2), (1, 4), (6, 2), (1, 0)]  # words of the chosen and the rejected answer


def pair(chosen: int, rejected: int) -> dict[str, Any]:
    return {"prompt": "one two three", "chosen": " yes" * chosen, "rejected": " no" * rejected}


@pytest.fixture
def pairs(write_rows: Callable) -> str:
    """Four pairs, and three that are bad: an empty answer, equal answers, and prompts that differ."""
    turns = [[{"role": "user", "content": asked}, {"role": "assistant", "content": asked}] for asked in "ab"]
    others = [
        {"prompt": "Q", "chosen": "same", "rejected": "same"},
        {"prompt": "a", "chosen": turns[0], "rejected": turns[1]},
    ]
    return write_rows([pair(*words) for words in WORDS] + others)


@pytest.mark.parametrize("cached", [False, True])
def test_a_report_of_pairs(plain_tokenizer: Tokenizer, pairs: str, tmp_path: Path, cached: bool):
    settings = {"bad_rows": "drop", "max_length": 7, "cache": str(tmp_path) if cached else None}
    for _ in range(1 + cached):  # the second time from the cache
        report = load(plain_tokenizer, "dpo", train=pairs, **settings).report
        lines = dict(report_lines(report))
        assert lines["train"] == f"4 of 7 rows of {pairs}, format preference"
        assert lines["tokens per text"] == "1% 6, 25% 6, median 7, 75% 8, 95% 10, longest 10"
        assert lines["tokens of prompt"] == "1% 3, 25% 3, median 3, 75% 3, 95% 3, longest 3"
        assert lines["tokens of chosen"] == "1% 2, 25% 2, median 3, 75% 4, 95% 7, longest 7"
        assert lines["tokens of rejected"] == "1% 2, 25% 2, median 3, 75% 3, 95% 5, longest 5"
        assert lines["too long"] == "2 truncated on the right (2 answers without the end) (data.max_length 7)"
        assert lines["dropped pairs"] == "1 identical, 1 with prompts that differ, 0 made identical by truncation"
        assert lines["longer answer"] == (
            "chosen 50.0%, rejected 25.0%, neither 25.0%; chosen is 0.8 tokens longer on average"
        )
        assert lines["bad rows"].startswith("3 dropped") and "note" not in lines


def test_chosen_answers_may_be_shorter(plain_tokenizer: Tokenizer, write_rows: Callable):
    report = load(plain_tokenizer, "dpo", train=write_rows([pair(1, 3)])).report
    assert dict(report_lines(report))["longer answer"].endswith("; chosen is 2.0 tokens shorter on average")


def test_all_bad_pairs_are_listed_with_their_lines(plain_tokenizer: Tokenizer, pairs: str):
    with pytest.raises(ValueError) as error:
        load(plain_tokenizer, "dpo", train=pairs)
    told = str(error.value)
    assert "3 of 7 rows can't be used" in told
    for line, problem in ((5, "rejected is empty"), (6, "chosen and rejected are equal"), (7, "prompts of chosen and")):
        assert f"{pairs}:{line}: {problem}" in told or f"{pairs}:{line}: the {problem}" in told


def test_pairs_that_truncation_empties_or_makes_equal(plain_tokenizer: Tokenizer, write_rows: Callable):
    rows = [pair(2, 1), {**pair(2, 2), "rejected": " yes yes no"}, {**pair(1, 1), "prompt": "one " * 9}]
    report = load(plain_tokenizer, "dpo", train=write_rows(rows), max_length=5).report
    lines = dict(report_lines(report))
    assert lines["too long"] == (
        "1 truncated on the right (1 answer without the end), 1 dropped with no answer left, 1 dropped with equal "
        "answers left (data.max_length 5)"
    )
    assert lines["dropped pairs"].endswith("1 made identical by truncation")


def test_both_answers_are_shown_by_name(tokenizer: Tokenizer, write_rows: Callable):
    dataset = load(tokenizer, "dpo", train=write_rows([{"prompt": "Q", "chosen": "yes", "rejected": "no"}]))
    printed = io.StringIO()
    print_report(dataset.report, Console(file=printed, width=100))
    assert printed.getvalue().endswith(
        "  | <|im_start|>assistant\n  | \n  | chosen: ⟦yes<|im_end|>⟧\n  | rejected: ⟦no<|im_end|>⟧\n"
    )
    (row,) = example_rows(dataset.train, tokenizer, 5, dataset.report.parts)
    shown = [("".join(run.text for run in runs), seen, name) for runs, seen, name in row.segments]
    prompt = tokenizer.render([{"role": "user", "content": "Q"}], add_generation_prompt=True)
    assert shown == [(prompt, False, ""), ("yes<|im_end|>", True, "chosen"), ("no<|im_end|>", True, "rejected")]


def test_a_head_is_reported_without_its_fillers(plain_tokenizer: Tokenizer, write_rows: Callable):
    rows = [{"sentence": text, "label": label} for text, label in (("a b c", "good"), ("d", "bad"), ("e", "good"))]
    dataset = load(plain_tokenizer, "classification", train=write_rows(rows))
    lines = dict(report_lines(dataset.report))
    assert lines["labels"] == "good 2 (66.7%), bad 1 (33.3%)"
    assert lines["read by the head"] == "the last position of 3 texts"
    assert lines["tokens of text"].endswith("longest 3")
    assert [(segment.text, segment.supervised) for segment in dataset.report.example] == [("a b c", False)]
    assert legend(dataset.report, ("[", "]")) == "as the head reads it"
    assert dataset.labels == ("bad", "good")


def test_labels_of_answers(tokenizer: Tokenizer, write_rows: Callable):
    rows = [{"prompt": "Q", "completion": str(n), "label": n < 3} for n in range(4)]
    report = load(tokenizer, "kto", train=write_rows(rows)).report
    assert dict(report_lines(report))["labels"] == "desirable 3 (75.0%), undesirable 1 (25.0%)"
    wrong = write_rows([*rows, {**rows[0], "label": "good"}, {**rows[0], "label": None}])
    with pytest.raises(ValueError, match=r"2 of 6 rows can't be used(.|\n)*:5: label is not binary \(found 'good'"):
        load(tokenizer, "kto", train=wrong)


@pytest.mark.parametrize(
    ("objective", "labels", "shown"),
    [
        ("classification", ["good\n", "bad"], "good"),
        ("multi_label", [["b", "a"], ["c"]], "a, b"),
        ("multi_label", [[], ["c"]], "none"),
        ("regression", [-2.5, 1], "-2.5"),
    ],
)
def test_the_example_has_its_label(
    plain_tokenizer: Tokenizer, write_rows: Callable, objective: str, labels: list[Any], shown: str
):
    path = write_rows([{"text": f"text {n}", "label": label} for n, label in enumerate(labels)])
    dataset = load(plain_tokenizer, objective, train=path)
    printed = io.StringIO()
    print_report(dataset.report, Console(file=printed, width=100))
    assert f"data: example: {path}:1, label {shown}, as the head reads it\n  | text 0\n" in printed.getvalue()
    rows = example_rows(dataset.train, plain_tokenizer, 5, dataset.report.parts)
    assert next(row for row in rows if row.place == f"{path}:1").label == shown


@pytest.mark.parametrize("kl_pairs", [False, True])
def test_the_example_says_whether_its_answer_is_desirable(tokenizer: Tokenizer, write_rows: Callable, kl_pairs: bool):
    path = write_rows([{"prompt": "Q", "completion": f"{n}", "label": n > 0} for n in range(3)])
    report = load(tokenizer, "kto", train=path, kl_pairs=kl_pairs).report
    printed = io.StringIO()
    print_report(report, Console(file=printed, width=100))
    assert f"data: example: {path}:1, label undesirable, the loss sees" in printed.getvalue()


@pytest.mark.parametrize("cached", [False, True])
def test_labels_of_regression_have_a_range_and_a_mean(
    plain_tokenizer: Tokenizer, write_rows: Callable, tmp_path: Path, cached: bool
):
    paths = [
        write_rows([{"text": f"text {n}", "label": n} for n in numbers], f"{numbers[0]}.jsonl")
        for numbers in ([-1.5, 0, 4], [2.5])
    ]
    settings = {"train": dict.fromkeys(paths, 1.0), "cache": str(tmp_path) if cached else None}
    for _ in range(1 + cached):  # the second time from the cache
        report = load(plain_tokenizer, "regression", **settings).report
        assert dict(report_lines(report))["labels"] == "min -1.5, mean 1.25, max 4"


def test_counts_survive_json():
    counts = RowCounts(rows=2, text_lengths={"prompt": {3: 2}}, labels={"good": 2}, lengths={5: 2}, extra_tokens=-3)
    assert RowCounts.from_dict(json.loads(json.dumps(counts.to_dict()))) == counts
    counts = dataclasses.replace(counts, label_numbers=NumberSummary(2, 0.3, 0.1, 0.2))
    assert RowCounts.from_dict(json.loads(json.dumps(counts.to_dict()))) == counts
    both = counts + RowCounts(rows=1, text_lengths={"prompt": {3: 1}, "chosen": {1: 1}}, extra_tokens=1)
    assert both.text_lengths == {"prompt": {3: 3}, "chosen": {1: 1}} and both.extra_tokens == -2


@pytest.mark.parametrize(
    ("objective", "row", "problem"),
    [
        (
            "dpo",
            {"prompt": "Q", "completion": "A"},
            "objective: dpo trains on pairs .*format 'completion'.*objective to sft",
        ),
        (
            "dpo",
            {"prompt": "Q", "completion": "A", "label": True},
            "format 'unpaired-preference'.*Set objective to kto,",
        ),
        (
            "sft",
            {"prompt": "Q", "chosen": "A", "rejected": "B"},
            "sft trains on texts.*Set objective to dpo, orpo, cpo, simpo or reward, or use rows of the formats ",
        ),
        (
            "kto",
            {"prompt": "Q", "chosen": "A", "rejected": "B"},
            "kto trains on answers with a label.*, or use rows of the format unpaired-preference[.]",
        ),
        ("classification", {"anchor": "Q", "positive": "A"}, "texts that mean the same.*Set objective to embedding"),
        (
            "dpo",
            {"question": "Q", "winner": "A", "loser": "B"},
            "orca-pairs. Set --data.columns '{chosen: winner, rejected",
        ),
        (
            "dpo",
            {"input": "Q", "chosen": "A", "rejected": "B"},
            "Nearest: preference. Set --data.columns '{prompt: input}'",
        ),
        (
            "dpo",
            {"history": [], "preferred": "A", "other": "B"},
            "Nearest: preference. Set --data.columns '{prompt: history, chosen: preferred, rejected: COLUMN}'",
        ),
        (
            "dpo",
            {"input": "Q", "non_preferred_output": "B", "preferred_output": "A"},
            "{prompt: input, chosen: preferred_output, rejected: non_preferred_output}'",
        ),
        ("dpo", {"a": 1}, "for example with --data.columns '{prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}'"),
    ],
)
def test_rows_of_another_kind_are_refused(
    tokenizer: Tokenizer, write_rows: Callable, objective: str, row: dict[str, Any], problem: str
):
    with pytest.raises(ValueError, match=rf"rows\.jsonl: (.|\n)*{problem}"):
        load(tokenizer, objective, labels=("0", "1"), train=write_rows([row]))


def test_settings_and_formats_of_other_objectives_are_refused(tokenizer: Tokenizer, write_rows: Callable):
    path = write_rows([{"prompt": "Q", "chosen": "A", "rejected": "B"}])
    with pytest.raises(ValueError, match=r"data\.learn all, data\.target_max_length 5: only the objective sft uses"):
        load(tokenizer, "dpo", train=path, learn="all", target_max_length=5)
    with pytest.raises(ValueError, match=r"data\.format: dpo trains on pairs .*format 'messages'\)"):
        load(tokenizer, "dpo", train=path, format="messages")
