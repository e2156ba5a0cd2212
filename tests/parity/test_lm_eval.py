"""lm-evaluation-harness through our models, against its own Hugging Face backend on the same tiny model and tasks."""

import json
from pathlib import Path

import numpy as np
import pytest

import qlora_jax as q
from qlora_jax import evaluate
from tests.e2e.project import write_model
from tests.inference.small_run import write_run

ORACLE = Path(__file__).parent.parent / "oracle/lm_eval_harness.py"
WORDS = ["sun", "moon", "star", "tree", "river", "stone", "cloud", "light", "water", "fire", "earth", "wind"]
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "tiny_words": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{options[0]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "tiny_reply": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{options[1]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}, {metric: chrf}]
""",
}


def write_tasks(folder: Path) -> Path:
    """Task files over one file of rows; texts are longer than the model reads."""
    rng = np.random.default_rng(0)

    def some(count: int) -> str:
        return " ".join(rng.choice(WORDS, count))

    rows = [
        {
            "question": some(3 + n % 30) if n else some(70),
            "options": [some(1 + n % 2), some(2), some(1)],
            "answer": n % 3,
            "text": some(4 + 7 * n),
        }
        for n in range(12)
    ]
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        data = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{data}test_split: test\n{text}")
    return folder


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no cache of others."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'qlora-jax[lm-eval]'")
    for name, value in (("HF_DATASETS_CACHE", str(tmp_path / "cache")), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the harness and its libraries warn
def test_every_kind_of_request_gives_what_the_hugging_face_backend_gives(tmp_path, oracle):
    model, tasks = write_model(tmp_path / "model"), write_tasks(tmp_path / "tasks")
    words = ["--model", str(model), "--harness", json.dumps([*TASKS]), "--harness_folder", str(tasks)]
    evaluate.main([*words, "--json", str(tmp_path / "scores.json")])
    data = json.loads((tmp_path / "scores.json").read_text())["tasks"]["harness"]
    told = data["columns"]["unquantized"]
    expected = json.loads(str(oracle(ORACLE, folder=str(model), tasks=[*TASKS], task_folder=str(tasks))["results"]))
    for task, metrics in expected.items():
        for key, value in metrics.items():
            metric, _, kept = key.partition(",")
            if kept and not metric.endswith("_stderr"):
                assert told[f"{task}: {metric}"]["value"] == pytest.approx(value, rel=1e-3), (task, metric)
    tested = {change["measure"]: "".join({"p", "interval"} & change.keys()) for change in data["comparisons"]}
    by_p = [f"tiny_choice: {metric}" for metric in ("acc", "acc_norm")] + ["tiny_words: acc", "tiny_reply: exact_match"]
    how = dict.fromkeys(told, "interval") | dict.fromkeys(by_p, "p")
    assert tested == how | {"tiny_reply: chrf": ""}  # computed over all replies together
    assert len(told) == 8 and 0 < told["tiny_choice: acc"]["value"] < 1
    assert told["tiny_reply: chrf"]["value"] > 0.1  # on a scale to 100: the replies have letters of the words


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_what_is_not_there_is_told(tmp_path):
    model = write_model(tmp_path / "model")
    with pytest.raises(ValueError, match=r"unknown task .found nothing_like_it"):
        evaluate.main(["--model", str(model), "--harness", "[nothing_like_it]", "--columns", "[unquantized]"])


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_harness_on_a_server_gives_the_numbers_of_the_adapter(tmp_path, oracle):
    run, tasks = write_run(tmp_path), write_tasks(tmp_path / "tasks")
    names = ["tiny_choice", "tiny_words", "tiny_reply"]
    words = ["--run", str(run), "--columns", "[checkpoint]", "--harness", json.dumps(names)]
    evaluate.main([*words, "--harness_folder", str(tasks), "--json", str(tmp_path / "scores.json")])
    (told,) = json.loads((tmp_path / "scores.json").read_text())["tasks"]["harness"]["columns"].values()
    settings = {"port": 0, "cache": "16MiB", "background": True, "compute_dtype": "float32"}
    with q.serve_models(str(tmp_path / "model"), runs=[str(run)], **settings) as server:
        given = {"url": f"{server.url}/v1/completions", "model": "run", "folder": str(tmp_path / "model")}
        found = oracle(ORACLE, **given, positions=256, tasks=names, task_folder=str(tasks))
    for task, metrics in json.loads(str(found["results"])).items():
        for key, value in metrics.items():
            metric, _, kept = key.partition(",")
            if kept and not metric.endswith("_stderr"):
                assert told[f"{task}: {metric}"]["value"] == pytest.approx(value, rel=1e-3), (task, metric)
