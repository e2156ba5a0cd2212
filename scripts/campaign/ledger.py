"""Records the verdict on each case of a campaign in a JSON Lines file, so that a campaign stops and continues."""

import collections
import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

FAILURES = frozenset({"traceback", "unclear", "hang", "memory", "crash", "silent", "lost", "differs", "left"})
EXAMPLES = 12  # groups of failures that a summary lists per kind


class Verdict(NamedTuple):
    """The outcome of a case, and what explains it.

    Fields:
      outcome: one word; FAILURES lists those that fail a campaign.
      detail: one line. Failures with equal text before the first "|" are counted as one group.
    """

    outcome: str
    detail: str = ""


class Case(NamedTuple):
    """One case of a campaign; kind, seed and number determine it."""

    kind: str
    seed: int
    number: int


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A judged case, and the commit that it ran on."""

    case: Case
    verdict: Verdict
    commit: str


class Ledger:
    """The judged cases in a file; the last line of a case counts."""

    def __init__(self, path: Path):
        """Reads the file if it exists, and removes half a line that a killed campaign left at its end."""
        self._path = path
        self.entries: dict[Case, Entry] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)
            for line in content[: content.rfind(b"\n") + 1].decode("utf-8").splitlines():
                self._add(json.loads(line))

    def _add(self, line: dict) -> None:
        case = Case(line["kind"], line["seed"], line["case"])
        self.entries[case] = Entry(case, Verdict(line["outcome"], line["detail"]), line["commit"])

    def record(self, case: Case, verdict: Verdict, commit: str) -> None:
        """Appends one line."""
        line = {"kind": case.kind, "seed": case.seed, "case": case.number, **verdict._asdict(), "commit": commit}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._add(line)

    def open_cases(self, kinds: Iterable[str], seed: int, count: int) -> list[Case]:
        """Returns the cases 0 to `count` - 1 of each kind that are not yet judged."""
        wanted = (Case(kind, seed, number) for kind in kinds for number in range(count))
        return [case for case in wanted if case not in self.entries]

    def failures(self) -> list[Case]:
        """Returns the cases that failed when they last ran."""
        return [case for case, entry in self.entries.items() if entry.verdict.outcome in FAILURES]


def summary(name: str, entries: Iterable[Entry]) -> str:
    """Returns a line per kind with its counts, the groups of its failures, and a last line with the totals."""
    by_kind: dict[str, list[Entry]] = collections.defaultdict(list)
    for entry in entries:
        by_kind[entry.case.kind].append(entry)
    lines = [line for kind in sorted(by_kind) for line in _kind_lines(kind, by_kind[kind])]
    every = [entry for found in by_kind.values() for entry in found]
    failed = sum(entry.verdict.outcome in FAILURES for entry in every)
    seeds = sorted({entry.case.seed for entry in every})
    return "\n".join([*lines, f"{name}: {len(every):,} cases, {failed:,} failures (seeds {seeds})"])


def _kind_lines(kind: str, entries: list[Entry]) -> list[str]:
    counts = collections.Counter(entry.verdict.outcome for entry in entries)
    lines = [
        f"{kind:<14}{len(entries):>7,}  " + ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))
    ]
    groups: dict[tuple[str, str], list[Entry]] = collections.defaultdict(list)
    for entry in entries:
        if entry.verdict.outcome in FAILURES:
            groups[entry.verdict.outcome, entry.verdict.detail.partition("|")[0].strip()].append(entry)
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))
    for (outcome, detail), found in largest[:EXAMPLES]:
        first = min(entry.case.number for entry in found)
        lines.append(f"    {len(found):>5,} {outcome}: {detail[:240]} (such as case {first})")
    if len(largest) > EXAMPLES:
        lines.append(f"    and {len(largest) - EXAMPLES} more groups")
    return lines
