"""Interleaved processes of a few lines: turns, failures that leave the others running, ratios of blocks."""

import sys

from scripts.bench.support import interleave

COUNTS = "import json, sys\nfor i, _ in enumerate(sys.stdin): print(json.dumps({'seconds': i}), flush=True)"
DIES = "import json, sys\nsys.stdin.readline(); print('{}', flush=True); sys.stdin.readline(); sys.exit('no memory')"
SLEEPS = "import time\ntime.sleep(60)"


def python(program: str) -> list[str]:
    return [sys.executable, "-S", "-c", program]


def test_the_first_of_a_turn_is_not_counted():
    with interleave.WorkerGroup() as group:
        assert group.start("a", python(COUNTS), counted=2)["seconds"] == 0
        group.start("b", python(COUNTS))
        turns = group.run(2)
    assert [[record["seconds"] for record in turn] for turn in turns["a"]] == [[2, 3], [5, 6]]
    assert [[record["seconds"] for record in turn] for turn in turns["b"]] == [[2], [4]]
    record = turns["a"][0][0]
    assert record["since_start_s"] > 0
    assert 1 < record["peak_rss_mib"] < 100


def test_one_that_fails_drops_out_and_says_why():
    with interleave.WorkerGroup(timeout_s=2) as group:
        assert group.start("slow", python(SLEEPS)) is None
        group.start("good", python(COUNTS))
        group.start("dying", python(DIES))
        assert list(group.run(1)) == ["good"]
    assert group.failures["slow"] == "no answer within 2 s"
    assert group.failures["dying"] == "ended (status 1): no memory"


def test_a_program_that_is_missing_is_a_failure_with_its_path():
    with interleave.WorkerGroup() as group:
        assert group.start("missing", ["/nowhere/bin/python"]) is None
        group.start("good", python(COUNTS))
        assert list(group.run(1)) == ["good"]
    assert group.failures == {"missing": "/nowhere/bin/python: No such file or directory"}


def test_ratios_are_of_neighbouring_blocks():
    turns = [[{"seconds": 1}, {"seconds": 2}, {"seconds": 9}], [{"seconds": 4}, {"seconds": 6}]]
    assert interleave.block_medians(turns, "seconds") == [2, 5]
    assert interleave.median_of(turns, "seconds") == 4
    # The machine halves its speed after the first block: no ratio moves.
    assert interleave.median_ratio([3, 6, 6], [2, 4, 3]) == 1.5
