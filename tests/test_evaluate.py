"""`qlora-jax evaluate`, from the command line to the table and the file."""

import json
import shutil

import numpy as np
import pytest

from qlora_jax import evaluate
from qlora_jax.evaluation.loglikelihood import score_rows
from qlora_jax.evaluation.tasks.choices import choices_task, score_choices
from qlora_jax.evaluation.tasks.rows import rows_task
from qlora_jax.evaluation.tasks.text import text_task
from qlora_jax.inference.decode import generate
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.io.pretrained import apply_adapter, load_base, open_pretrained, weight_settings
from qlora_jax.measures.statistics import mcnemar, paired_bootstrap, wilson_interval
from qlora_jax.models.partition import partition
from tests.e2e.project import TEMPLATE
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
    answers = [{"question": f"{a}?", "answer": a} for a in words]
    for name, lines in {"questions": questions, "rows": rows, "answers": answers}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def direct(folder, column, step=7):
    """The scores of a column, computed without the command."""
    opened = open_pretrained(run=str(folder / "run"), step=step)
    model = load_base(opened, weight_settings(opened, "none" if column == "unquantized" else "auto", "float32"))
    parts = apply_adapter(model, opened.run) if column == "checkpoint" else partition(model)
    tokenizer, limits = opened.tokenizer, dict(max_rows=None, max_positions=256)
    text = text_task(str(folder / "text.txt"), tokenizer, window=64, stride=None, max_tokens=None, max_positions=256)
    return (
        score_rows(parts, text.rows),
        score_choices(parts, choices_task(str(folder / "questions.jsonl"), tokenizer, **limits).choices),
        score_rows(parts, rows_task(str(folder / "rows.jsonl"), tokenizer, **limits).rows),
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
        assert found["choices"]["right by likelihood per token"]["value"] == choices.by_mean.mean()
        assert found["rows"]["loss per token"]["value"] == pytest.approx(rows.mean_nll)
        assert found["rows"]["begins with the answer"]["value"] == rows.begins.mean()
        assert f"{text.perplexity:.3f}" in printed
        perplexities.add(f"{text.perplexity:.3f}")
    assert len(perplexities) == 3
    assert "rows: in simulations, 95 % intervals of means over so few contained the truth in" in printed
    pairs = [(change["from"], change["to"]) for change in tasks["text"]["comparisons"]]
    assert pairs == [("unquantized", "quantized"), ("quantized", "checkpoint")]


def test_columns_can_be_chosen(folder, tmp_path):
    words = ["--text", str(folder / "text.txt"), "--window", "64", "--json", str(tmp_path / "scores.json")]
    evaluate.main(["--model", str(folder / "model"), *words, "--columns", "[quantized]", "--quant_type", "fp4"])
    data = json.loads((tmp_path / "scores.json").read_text())
    assert data["labels"] == {"quantized": "fp4"}
    assert list(data["tasks"]["text"]["columns"]) == ["quantized"]
    assert data["tasks"]["text"]["comparisons"] == []


def test_exact_answers_are_those_that_the_model_writes(folder, tmp_path):
    opened = open_pretrained(model=str(folder / "model"))
    parts = partition(load_base(opened, weight_settings(opened, "none", "float32")))
    rows = []
    for number, word in enumerate(["sun", "moon", "rain"]):
        ids = answers_prompt(opened.tokenizer, word)
        (reply,) = generate(parts, [ids], sampling=Sampling(), max_new_tokens=5, stop_ids=[])
        text = opened.tokenizer.decode(reply.ids).strip() or "nothing"
        rows.append({"question": word, "answer": text if number else "something else"})
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", str(folder / "model"), "--answers", str(tmp_path / "answers.jsonl"), "--max_new_tokens", "5"]
    evaluate.main([*words, "--columns", "[unquantized]", "--json", str(tmp_path / "scores.json")])
    found = json.loads((tmp_path / "scores.json").read_text())["tasks"]["answers"]["columns"]["unquantized"]
    assert found["exactly the answer"]["value"] == pytest.approx(2 / 3)
    assert found["exactly the answer"]["interval"] == pytest.approx(wilson_interval(2, 3))


def answers_prompt(tokenizer, word: str) -> list[int]:
    text = tokenizer.render([{"role": "user", "content": word}], add_generation_prompt=True)
    return tokenizer.encode(text)


def test_two_runs_are_compared_question_by_question(folder, tmp_path):
    words = [f"--{task}={folder / name}" for task, name in [("rows", "rows.jsonl"), ("choices", "questions.jsonl")]]
    words += ["--run", str(folder / "run"), "--against", str(folder / "run"), "--against_step", "3"]
    evaluate.main([*words, "--columns", "[checkpoint, against]", "--json", str(tmp_path / "scores.json")])
    data = json.loads((tmp_path / "scores.json").read_text())
    assert [label.rpartition("/")[2] for label in data["labels"].values()] == ["run, step 7", "run, step 3"]
    (_, choices, rows), (_, other_choices, other_rows) = (direct(folder, "checkpoint", step) for step in (7, 3))
    loss, *_ = data["tasks"]["rows"]["comparisons"]
    assert (loss["from"], loss["to"], loss["measure"]) == ("checkpoint", "against", "loss per token")
    assert loss["difference"] == pytest.approx(other_rows.mean_nll - rows.mean_nll)
    assert loss["interval"] == pytest.approx(paired_bootstrap(rows.nll, other_rows.nll, rows.tokens))
    right, _ = data["tasks"]["choices"]["comparisons"]
    assert right["difference"] == pytest.approx(other_choices.by_sum.mean() - choices.by_sum.mean())
    assert right["p"] == pytest.approx(mcnemar(choices.by_sum, other_choices.by_sum))


def test_a_run_on_another_base_stands_beside_it(folder, tmp_path, capsys):
    write_run(tmp_path, seed=1)
    words = ["--run", str(folder / "run"), "--text", str(folder / "text.txt"), "--window", "64"]
    evaluate.main([*words, "--against", str(tmp_path / "run"), "--json", str(tmp_path / "both.json")])
    evaluate.main(["--run", str(tmp_path / "run"), *words[2:], "--json", str(tmp_path / "alone.json")])
    both, alone = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("both", "alone"))
    assert list(both["labels"]) == ["unquantized", "quantized", "checkpoint", "against"]
    assert both["labels"]["checkpoint"] == f"{folder}/run, step 7"
    assert both["labels"]["against"] == f"{tmp_path}/run, step 7, on model"
    columns = both["tasks"]["text"]["columns"]
    assert columns["against"] == alone["tasks"]["text"]["columns"]["checkpoint"] != columns["checkpoint"]


