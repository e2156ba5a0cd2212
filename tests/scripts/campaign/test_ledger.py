"""The ledger continues after a kill, and its summary counts every failure."""

from pathlib import Path

from scripts.campaign.ledger import Case, Ledger, Verdict, summary


def test_judged_cases_are_not_open_again_and_half_a_line_is_dropped(tmp_path: Path):
    path = tmp_path / "fuzz.jsonl"
    ledger = Ledger(path)
    for number in range(3):
        ledger.record(Case("gguf", 0, number), Verdict("refused"), "abc")
    path.write_bytes(path.read_bytes()[:-10])
    again = Ledger(path)
    assert again.open_cases(["gguf"], 0, 4) == [Case("gguf", 0, 2), Case("gguf", 0, 3)]
    assert again.open_cases(["gguf"], 1, 1) == [Case("gguf", 1, 0)]
    again.record(Case("gguf", 0, 2), Verdict("same"), "abc")
    assert len(Ledger(path).entries) == 3


def test_the_last_verdict_on_a_case_counts(tmp_path: Path):
    ledger = Ledger(tmp_path / "x.jsonl")
    ledger.record(Case("a", 0, 1), Verdict("traceback", "KeyError at x.py:1 | x"), "old")
    assert ledger.failures() == [Case("a", 0, 1)]
    ledger.record(Case("a", 0, 1), Verdict("refused"), "new")
    assert ledger.failures() == [] and "1 cases, 0 failures" in summary("x", ledger.entries.values())


def test_a_summary_groups_failures_by_what_precedes_the_bar(tmp_path: Path):
    ledger = Ledger(tmp_path / "x.jsonl")
    for number, outcome in enumerate(["traceback", "traceback", "hang", "same"]):
        ledger.record(Case("a", 7, number), Verdict(outcome, f"KeyError at x.py:1 | {number}"), "abc")
    lines = summary("x", ledger.entries.values()).splitlines()
    assert lines[0].split() == ["a", "4", "1", "hang,", "1", "same,", "2", "traceback"]
    assert "2 traceback: KeyError at x.py:1 (such as case 0)" in lines[1]
    assert lines[-1] == "x: 4 cases, 3 failures (seeds [7])"
