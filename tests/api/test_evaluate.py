"""`evaluate_model` returns the numbers that the command `evaluate` stores, and prints nothing."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qlora_jax as q
from qlora_jax import evaluate
from qlora_jax.api.provenance import attach, parts_of, provenance_of
from qlora_jax.config import ConfigError
from qlora_jax.models.partition import combine
from qlora_jax.objectives.head_objective import TrainedHead
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


def headed(model, head: TrainedHead, weight: float | None = None):
    """The model with a sequence head, as training leaves it; all weights of the head are `weight` if it is given."""
    copy = combine(parts_of(model))
    copy.add_sequence_head(head.spec(), jax.random.key(0))
    if weight is not None:
        copy.score.adapter.weight[...] = jnp.full_like(copy.score.adapter.weight[...], weight)
    return attach(copy, dataclasses.replace(provenance_of(model), head=head))


NUMBER = TrainedHead(objective="regression", described=False)


def test_heads_are_evaluated_also_those_of_other_libraries(models, tmp_path):
    (_, model), tokenizer = models[0].values(), models[1]
    rows = [{"prompt": f"say {word}", "chosen": word, "rejected": word[::-1]} for word in ("sun", "moon", "rain")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = q.evaluate_model(headed(model, NUMBER), tokenizer, pairs=tmp_path / "pairs.jsonl").tasks["pairs"]
    assert list(found.metrics["model"]) == ["right by reward", "reward margin", "ties (count as half)"]
    with pytest.raises(ValueError, match=r"(?s)3 of 3 rows can't be used.*pairs.jsonl:1, 2, 3: an output of"):
        q.evaluate_model(headed(model, NUMBER, np.nan), tokenizer, pairs=tmp_path / "pairs.jsonl")
    described = headed(model, dataclasses.replace(NUMBER, described=True))
    with pytest.raises(ValueError, match="found a head of objective=regression, expected reward"):
        q.evaluate_model(described, tokenizer, pairs=tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match="pair_beta: models in memory have no reference"):
        q.evaluate_model(model, tokenizer, pairs=tmp_path / "pairs.jsonl", pair_beta=0.2)


def test_models_with_different_heads_are_refused(models, tmp_path):
    (base, tuned), tokenizer = models[0].values(), models[1]
    (tmp_path / "labels.jsonl").write_text('{"text": "sun", "label": "a"}\n')
    head = TrainedHead(objective="classification", labels=("a", "b"))
    with pytest.raises(ValueError, match=r"base: no head; tuned: objective=classification, .*labels=\['a', 'b'\]"):
        q.evaluate_model({"base": base, "tuned": headed(tuned, head)}, tokenizer, labels=tmp_path / "labels.jsonl")
    with pytest.raises(ValueError, match="label_score: the run's head scores whole texts"):
        q.evaluate_model(headed(tuned, head), tokenizer, labels=tmp_path / "labels.jsonl", label_score="mean")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "text, rows, pairs, embeddings, choices, letters, labels, answers, programs, tasks: found none"),
        ({"windows": 3}, "windows: unknown setting; did you mean window"),
        ({"window": 1}, "window: found 1, expected 2 or more"),
        ({"text": "nowhere.txt", "window": 9, "stride": 10}, "stride: larger than window"),
    ],
)
def test_bad_settings(models, settings, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        q.evaluate_model(*models, **settings)


def test_rows_in_memory_are_an_error_that_asks_for_a_file(models):
    with pytest.raises(TypeError, match=r"^rows: found a list, expected the path of a file"):
        inspect.unwrap(q.evaluate_model)(*models, rows=[{"prompt": "say sun", "completion": "sun"}])
