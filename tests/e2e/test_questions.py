"""Questions asked during training get the scores that `evaluate` gives the checkpoint, and change nothing else."""

import dataclasses
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from qlora_jax import evaluate
from qlora_jax.io.run_folder.checkpoint import Checkpoints
from qlora_jax.measures.metrics import Metric
from qlora_jax.training import loop
from qlora_jax.training.metrics.metrics_file import read_metrics
from qlora_jax.training.metrics.step_metrics import flatten_metrics
from qlora_jax.training.run import dry_run, train
from tests.e2e.project import project, stop_after
from tests.e2e.test_paging import with_paging
from tests.e2e.tiny_runs import Records, arrays_at, numbers, quiet, run, session_of, stop_and_resume
from tests.marks import first_always, some_in_ci

KINDS = ("choices", "letters", "answers")
COMPILED = "/jax/core/compile/backend_compile_duration"


def write_questions(folder: Path) -> dict[str, str]:
    """A file of each kind; of two subjects, and two lengths."""
    folder.mkdir(exist_ok=True)
    words = ["sun", "moon", "rain", "wind"]
    asked = [f"say {words[n % 3]} {n}" + " please" * (n % 4 == 0) * 8 for n in range(11)]
    choices = [{"question": text, "options": words, "answer": n % 4} for n, text in enumerate(asked)]
    answers = [{"question": text, "answer": [words[n % 2], "ray"]} for n, text in enumerate(asked)]
    rows = {
        "choices": choices,
        "letters": [row | {"subject": f"words_{n % 2}"} for n, row in enumerate(choices)],
        "answers": answers,
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: str(folder / f"{name}.jsonl") for name in rows}


def asking(folder: Path, **changes):
    """A run of 4 steps that asks questions at steps 0, 2 and 4."""
    changes["train"] = dict(steps=4, eval_every=2) | changes.get("train", {})
    questions = write_questions(folder / "questions") | dict(max_new_tokens=6)
    return project(folder / "project", questions=questions, **changes)


def without_questions(config, folder: Path):
    none = dataclasses.replace(config.questions, **dict.fromkeys(KINDS))
    return dataclasses.replace(config, questions=none, output=str(folder / "without"))


def evaluations(config) -> list[dict]:
    return [record for record in read_metrics(Path(config.output) / "metrics.jsonl") if "loss" not in record]


def evaluated(config, folder: Path, *, step: int, column: str = "checkpoint") -> dict:
    """Returns the metrics of `evaluate` for a run's checkpoint, in the form of a record."""
    out = folder / f"{column}-{step}.json"
    words = [word for kind in KINDS for word in (f"--{kind}", getattr(config.questions, kind))]
    words += ["--max_new_tokens", "6", "--columns", f"[{column}]", "--compute_dtype", "auto", "--json", str(out)]
    evaluate.main(["--run", config.output, "--step", str(step), *words])
    found = {}
    for kind, task in json.loads(out.read_text())["tasks"].items():
        of_column = task["columns"][column].items()
        found |= flatten_metrics(kind, [Metric(name, "", one["value"], one.get("interval")) for name, one in of_column])
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = asking(tmp_path_factory.mktemp("questions"), train=dict(save_every=2))
    out = io.StringIO()
    assert train(
        config, Path(config.output), resume=False, oversized=False, console=Console(file=out, width=200)
    ).finished
    return config, out.getvalue()


def test_every_evaluation_has_what_evaluate_says_of_its_checkpoint(finished, tmp_path):
    config, _ = finished
    told = evaluations(config)
    assert [record["step"] for record in told] == [0, 2, 4]
    for record in told[1:]:
        found = evaluated(config, tmp_path, step=record["step"])
        assert set(found) == {name for name in record if name.startswith(KINDS)}
        assert {name: record[name] for name in found} == found
        assert found["letters_mean_over_2_subjects_low"] <= found["letters_mean_over_2_subjects"]
    before = evaluated(config, tmp_path, step=4, column="quantized")
    assert {name: told[0][name] for name in before} == before
    assert told[0] | {"step": 4} != told[-1]


