"""`python -m qlora_jax.evaluate`, from the command line to the table and the file."""

import json

import numpy as np
import pytest

from qlora_jax import evaluate, runtime
from qlora_jax.inference.choices import choice_scores
from qlora_jax.inference.scoring import answer_scores
from qlora_jax.inference.task_files import choice_task, rows_task, text_task
from qlora_jax.io.opened import adapted, held_as, load_base, open_base_or_run
from qlora_jax.models.partition import partition
from tests.inference.small_run import write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_run(folder)
    rng = np.random.default_rng(0)
    words = ["sun", "moon", "rain", "wind"]
    (folder / "text.txt").write_text(" ".join(rng.choice(words, 60)))
    questions = [{"question": f"{a}?", "options": words, "answer": int(rng.integers(4))} for a in rng.choice(words, 12)]
    rows = [{"prompt": f"say {a}", "completion": a} for a in words]
    for name, lines in {"questions": questions, "rows": rows}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(autouse=True)
def no_global_settings(monkeypatch):
    monkeypatch.setattr(runtime, "start", lambda: None)


def direct(folder, column):
    """A column's scores without the command."""
    opened = open_base_or_run(None, str(folder / "run"))
    model = load_base(opened, held_as(opened, "none" if column == "unquantized" else "auto", "float32"))
    parts = adapted(model, opened.run) if column == "checkpoint" else partition(model)
    tokenizer, limits = opened.tokenizer, dict(max_rows=None, max_positions=256)
    text = text_task(str(folder / "text.txt"), tokenizer, window=64, stride=None, max_tokens=None, max_positions=256)
    return (
        answer_scores(*parts, text.rows),
        choice_scores(*parts, choice_task(str(folder / "questions.jsonl"), tokenizer, **limits).choices),
        answer_scores(*parts, rows_task(str(folder / "rows.jsonl"), tokenizer, **limits).rows),
    )


def test_three_models_side_by_side(folder, tmp_path, capsys):
    files = [f"--{key}={folder / name}" for key, name in [("text", "text.txt"), ("rows", "rows.jsonl")]]
    files.append(f"--choices={folder / 'questions.jsonl'}")
    evaluate.main(["--run", str(folder / "run"), *files, "--window", "64", "--json", str(tmp_path / "scores.json")])
    tasks = json.loads((tmp_path / "scores.json").read_text())["tasks"]
    printed = capsys.readouterr().out
    assert "run, step 7" in printed
    perplexities = set()
    for column in ("unquantized", "quantized", "checkpoint"):
        text, choices, rows = direct(folder, column)
        found = {name: task["columns"][column] for name, task in tasks.items()}
        assert found["text"]["perplexity"]["value"] == pytest.approx(text.perplexity)
        assert found["choices"]["right by likelihood"]["value"] == choices.by_sum.mean()
        assert found["choices"]["right by likelihood a token"]["value"] == choices.by_mean.mean()
        assert found["rows"]["loss a token"]["value"] == pytest.approx(rows.mean_nll)
        assert found["rows"]["begins with the answer"]["value"] == rows.begins.mean()
        assert f"{text.perplexity:.3f}" in printed
        perplexities.add(f"{text.perplexity:.3f}")
    assert len(perplexities) == 3
    pairs = [(change["from"], change["to"]) for change in tasks["text"]["comparisons"]]
    assert pairs == [("unquantized", "quantized"), ("quantized", "checkpoint")]


def test_columns_can_be_chosen(folder, tmp_path):
    words = ["--text", str(folder / "text.txt"), "--window", "64", "--json", str(tmp_path / "scores.json")]
    evaluate.main(["--model", str(folder / "model"), *words, "--columns", "[quantized]", "--quant_type", "fp4"])
    data = json.loads((tmp_path / "scores.json").read_text())
    assert data["labels"] == {"quantized": "fp4"}
    assert list(data["tasks"]["text"]["columns"]) == ["quantized"]
    assert data["tasks"]["text"]["comparisons"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model MODEL", "text, choices, letters, rows, harness: none is given"),
        ("--model MODEL --text TEXT --window 9 --stride 10", r"stride: found 10, expected at most window \(9\)"),
        ("--model MODEL --text TEXT --shots TEXT", "shots: is for letters; give letters too"),
        ("--model MODEL --text TEXT --columns [checkpoint]", "columns: checkpoint needs a run"),
        ("--model MODEL --text TEXT --columns [nf4]", "columns: found 'nf4', expected some of unquantized"),
        ("--model MODEL --text TEXT --columns [quantized] --quant_type none", "quantized needs a quant_type"),
        ("--model MODEL --text TEXT --json nowhere/x", "json: found 'nowhere/x', but there is no folder"),
        ("--model MODEL --text nowhere --window 9", "nowhere: no such file"),
        ("--model MODEL --text TEXT", "window=512: the model reads 256 tokens"),
        ("--model MODEL --rows TEXT", "text.txt: 1 of 1 rows can't be used"),
    ],
)
def test_bad_settings(folder, words, message):
    places = {"MODEL": folder / "model", "TEXT": folder / "text.txt"}
    with pytest.raises(ValueError, match=message):
        evaluate.main([str(places.get(word, word)) for word in words.split()])
