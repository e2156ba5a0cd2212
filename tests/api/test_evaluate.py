"""`evaluate_model` returns the numbers that the command `evaluate` stores, and prints nothing."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import qlora_jax as q
from qlora_jax import evaluate
from qlora_jax.config import ConfigError
from tests.inference.small_run import write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate_model")
    write_run(folder)
    words = ["sun", "moon", "rain", "wind"]
    (folder / "text.txt").write_text(" ".join(np.random.default_rng(0).choice(words, 60)))
    files = {
        "rows": [{"prompt": f"say {word}", "completion": word} for word in words],
        "choices": [{"question": f"{word}?", "options": words, "answer": word} for word in words],
        "letters": [{"question": f"{word}?", "options": words, "answer": word, "subject": "sky"} for word in words],
        "answers": [{"question": f"{word}?", "answer": word} for word in words],
    }
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def models(folder):
    base, tokenizer = q.load(str(folder / "model"), compute_dtype="float32")
    tuned, _ = q.load(str(folder / "run"), compute_dtype="float32")
    return {"quantized": base, "checkpoint": tuned}, tokenizer


def files_of(folder) -> dict[str, str]:
    return {"text": str(folder / "text.txt")} | {
        name: str(folder / f"{name}.jsonl") for name in ("rows", "choices", "letters", "answers")
    }


def test_numbers_equal_those_of_the_command(folder, models, tmp_path, capfd):
    files, out = files_of(folder), tmp_path / "scores.json"
    words = [word for name, path in files.items() for word in (f"--{name}", path)]
    words += ["--window", "64", "--max_new_tokens", "6", "--columns", "[quantized, checkpoint]"]
    evaluate.main(["--run", str(folder / "run"), *words, "--json", str(out)])
    printed = capfd.readouterr().out
    found = q.evaluate_model(*models, **files, window=64, max_new_tokens=6)
    assert capfd.readouterr() == ("", "")
    expected = json.loads(out.read_text())
    assert json.loads(json.dumps(found.to_dict()["tasks"])) == expected["tasks"]
    label = expected["labels"]["checkpoint"]
    assert len(expected["tasks"]) == 5 and str(found).splitlines()[0] == printed.splitlines()[0]
    assert "nf4 to " + label in printed and "quantized to checkpoint" in str(found)


def test_one_model_has_metrics_and_no_comparisons(folder, models):
    (model, _), tokenizer = models[0].values(), models[1]
    found = q.evaluate_model(model, tokenizer, text=folder / "text.txt", window=64)
    metric = found.tasks["text"].metrics["model"]["perplexity"]
    low, high = metric.interval
    assert low < metric.value < high and found.tasks["text"].comparisons == {}
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(model)))


def test_plain_text_without_the_chat_template_has_other_scores(folder, models):
    (model, _), tokenizer = models[0].values(), models[1]
    chat, raw = (
        q.evaluate_model(model, tokenizer, rows=folder / "rows.jsonl", raw=raw).tasks["rows"].metrics["model"]
        for raw in (False, True)
    )
    assert chat["loss per token"].value != raw["loss per token"].value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "text, rows, pairs, choices, letters, labels, answers, programs, tasks: found none"),
        ({"windows": 3}, "windows: unknown setting; did you mean window"),
        ({"window": 1}, "window: found 1, expected 2 or more"),
        ({"text": "nowhere.txt", "window": 9, "stride": 10}, "stride: larger than window"),
    ],
)
def test_bad_settings(models, settings, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        q.evaluate_model(*models, **settings)
