"""`qlora-jax variance` on two tiny models: replies, results, the page, and an interrupted study."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qlora_jax import variance
from qlora_jax.api.generate import generate_text
from qlora_jax.api.load import load
from qlora_jax.io.run_folder.run_lock import lock_run
from qlora_jax.studies.local_model import LocalModel, OpenedLocalModel
from tests.e2e.project import write_model
from tests.studies.tournament.judges.fake_endpoint import Answer, fake_endpoint
from tests.studies.tournament.tiny_tournament import write_judge_prompts

HOSTILE = '<script>alert(1)</script> & "quoted" \'</div>'
QUESTIONS = [
    {"prompt": "the sun", "answer": "x"},
    {"prompt": "the moon", "answer": ["yes", "no"]},
    {"prompt": HOSTILE, "answer": "z"},
    {"prompt": "a star", "answer": "star"},
]
SWAPPED = 3  # seed of the order of two examples
SETTINGS: dict[str, Any] = {
    "prompts": "prompts.jsonl",
    "examples": "examples.jsonl",
    "fixed": {"temperature": 1.0, "max_new_tokens": 5},
    "vary": {
        "seed": [0, 1],
        "decoding": {"greedy": {"temperature": 0}, "sampled": {"temperature": 1}},
        "paraphrase": {"plain": {"paraphrase": "{prompt}"}, "please": {"paraphrase": "Please: {prompt}"}},
        "example_order": [None, SWAPPED],
        "quant_type": ["nf4", "none"],
    },
    "random_examples": 4,
}


def write_rows(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished study."""
    folder = tmp_path_factory.mktemp("variance")
    for seed, name in enumerate(("first", "second")):
        write_model(folder / name, seed=seed)
    write_rows(folder / "prompts.jsonl", QUESTIONS)
    write_rows(folder / "examples.jsonl", [{"prompt": "1", "answer": "one"}, {"prompt": "2", "answer": "two"}])
    run(folder, folder / "study")
    return folder


def run(folder: Path, output: Path, **changes: Any) -> dict:
    settings: dict[str, Any] = (
        SETTINGS | {"models": {name: str(folder / name) for name in ("first", "second")}} | changes
    )
    settings |= {key: str(folder / settings[key]) for key in ("prompts", "examples")}
    file = output.parent / f"{output.name}.yaml"
    file.write_text(yaml.safe_dump(settings | {"output": str(output)}, sort_keys=False))
    variance.main([str(file)])
    return results(output)


def results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def replies(output: Path) -> list[dict]:
    return [
        json.loads(line) for file in (output / "replies").glob("replies-*") for line in file.read_text().splitlines()
    ]


@pytest.mark.slow
def test_replies_are_those_of_the_model_under_the_condition(folder):
    stored = {record["reply"] for record in replies(folder / "study") if "reply" in record}
    model, tokenizer = load(str(folder / "second"))
    turns = [("user", "1"), ("assistant", "one"), ("user", "2"), ("assistant", "two"), ("user", "a star")]
    messages = [{"role": role, "content": text} for role, text in turns]
    samplings: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 1}]
    for settings in samplings:
        assert generate_text(model, tokenizer, messages, max_new_tokens=5, **settings) in stored
    swapped = [*messages[2:4], *messages[:2], {"role": "user", "content": "a star"}]
    assert np.random.default_rng(SWAPPED).permutation(2).tolist() == [1, 0]
    assert generate_text(model, tokenizer, swapped, max_new_tokens=5, temperature=1.0) in stored
    please = [one | {"content": f"Please: {one['content']}"} if one["role"] == "user" else one for one in messages]
    assert generate_text(model, tokenizer, please, max_new_tokens=5, temperature=1.0) in stored


@pytest.mark.slow
def test_every_measure_is_split_for_every_factor(folder):
    splits = results(folder / "study")["splits"]
    found = [(split["measure"], split["factor"], *split["models"]) for split in splits]
    expected = [
        (measure, factor, *models)
        for measure in ("answer", "likelihood", "length")
        for factor in SETTINGS["vary"]
        for models in (("first", "second"), ("first",), ("second",))
    ]
    assert found == expected
    of_seed = next(one for one in splits if one["measure"] == "likelihood" and one["factor"] == "seed")
    parts = {part["name"]: part for part in of_seed["parts"]}
    # A seed changes no likelihood, so that the levels are equal.
    assert parts["levels"]["value"] == pytest.approx(0.0, abs=1e-12) and parts["residual"]["value"] == pytest.approx(
        0.0
    )
    assert sum(part["share"] for part in of_seed["parts"]) == pytest.approx(1.0)
    of_bits = next(one for one in splits if one["measure"] == "likelihood" and one["factor"] == "quant_type")
    assert of_bits["level_means"]["nf4"] != of_bits["level_means"]["none"]


