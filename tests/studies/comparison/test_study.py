"""A study file is checked whole before anything runs."""

import json
import sys
from pathlib import Path

import gguf
import pytest

from qlora_jax.config import ConfigError
from qlora_jax.evaluation.task import MEASURES
from qlora_jax.studies.comparison.run import Run, run_of
from qlora_jax.studies.comparison.run_study import sized_settings
from qlora_jax.studies.comparison.study import data_settings, read_study
from scripts import make_noisy_titles
from tests.io.tiny_models import random_weights, tiny_config, write_gguf
from tests.studies.comparison.studies import METHODS, read, study_of, write_rows, write_study

ROOT = Path(__file__).resolve().parents[3]


def problems(folder, **changes):
    with pytest.raises(ConfigError) as error:
        read(folder, **changes)
    return error.value.problems


def task(folder, **changes):
    return {"tasks": {"numbers": study_of(folder)["tasks"]["numbers"] | changes}}


def test_each_run_has_the_settings_of_its_method_and_task(tmp_path):
    study = read(tmp_path, settings={"optim.schedule": "linear"}, **task(tmp_path, settings={"data.max_length": 64}))
    assert study.methods == list(METHODS) and list(study.pairs())[1] == ("low rank", "numbers")
    config = study.config(
        "low rank", "numbers", {**data_settings(study, ("low rank", "numbers"), search=True), "output": "x"}
    )
    assert (config.lora.rank, config.optim.schedule, config.data.max_length) == (4, "linear", 64)
    assert config.data.eval == str(tmp_path / "search.jsonl") and config.train.eval_every == 0
    assert data_settings(study, ("lora", "numbers"), search=False)["data.eval"] is None
    assert study.tasks["numbers"].kind == "rows" and study.tasks["numbers"].better == "lower"


def test_the_command_line_replaces_model_and_output(tmp_path):
    study = read_study(write_study(tmp_path), model="llama-7b", output="elsewhere")
    assert study.base["model"]["path"] == "llama-7b" and study.settings.output == "elsewhere"


def test_unknown_keys_are_suggested_with_their_lines(tmp_path):
    found = problems(tmp_path, seed=[0], **{"tasks": {"numbers": {"trian": "x", "evaluate": {}, "measure": "m"}}})
    assert any(
        line.startswith("seed: unknown setting; did you mean seeds?") and "study.yaml:" in line for line in found
    )
    assert any(line.startswith("tasks.numbers.trian: unknown setting; did you mean train?") for line in found)
    assert any(line.startswith("tasks.numbers.evaluate: found {}, expected not empty") for line in found)


def test_problems_of_the_base_name_its_file_and_line(tmp_path):
    base = tmp_path / "own.yaml"
    base.write_text("model: {path: smollm2-135m}\noptim: {rate: 1}\ntrain: {steps: x}\n")
    unknown, wrong = problems(tmp_path, base=str(base))
    assert unknown.startswith("optim.rate: unknown setting") and unknown.endswith(f"({base}:2)")
    assert wrong.startswith("train.steps: found 'x'") and wrong.endswith(f"({base}:3)")


def test_all_contradictions_are_listed_at_once(tmp_path):
    methods = {"a": {"lora.rnak": 4, "train.seed": 1}, "b/c": {"optim.learning_rate": 1.0}}
    found = problems(
        tmp_path,
        methods=methods,
        seeds=[1, 1],
        search_seeds=[1],
        budget={"steps": 1, "seconds": 2.0},
        learning_rates={"a": [0.1, -1]},
    )
    assert found == [
        "budget: found steps and seconds, expected exactly one of steps, trainable_parameters, seconds",
        "seeds: found [1, 1], expected different numbers of 0 or more",
        "search_seeds: found [1], which are in seeds. Choose other seeds",
        "methods: found the name 'b/c', expected a valid folder name",
        "learning_rates: found a, expected the methods a, b/c",
        "learning_rates: found [0.1, -1.0] for a, expected different numbers above 0",
        "methods.a: lora.rnak: unknown setting; did you mean lora.rank?",
        "methods.a: train.seed: it comes from seeds. Remove it",
        "methods.b/c: optim.learning_rate: it comes from learning_rates. Remove it",
    ]


def test_a_setting_of_method_and_task_is_refused(tmp_path):
    found = problems(tmp_path, **task(tmp_path, settings={"lora.rank": 2}))
    assert found == ["methods.low rank: lora.rank: also set by tasks.numbers.settings. Remove it from one of them"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"search": None}, "search: the search of learning rates needs rows. Set exactly one"),
        ({"search_fraction": 0.1}, "search: the search of learning rates needs rows. Set exactly one"),
        ({"train": "no.jsonl"}, "files: no.jsonl: no such file"),
        ({"measure": "perplexity"}, "measure: found 'perplexity', expected 'loss per token' or 'begins with"),
        ({"evaluate": {"harness": ["x"]}}, "evaluate: found harness, expected one of text, rows"),
        ({"evaluate": {"rows": "a", "letters": "b"}}, "evaluate: found letters, rows, expected one of text, rows"),
        ({"evaluate": {"rows": "a", "run": "b"}}, "evaluate: run: the comparison sets it. Remove it"),
        ({"evaluate": {"rows": "a", "max_row": 5}}, "evaluate: max_row: unknown setting; did you mean max_rows?"),
        ({"evaluate": {"rows": "a", "window": 2, "stride": 3}}, "evaluate: stride: larger than window"),
    ],
)
def test_a_wrong_task_is_refused(tmp_path, changes, expected):
    found = problems(tmp_path, **task(tmp_path, **changes))
    assert any(line.startswith(f"tasks.numbers.{expected}") for line in found), found