def test_they_are_shown_and_drawn(finished):
    config, printed = finished
    last = evaluations(config)[-1]
    loss, low, high = (last[f"eval_loss{end}"] for end in ("", "_low", "_high"))
    for line in (
        f"step 4/4  held-out loss {loss:.3f} [{low:.3f}, {high:.3f}], perplexity {np.exp(loss):.3f}",
        f"step 4/4  choices: right by likelihood {last['choices_right_by_likelihood']:.1%} [",
        f"step 4/4  letters: right by letter {last['letters_right_by_letter']:.1%} [",
        f"step 4/4  answers: exactly the answer {last['answers_exactly_the_answer']:.1%} [",
    ):
        assert line in printed
    page = (Path(config.output) / "report.html").read_text()
    for caption in ("Questions by options", "Questions by letter", "Exact answers"):
        assert f'aria-label="{caption} over optimizer steps"' in page
    facts = json.loads((Path(config.output) / "report.json").read_text())
    assert [one["kind"] for one in facts["questions"]] == ["choices", "choices", "letters", "letters", "answers"]
    assert facts["questions"][2]["last"]["value"] == last["letters_right_by_letter"]
    assert facts["training"]["last_eval"]["perplexity"] == pytest.approx(np.exp(last["eval_loss"]))


def test_training_is_the_same_to_the_bit_without_them(finished, tmp_path):
    config, _ = finished
    plain = without_questions(config, tmp_path)
    assert run(plain)
    bare = [{name: value for name, value in record.items() if not name.startswith(KINDS)} for record in numbers(config)]
    assert bare == numbers(plain)
    for asked, silent in zip(arrays_at(config, 4), arrays_at(plain, 4), strict=True):
        np.testing.assert_array_equal(asked, silent)


@pytest.mark.parametrize("steps", first_always([3, 2]))
def test_a_resumed_run_has_each_record_once(finished, tmp_path, monkeypatch, steps):
    config = dataclasses.replace(finished[0], output=str(tmp_path / "run"))
    stop_and_resume(config, steps, monkeypatch)
    assert numbers(config) == numbers(finished[0])
    assert run(config, resume=True)  # nothing is left to do
    assert numbers(config) == numbers(finished[0])