def another_reader(folder, path, what):
    """Copies the run's folder, on a base with another chat template, eos token, or vocabulary."""
    shutil.copytree(folder, path)
    config = path / "run/config.yaml"
    config.write_text(config.read_text().replace(str(folder), str(path)))
    name = "tokenizer.json" if what == "vocabulary" else "tokenizer_config.json"
    file = path / "model" / name
    read = json.loads(file.read_text())
    if what == "vocabulary":
        ids = read["model"]["vocab"]
        ids["a"], ids["n"] = ids["n"], ids["a"]
    elif what == "template":
        read["chat_template"] = read["chat_template"].replace("':'", "': '")
    else:
        read["eos_token"] = "<s>"
    file.write_text(json.dumps(read))
    return path / "run"


@pytest.mark.parametrize(
    ("what", "task", "message"),
    [
        (
            "vocabulary",
            "text",
            r"text: different tokens or stop tokens in 5 of 5; the first is number 1\nTheir tokenizers",
        ),
        ("vocabulary", "letters", "letters: different tokens or stop tokens in 12 of 12"),
        ("vocabulary", "harness", "harness: different tokenizers or maximum lengths"),
        (
            "template",
            "choices",
            r"choices: different tokens or stop tokens in 12 of 12(?s:.*)chat templates.*--chat_template",
        ),
        ("template", "rows", "rows: different .* in 4 of 4"),
        ("template", "answers", "answers: different .* in 4 of 4"),
        ("end", "answers", r"answers: different .* in 4 of 4(?s:.*)or stop tokens differ"),
    ],
)
def test_runs_with_different_questions_are_not_compared(folder, tmp_path, what, task, message):
    files = {"text": "text.txt", "choices": "questions.jsonl", "letters": "questions.jsonl"}
    value = "[a_task]" if task == "harness" else str(folder / files.get(task, f"{task}.jsonl"))
    given = [f"--{task}", value, "--window", "64", "--max_new_tokens", "9"]
    other = another_reader(folder, tmp_path / "other", what)
    with pytest.raises(ValueError, match=message) as error:
        evaluate.main(["--run", str(folder / "run"), "--against", str(other), *given])
    assert str(error.value).startswith(f"run {folder}/run and against {other}: not comparable")