@pytest.mark.slow
def test_the_page_shows_the_examples_and_runs_nothing(folder):
    page = (folder / "study/variance.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in page
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert page.count("drawn at random (seed 0)") == len(QUESTIONS)


@pytest.mark.slow
def test_a_finished_study_loads_no_model(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "study", tmp_path / "study")
    monkeypatch.setattr(OpenedLocalModel, "load", lambda *args: pytest.fail("a model was loaded"))
    again = run(folder, tmp_path / "study")
    assert again["splits"] == results(folder / "study")["splits"]


@pytest.mark.slow
def test_a_judge_compares_the_stored_replies(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "study", tmp_path / "study")
    monkeypatch.setattr(OpenedLocalModel, "load", lambda *args: pytest.fail("a model was loaded"))
    prompts = write_judge_prompts(tmp_path)
    with fake_endpoint(lambda message, before: Answer("The first one.\n1")) as endpoint:
        judge = {"kind": "endpoint", "url": endpoint.url, "model": "m", "prompts": prompts}
        judged = run(folder, tmp_path / "study", measures=["judge", "length"], judge=judge)
        asked = len(endpoint.requests)
        assert asked > 2 * len(QUESTIONS)
        run(folder, tmp_path / "study", measures=["judge", "length"], judge=judge)
    assert len(endpoint.requests) == asked
    splits = [split for split in judged["splits"] if split["measure"] == "judge"]
    assert [(split["factor"], split["models"], split["mean"]) for split in splits] == [
        (factor, ["first", "second"], 0.0) for factor in SETTINGS["vary"]
    ]
    assert "preference" in (tmp_path / "study/variance.html").read_text()


@pytest.mark.slow
def test_an_interrupted_study_resumes(folder, tmp_path, monkeypatch):
    given, counted = LocalModel.reply_each, []

    def interrupted(*args):
        for item in given(*args):
            counted.append(item)
            if len(counted) == 6:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(LocalModel, "reply_each", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "study")
    before = len(replies(tmp_path / "study"))
    assert before >= 5
    monkeypatch.setattr(LocalModel, "reply_each", lambda *args: (counted.append(one) or one for one in given(*args)))
    assert run(folder, tmp_path / "study")["splits"] == results(folder / "study")["splits"]
    every = sum("reply" in record for record in replies(folder / "study"))
    assert len(counted) == 1 + every  # the one that was lost, and each of the others once


def test_one_process_at_a_time_writes_in_a_folder(tmp_path, monkeypatch):
    write_rows(tmp_path / "prompts.jsonl", QUESTIONS)
    write_rows(tmp_path / "examples.jsonl", [{"prompt": "1", "answer": "one"}])
    output, writers = tmp_path / "study", []

    def writes(name, result):
        def refuses_others(*args):
            writers.append(name)
            with pytest.raises(ValueError, match="another process"), lock_run(output, pytest.fail):
                pytest.fail("another process could write")
            return result

        return refuses_others

    monkeypatch.setattr("qlora_jax.studies.variance.replies.observe", writes("observe", {}))
    monkeypatch.setattr("qlora_jax.studies.variance.analysis.analyse", lambda *args: [])
    monkeypatch.setattr("qlora_jax.studies.variance.page.write_results", writes("write_results", output))
    with pytest.raises(FileNotFoundError):
        run(tmp_path, output)  # nothing wrote its results
    assert writers == ["observe", "write_results"]
    with lock_run(output, pytest.fail), pytest.raises(ValueError, match="another process"):
        run(tmp_path, output)
    assert writers == ["observe", "write_results"]


def test_rows_that_cannot_be_used_are_named(tmp_path):
    for name in ("first", "second"):
        write_model(tmp_path / name)
    rows = [
        {"prompt": "a", "answer": "b"},
        {"prompt": "a", "answer": "c"},
        {"prompt": "", "answer": "c"},
        {"prompt": "d"},
    ]
    write_rows(tmp_path / "prompts.jsonl", rows)
    write_rows(tmp_path / "examples.jsonl", [{"prompt": "1", "answer": "one"}])
    with pytest.raises(ValueError) as error:
        run(tmp_path, tmp_path / "study")
    for part in (
        "the same prompt as row 1",
        "prompt: found '', expected a text",
        "answer: found None, expected a text",
    ):
        assert part in str(error.value)