@pytest.mark.slow
def test_a_resumed_run_may_ask_others(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(finished[0], output=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        stop_after(patch, config, 3)
        assert not run(config)
    fewer = dataclasses.replace(config, questions=dataclasses.replace(config.questions, max_rows=5, answers=None))
    assert run(fewer, resume=True)
    first, *_, last = evaluations(config)
    assert "answers_exactly_the_answer" in first and "answers_exactly_the_answer" not in last
    assert last["choices_right_by_likelihood"] in {n / 5 for n in range(6)}


def test_later_evaluations_compile_nothing(finished, tmp_path):
    jax.clear_caches()
    session = session_of(dataclasses.replace(finished[0], output=str(tmp_path / "run")))
    compiled = []

    def listen(name, *_, **__):
        compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with Checkpoints(tmp_path / "run", 1) as checkpoints:
            progress = loop.evaluate(session, loop.initial_state(session), checkpoints, Records(), lambda: False)
            assert COMPILED in compiled
            batches = session.run.inputs.dataset.train_batches()
            for _ in range(2):
                progress = loop.train_step(session, progress, next(batches), 0.0, Records())
                compiled.clear()
                progress = loop.evaluate(session, progress, checkpoints, Records(), lambda: False)
                assert COMPILED not in compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_without_held_out_rows_they_are_asked_all_the_same(tmp_path):
    config = asking(tmp_path, data=dict(eval_fraction=0.0), train=dict(steps=2, eval_every=1))
    assert run(config)
    told = evaluations(config)
    assert [record["step"] for record in told] == [0, 1, 2]
    assert all("letters_right_by_letter" in record and "eval_loss" not in record for record in told)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_labels_and_programs_are_asked_as_evaluate_asks_them(tmp_path):
    labelled = [{"text": f"{word} {n}", "label": n % 2} for n in range(5) for word in ("sun", "rain")]
    problem = {
        "prompt": "def one():\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
        "entry_point": "one",
    }
    problem["prompt"] += '    """Returns 1."""\n'
    questions = {"label_prompt": "{text}", "label_texts": {"0": "moon", "1": "sun"}, "max_new_tokens": 6}
    for kind, rows in {"labels": labelled, "programs": [problem] * 2}.items():
        questions[kind] = str(tmp_path / f"{kind}.jsonl")
        Path(questions[kind]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = project(tmp_path / "project", questions=questions, train=dict(steps=2, eval_every=2))
    assert run(config)
    out = tmp_path / "scores.json"
    words = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in questions.items()]
    evaluate.main(["--run", config.output, *words, "--columns=[checkpoint]", "--compute_dtype=auto", f"--json={out}"])
    last = evaluations(config)[-1]
    for kind, task in json.loads(out.read_text())["tasks"].items():
        of_column = task["columns"]["checkpoint"].items()
        found = [Metric(name, "", one["value"], one.get("interval")) for name, one in of_column]
        flat = flatten_metrics(kind, found)
        assert {name: last[name] for name in flat} == flat
    assert {"labels_right_label", "labels_F1_low", "labels_Matthews_correlation", "programs_pass_1"} <= last.keys()


def test_rows_that_are_no_questions_are_told_before_training(tmp_path):
    config = asking(tmp_path)
    rows = {
        "answer: found 'c', expected one of the 2 options": {"question": "?", "options": ["a", "b"], "answer": "c"},
        "tokens; the model has 256": {"question": "x" * 300, "options": ["a", "b"], "answer": 0},
    }
    for problem, row in rows.items():
        Path(config.questions.letters).write_text(json.dumps(row))
        with pytest.raises(ValueError, match=problem):
            run(config)
        with pytest.raises(ValueError, match=problem):
            dry_run(config, Path(config.output), resume=False, oversized=False, console=quiet())
    assert not Path(config.output).exists()


METHODS = {
    "dora": dict(lora=dict(method="dora")),
    "pissa": dict(lora=dict(init="pissa", svd_niter=4)),
    "ia3": dict(lora=dict(method="ia3", rank=16, dropout=0.0), optim=dict(learning_rate=1e-1)),
    "ln_tuning": dict(lora=dict(method="ln_tuning", rank=16, dropout=0.0), optim=dict(learning_rate=1e-1)),
    "houlsby": dict(lora=dict(method="houlsby", dropout=0.0)),
    "full": dict(
        lora=dict(method="full", rank=16, dropout=0.0), model=dict(quant_type="none"), optim=dict(learning_rate=1e-3)
    ),
    "packed": dict(data=dict(packing=True)),
    "bfloat16": dict(lora=dict(dtype="bfloat16"), model=dict(compute_dtype="bfloat16")),
    "new tokens": dict(model=dict(new_tokens=["<think>"])),
}


IN_CI = ("dora", "full", "packed")


@pytest.mark.parametrize("name", some_in_ci([(m,) for m in METHODS], lambda i: list(METHODS)[i] in IN_CI))
def test_every_method_is_scored_as_evaluate_scores_it(tmp_path, name):
    config = asking(tmp_path, **METHODS[name])
    assert run(config)
    last = evaluations(config)[-1]
    found = evaluated(config, tmp_path, step=4)
    assert {figure: last[figure] for figure in found} == found


@pytest.mark.slow
def test_pages_change_nothing(finished, tmp_path):
    config = with_paging(finished[0], tmp_path / "run", paging="on", paging_budget="70KiB")
    assert run(config)
    assert evaluations(config) == evaluations(finished[0])
