"""Ready-made rewards by their values on known replies, and a judge that is down."""

import http.server
import json
import re
import threading

import numpy as np
import pytest

from qlora_jax.config.rewards import RewardArgs
from qlora_jax.rewards import judge
from qlora_jax.rewards.functions import Replies, RewardError, RewardFunctions
from tests.sandbox.kernel import needs_seal

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def score(texts, name, columns=None, prompts=None, on_error="stop", **settings):
    given = Replies(
        prompts=prompts or ["p"] * len(texts),
        completions=texts,
        completion_ids=[[0] * len(text) for text in texts],
        columns=columns or {},
        labels=[f"p.jsonl:{row + 1}" for row in range(len(texts))],
    )
    with RewardFunctions(RewardArgs(functions=[name], on_error=on_error, **settings), []) as functions:
        functions.check_columns([*given.columns])
        return functions.score(given)


@pytest.mark.parametrize(
    ("name", "settings", "rows"),
    [
        ("exact", {}, [(" 42\n", "42", 1), ("42.", "42", 0), ("b", ["a", "b"], 1), ("", "x", 0)]),
        (
            "exact",
            {"answer_pattern": "#### (.*)"},
            [("so\n#### 1,200.", "long\n#### 1200", 1), ("#### 7", "7", 1), ("7", "7", 0)],
        ),
        ("number", {}, [("in 3 days: $1,000.00.", "x #### 1000", 1), ("2 or 3", 2, 0), ("-0.50", -0.5, 1), ("", 1, 0)]),
    ],
)
def test_answers(name, settings, rows):
    texts, answers, expected = zip(*rows, strict=True)
    table = score(texts, name, {"answer": answers}, **settings)
    np.testing.assert_array_equal(table.rewards_NF[:, 0], expected)


def test_an_answer_that_is_not_a_number_is_a_problem_of_its_row():
    table = score(["1", "2"], "number", {"answer": ["one", "2"]}, on_error="drop")
    assert table.problems == [(0, "number", "found the answer 'one', expected a number")]
    np.testing.assert_array_equal(table.rewards_NF[:, 0], [np.nan, 1])


def test_regex_by_setting_or_column():
    texts = ["<a>x</a>", "x"]
    np.testing.assert_array_equal(score(texts, "regex", pattern=r"<a>.*</a>").rewards_NF[:, 0], [1, 0])
    np.testing.assert_array_equal(score(texts, "regex", {"pattern": ["y", "^x$"]}).rewards_NF[:, 0], [0, 1])
    with pytest.raises(
        ValueError, match=r"\n  rewards\.functions: regex needs the argument 'pattern' \(found no columns, besides"
    ):
        score(texts, "regex")


def test_json_by_file_or_column(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    texts = ['{"a": 1}', '{"a": "1"}', '{"a": NaN}', "[" * 100_000, '```{"a": 1}```']
    np.testing.assert_array_equal(score(texts, "json", schema=str(path)).rewards_NF[:, 0], [1, 0, 0, 0, 0])
    schemas = [json.dumps(SCHEMA), {"type": "object"}]
    np.testing.assert_array_equal(score(texts[1:3], "json", {"schema": schemas}).rewards_NF[:, 0], [0, 0])
    np.testing.assert_array_equal(score(texts[:2], "json").rewards_NF[:, 0], [1, 1])
    away = {"$ref": "http://localhost:9/schema.json"}
    with pytest.raises(RewardError, match=r"p.jsonl:1: .*Unresolvable"):
        score(texts[:1], "json", {"schema": [away]})


@needs_seal
def test_programs():
    prompt = 'def add(a, b):\n    """Adds."""\n'
    columns = {"test": ["def check(f):\n    assert f(1, 2) == 3\n"] * 2, "entry_point": ["add"] * 2}
    plain = score(["    return a + b\n", "    return a - b\n"], "programs", columns, [prompt] * 2)
    np.testing.assert_array_equal(plain.rewards_NF[:, 0], [1, 0])
    replies = ["```python\ndef add(a, b):\n    return a + b\n```", "I cannot"]
    chat = [[{"role": "user", "content": "Write add."}]] * 2
    table = score([[{"role": "assistant", "content": each}] for each in replies], "programs", columns, chat)
    np.testing.assert_array_equal(table.rewards_NF[:, 0], [1, 0])


class Judge(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][1]["content"]
        score = 7.5 if "[Answer]\ngood {prompt}" in asked and "user: Why?" in asked else 0
        text = "I do not know." if "bad" in asked else f"Score: 3\nBut no.\nScore: {score}"
        body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def test_a_judge_scores():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    prompts = [[{"role": "user", "content": "Why?"}]] * 3
    try:
        texts = ["good {prompt}", "other", "bad"]
        table = score(texts, "judge", None, prompts, "drop", judge_url=url, judge_model="j")
    finally:
        server.shutdown()
        server.server_close()
    np.testing.assert_array_equal(table.rewards_NF[:, 0], [0.75, 0, np.nan])
    assert "found no score from 0 to 10 in the review, which ends with 'I do not know.'" in table.problems[0].text


def test_a_judge_that_is_down_is_an_error(monkeypatch):
    monkeypatch.setattr(judge, "WAITS", (0.0,))
    monkeypatch.setattr(judge, "AT_ONCE", 1)
    refused, not_asked = judge.judge(["p"] * 2, ["a", "b"], "http://127.0.0.1:9/v1", "j")
    assert re.search("^j: no connection: .*refused", str(refused))
    assert str(not_asked) == "j: not asked, because the judge did not reply before"
    with pytest.raises(RewardError, match=r"p.jsonl:1: qlora_jax.rewards.judge:judge: .*ABSENT_KEY is not set"):
        score(["a"], "judge", judge_url="http://127.0.0.1:9/v1", judge_model="j", judge_key_variable="ABSENT_KEY")