def test_one_template_for_both_makes_runs_comparable(folder, tmp_path):
    other = another_reader(folder, tmp_path / "other", "template")
    words = ["--run", str(folder / "run"), "--against", str(other), "--rows", str(folder / "rows.jsonl")]
    template = tmp_path / "one.jinja"
    template.write_text(TEMPLATE)
    words += ["--chat_template", str(template), "--columns", "[checkpoint, against]"]
    evaluate.main([*words, "--json", str(tmp_path / "scores.json")])
    data = json.loads((tmp_path / "scores.json").read_text())["tasks"]["rows"]
    assert data["columns"]["checkpoint"] == data["columns"]["against"]
    assert {change.get("p", 1) for change in data["comparisons"]} == {1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--model MODEL",
            "text, choices, letters, labels, answers, programs, rows, pairs, embeddings, harness: found none",
        ),
        (
            "--model MODEL --text TEXT --window 9 --stride 10",
            r"stride: larger than window.* \(found 10, expected at most 9\)",
        ),
        ("--model MODEL --text TEXT --shots TEXT", "shots: requires letters; set it too"),
        ("--model MODEL --text TEXT --answer_pattern x", "answer_pattern: requires answers; set it too"),
        (
            "--model MODEL --answers TEXT --answer_pattern (",
            r"answer_pattern: not a regular expression: missing \).*\(found '\('\)",
        ),
        ("--model MODEL --text TEXT --columns [checkpoint]", "columns: checkpoint requires run"),
        ("--model MODEL --text TEXT --columns [against]", "columns: against requires another run"),
        ("--model MODEL --against MODEL --text TEXT", "against: requires run"),
        ("--run RUN --against RUN --text TEXT", "against: the same run and checkpoint as run .*Set another run"),
        ("--run RUN --against_step 3 --text TEXT", "against_step: requires against"),
        (
            "--model MODEL --text TEXT --file_columns {'answer':'a'}",
            "file_columns: requires one of choices, letters, labels, answers, programs",
        ),
        ("--model MODEL --answers TEXT --file_columns {'a':'answer'}", "found 'a', expected any of question, answer"),
        ("--model MODEL --rows TEXT --file_columns {'answer':'a'}", "found 'answer', expected any of .*completion"),
        (
            "--model MODEL --text TEXT --columns [nf4]",
            "columns: unknown column .found 'nf4', expected .*Did you mean quantized",
        ),
        ("--model MODEL --text TEXT --columns [chekpoint]", "found 'chekpoint', .*Did you mean checkpoint"),
        ("--model MODEL --text TEXT --columns [quantized] --quant_type none", "quantized requires a quant_type"),
        ("--model MODEL --text TEXT --json nowhere/x", "json: folder 'nowhere' does not exist"),
        ("--model MODEL --text nowhere --window 9", "nowhere: no such file"),
        ("--model MODEL --text TEXT", r"window: too long \(found 512; the model has 256"),
        ("--model MODEL --rows TEXT", "text.txt: not a file of rows .found text that begins with 'w'"),
    ],
)
def test_bad_settings(folder, words, message):
    places = {"MODEL": folder / "model", "RUN": folder / "run", "TEXT": folder / "text.txt"}
    with pytest.raises(ValueError, match=message):
        evaluate.main([str(places.get(word, word)) for word in words.split()])
