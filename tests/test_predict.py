"""`qlora-jax predict` and the functions of the Python face: the head's outputs for files and texts."""

import datetime
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

import qlora_jax as q
from qlora_jax import predict
from qlora_jax.api.provenance import parts_of
from qlora_jax.evaluation.heads.rows import sequence_outputs
from qlora_jax.objectives.head_objective import TrainedHead
from tests.inference.head_run import write_head_run

HEAD = TrainedHead(objective="classification", labels=("dark", "bright"))
WORDS = ["sun", "the moon", "a star, and another one"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_head_run(tmp_path_factory.mktemp("predict"), HEAD)


def test_a_file_and_python_get_the_outputs_of_the_head(run, tmp_path, capsys):
    model, tokenizer = q.load(str(run))
    ids = [np.array(tokenizer.encode(text), np.int32) for text in WORDS]
    outputs = sequence_outputs(parts_of(model), ids)
    found = q.classify(model, tokenizer, WORDS)
    margins = [np.log(one.probabilities["bright"] / one.probabilities["dark"]) for one in found]
    np.testing.assert_allclose(margins, outputs[:, 1] - outputs[:, 0], rtol=1e-9)
    assert np.ptp(margins) > 0.01
    assert q.classify(model, tokenizer, [{"text": text, "label": 3} for text in WORDS]) == found

    rows, lines, out = tmp_path / "rows.jsonl", tmp_path / "rows.txt", tmp_path / "out.jsonl"
    rows.write_text("".join(json.dumps({"review": text, "id": n}) + "\n" for n, text in enumerate(WORDS)))
    lines.write_text("\n\n".join(WORDS))
    predict.main(["--run", str(run), "--rows", str(rows), "--file_columns", "{text: review}", "--output", str(out)])
    written = [json.loads(line) for line in out.read_text().splitlines()]
    expected = [{"id": n, "text": WORDS[n], **columns(one)} for n, one in enumerate(found)]
    assert written == expected
    assert "3 predictions" in capsys.readouterr().err
    predict.main(["--run", str(run), "--rows", str(lines)])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [{"text": text, **columns(one)} for text, one in zip(WORDS, found, strict=True)]


def columns(one) -> dict:
    return {"prediction": one.label, "probabilities": one.probabilities}


def test_other_heads_and_rows_are_refused(run, tmp_path):
    model, tokenizer = q.load(str(run))
    for function in (q.score, q.embed):
        with pytest.raises(ValueError, match="found a head of objective=classification, expected "):
            function(model, tokenizer, WORDS)
    base, _ = q.load(str(run.parent / "model"))
    with pytest.raises(ValueError, match="found a model without a sequence head, expected classification"):
        q.classify(base, tokenizer, WORDS)
    (tmp_path / "rows.jsonl").write_text('{"text": "sun", "prediction": 1}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: column 'prediction' exists"):
        predict.main(["--run", str(run), "--rows", str(tmp_path / "rows.jsonl")])
    with pytest.raises(ValueError, match=r"rows: found one str, expected a list .* Put it into a list"):
        q.classify(model, tokenizer, "sun")


def test_columns_stand_next_to_the_predictions_or_are_refused_first(run, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "sun", "reward": 2, "embedding": null}\n')  # names that only other heads add
    predict.main(["--run", str(run), "--rows", str(rows)])
    found = json.loads(capsys.readouterr().out)
    assert [*found] == ["text", "reward", "embedding", "prediction", "probabilities"] and found["reward"] == 2
    rows.write_text('{"text": "sun"}\n{"text": "moon", "note": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: column 'note' cannot be written as JSON .*surrogates"):
        predict.main(["--run", str(run), "--rows", str(rows)])
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": ["sun", "moon"], "day": [datetime.date(2026, 1, 1)] * 2})
    importlib.import_module("pyarrow.parquet").write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"(?s)2 of 2 rows.*column 'day' cannot be written as JSON .*date.*Remove it"):
        predict.main(["--run", str(run), "--rows", str(tmp_path / "rows.parquet")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model M --text sun", "run: required, because a base has no sequence head"),
        ("--run R", "text, rows: found neither, expected one"),
        ("--run R --text sun --rows FILE", "text, rows: found both, expected one"),
        ("--run R --text sun --max_rows 3 --output x", "(?s)output: requires rows.*max_rows: requires rows"),
        ("--run R --rows FILE --output nowhere/x", "output: folder 'nowhere' does not exist"),
        ("--run R --rows FILE --file_columns {'txt':'review'}", "file_columns: .*'txt'"),
    ],
)
def test_bad_settings(words, message):
    with pytest.raises(ValueError, match=message):
        predict.main(words.split())