def test_a_measure_that_the_objective_does_not_have_is_refused(tmp_path):
    found = problems(tmp_path, methods={"lora": {}, "scores": {"objective": "regression"}})
    assert found == [
        "methods.scores: tasks.numbers.measure: found 'loss per token' of rows, which objective=regression does not "
        "have (expected another objective)"
    ]
    changes = {"objective": "reward"}
    (only,) = problems(tmp_path, settings=changes, **task(tmp_path))
    assert only.endswith("(expected 'right by reward' of pairs or 'reward margin' of pairs)")


def test_rows_of_a_search_without_learning_rates_are_refused(tmp_path):
    assert problems(tmp_path, learning_rates=None) == [
        "tasks.numbers.search: found without learning_rates, which are searched on it. Remove it, or set learning_rates"
    ]


def test_held_out_rows_that_training_or_the_search_sees_are_refused(tmp_path):
    changes = task(tmp_path)
    with open(tmp_path / "search.jsonl", "a") as search, open(tmp_path / "heldout.jsonl") as held_out:
        search.write(next(held_out))
    with open(tmp_path / "train.jsonl", "a") as train:  # keys in another order are the same row
        train.write(json.dumps({"completion": "205", "prompt": "say 205"}) + "\n")
    study = tmp_path / "study.yaml"
    study.write_text(json.dumps(study_of_files(tmp_path, changes)))
    with pytest.raises(ConfigError) as error:
        read_study(str(study))
    assert [line.partition(" has ")[2].partition(" of /")[0] for line in error.value.problems] == [
        "1 of the 10 held-out rows",
        "1 of the 10 held-out rows",
    ]


def study_of_files(folder, changes):
    """The study whose files exist already."""
    kept = {name: (folder / name).read_text() for name in ("train.jsonl", "search.jsonl", "heldout.jsonl")}
    study = study_of(folder, **changes)
    for name, text in kept.items():
        (folder / name).write_text(text)
    return study


def test_problems_of_configurations_name_their_methods(tmp_path):
    methods = {"full": {"lora.method": "full"}, "lora": {}}
    (found,) = problems(tmp_path, methods=methods)
    assert found.startswith("methods.full: model.quant_type: found 'nf4' with lora.method=full, expected none")
    (found,) = problems(tmp_path, settings={"train.samples": ""})
    assert found.startswith("train.samples: found '', expected not empty")


def test_learning_rates_by_method(tmp_path):
    study = read(tmp_path, learning_rates={"lora": [0.1], "low rank": [0.2, 0.3], "vectors": [1]})
    assert list(study.learning_rates("low rank")) == [0.2, 0.3]


def test_a_method_may_have_its_own_training_rows(tmp_path):
    own = write_rows(tmp_path / "own.jsonl", 300, 4)
    study = read(tmp_path, methods={"lora": {}, "other rows": {"data.train": own}})
    runs = [
        Run(study=study, stage="final", method=method, task="numbers", settings={"train.seed": 0})
        for method in study.methods
    ]
    assert [run.config.data.train for run in runs] == [str(tmp_path / "train.jsonl"), own]
    inputs = [run.job()["inputs"] for run in runs]
    assert [f"content of {own}" in each for each in inputs] == [False, True]
    assert [f"content of {tmp_path / 'train.jsonl'}" in each for each in inputs] == [True, False]
    with open(own, "a") as rows, open(tmp_path / "heldout.jsonl") as held_out:
        rows.write(next(held_out))
    with pytest.raises(ConfigError, match=r"own\.jsonl has 1 of the 10 held-out rows"):
        read_study(str(tmp_path / "study.yaml"))


def test_a_changed_chat_template_is_another_input(tmp_path):
    template, found = tmp_path / "own.jinja", []
    for text, value in (("{{ 1 }}", str(template)), ("{{ 2 }}", str(template)), ("{{ 3 }}", "chatml")):
        template.write_text(text)
        study = read(tmp_path, methods={"lora": {"data.chat_template": value}})
        (pair,) = study.pairs()
        found.append(run_of(study, "final", pair, {"train.seed": 0}).job()["inputs"])
    assert found[0] != found[1]
    assert [f"content of {template}" in each for each in found] == [True, True, False]


def _with_codes(path):
    config = tiny_config()
    return write_gguf(path, config, random_weights(config), gguf.GGMLQuantizationType.Q4_0)


STUDIES = sorted((ROOT / "configs/studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_project_are_valid(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr(sys, "argv", ["make_noisy_titles.py"])
    make_noisy_titles.main()
    model = _with_codes(tmp_path / "model.gguf") if path.stem == "stored_codes" else "smollm2-135m"
    study = read_study(str(path), model=str(model))
    _, parameters = sized_settings(study)
    assert len(study.settings.seeds) >= 3 and min(parameters.values()) > 0


def test_the_documentation_lists_every_measure():
    text = (ROOT / "docs/compare.md").read_text()
    for kind, measures in MEASURES.items():
        assert f"| `{kind}` | {', '.join(f'`{name}`' for name in measures)} |" in text


def test_the_example_of_the_documentation_is_valid(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/compare.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "study.yaml").write_text(text)
    study = read_study(str(tmp_path / "study.yaml"), model="smollm2-135m")
    assert study.methods == ["qlora", "lora on 16 bits", "full"]


def test_every_file_of_a_mixture_has_a_digest(tmp_path):
    other = write_rows(tmp_path / "more.jsonl", 300, 4)
    study = read(tmp_path, **task(tmp_path, train={str(tmp_path / "train.jsonl"): 1.0, other: 0.5}))
    assert other in study.tasks["numbers"].digests
