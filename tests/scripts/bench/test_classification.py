"""The classification benchmark: figures from records, and the job that both libraries get."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.io.open_model import open_model
from qlora_jax.io.peft.head_adapters import MATRIX
from scripts.bench import classification as bench
from scripts.bench.support.classification_job import TASKS, load_base, read_split, with_new_head, write_job
from scripts.bench.support.interleave import WorkerGroup
from scripts.bench.workers.classification import works
from tests.e2e.project import write_model

RIGHT = np.array([0, 1, 1, 0])


def run(*blocks: list[float], scoring: float = 2.0, predicted=(0, 1, 1, 0), loss: float = 1.0):
    turns = [[{"seconds": s, "loss": loss} for s in block] for block in blocks]
    outputs = np.eye(2)[list(predicted)].tolist()
    return turns, {"seconds": scoring, "outputs": outputs, "peak_rss_mib": 100.0}


def test_figures_of_two_seeds():
    runs = {
        "ours": [run([9, 1, 1], [9, 2]), run([9, 1], scoring=1.0, predicted=(0, 1, 0, 0))],
        "eager": [run([9, 2, 2], [9, 4], predicted=(1, 1, 1, 0)), run([9, 4], scoring=3.0)],
        "compiled": [run([9, 9, 9], [9, 9]), run([9, 9])],
    }
    ours = bench.summary(runs["ours"], RIGHT)
    assert (ours["accuracy"], ours["accuracy_by_seed"]) == (7 / 8, [1.0, 0.75])
    assert (ours["steps_s"], ours["scoring_s"], ours["whole_s"]) == (5, 1.0, 35)
    found = bench.verdict(runs, RIGHT)
    assert (found["opponent"], found["speed"], found["scoring"], found["difference"]) == ("eager", 2.0, 3.0, 0.0)
    low, high = found["difference_interval"]
    assert low == -high and high > 0 and found["difference_p"] == 1.0


def test_losses_and_predictions_are_compared_step_by_step():
    ours = [run([1] * bench.EARLY, [1]), run([1] * bench.EARLY, [1])]
    theirs = [run([1] * bench.EARLY, [1]), run([1] * bench.EARLY, [1], predicted=(1, 1, 1, 0))]
    theirs[1][0][0][2]["loss"], theirs[0][0][1][0]["loss"] = 1.25, 0.5
    found = bench.distances(ours, theirs)
    assert (found["losses_apart_early"], found["losses_apart"]) == (0.25, 0.5)
    assert (found["predictions_differ"], found["predictions"]) == (1, 8)


def test_both_compute_in_float32_on_demand(tmp_path):
    commands = bench.commands_of(tmp_path, ["compiled"], float32=True)
    assert commands["ours"][-1] == "float32" and commands["compiled"][-4:] == ["--dtype", "fp32", "--compile", "layers"]
    assert "float32" not in bench.commands_of(tmp_path, [], float32=False)["ours"]


def test_without_an_opponent_there_is_no_speed(capsys):
    runs = {"ours": [run([1, 2])]}
    result = {"players": {"ours": bench.summary(runs["ours"], RIGHT)}, **bench.verdict(runs, RIGHT)}
    result |= {"failures": {"eager": "ended (status 1)"}}
    bench.show("sst2", TASKS["sst2"], result)
    assert result["speed"] is None and "eager: FAILED: ended" in capsys.readouterr().out
    assert bench.disagreement("sst2", result) == ["sst2: eager: ended (status 1)"]  # the script ends with an error


PROGRAM = """
import json, sys
loss = 0.5 if sys.argv[-1] in ("float32", "fp32") else 0.6
for i, _ in enumerate(sys.stdin):
    print(json.dumps({"seconds": i + 1, "loss": loss, "outputs": [[0, 1], [1, 0]]}), flush=True)
"""
FAILS = "import sys\nsys.exit('no such layer')"


def test_workers_take_turns_until_the_last_step_and_then_score():
    with WorkerGroup() as workers:
        for name in ("ours", "eager"):
            workers.open(name, [sys.executable, "-S", "-c", PROGRAM])
        first, second = (bench.train_and_score(workers, 5, 2) for _ in range(2))
    turns, scored = first["eager"]
    assert [[record["seconds"] for record in turn] for turn in turns] == [[1, 2], [3, 4], [5]]
    assert scored["seconds"] == 6 and second["ours"][1]["seconds"] == 12


def test_a_worker_that_fails_leaves_the_figures_of_the_others(monkeypatch, tmp_path):
    programs = {"ours": PROGRAM, "eager": PROGRAM, "compiled": FAILS}

    def commands_of(_, names, float32):
        dtype = "fp32" if float32 else "mixed"
        return {name: [sys.executable, "-S", "-c", programs[name], dtype] for name in ("ours", *names)}

    monkeypatch.setattr(bench, "commands_of", commands_of)
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"runs": [{"seed": seed, "steps": [[], [], []]} for seed in (0, 1)], "right": [1, 1]}))
    found = bench.measure(job, ["eager", "compiled"], 2, 30.0, float32=False)
    assert found["players"].keys() == {"ours", "eager"} and found["players"]["ours"]["accuracy"] == 0.5
    assert (found["opponent"], found["speed"], found["difference"]) == ("eager", 1.0, 0.0)
    assert found["failures"]["compiled"].endswith("no such layer")
    assert found["float32"] == {"ours": 0.5, "eager": 0.5} and found["players"]["ours"]["losses"] == [[0.6] * 3] * 2
    assert bench.disagreement("sst2", found) == []
    found["float32"]["eager"] = 0.503
    assert bench.disagreement("sst2", found) == ["sst2: first loss -0.00300 nats apart in float32"]


def test_a_loss_in_float32_that_cannot_be_computed_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "commands_of", lambda *_, **__: {"ours": ["/nowhere"], "eager": ["/nowhere"]})
    with WorkerGroup() as workers:
        found = {"speed": 1.0, "float32": bench.first_losses_float32(workers, tmp_path), "failures": workers.failures}
    problems = [f"sst2: {name}, float32: /nowhere: No such file or directory" for name in ("ours", "eager")]
    assert bench.disagreement("sst2", found) == problems


def test_files_that_are_absent_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("QLORA_JAX_LOCAL_DATA", str(tmp_path))
    with pytest.raises(OSError, match=r"mrpc_train.txt.gz: not found. Set QLORA_JAX_LOCAL_DATA"):
        read_split(TASKS["mrpc"].train, TASKS["mrpc"].read)


def test_rows_of_both_tasks():
    sst2 = "sentence\tlabel\nit 's \"fine \t1\n"
    assert TASKS["sst2"].read(sst2) == [{"sentence": "it 's \"fine ", "label": "1"}]
    mrpc = 'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tone "\ttwo\n'
    assert TASKS["mrpc"].read(mrpc) == [{"sentence1": 'one "', "sentence2": "two", "label": "0"}]


@pytest.mark.slow
def test_both_get_the_same_texts_labels_and_initial_values(tmp_path):
    model = str(write_model(tmp_path / "model"))
    rows = [{"sentence": f"{n} the {'sun' if n % 2 else 'moon'}", "label": str(n % 2)} for n in range(40)]
    path = write_job(tmp_path, model, rows, rows[:4], max_length=64, seeds=range(2), train_rows=30, steps=3)
    job = json.loads(path.read_text())
    tokenizer = load_tokenizer(open_model(model).tokenizer)
    given = {tuple(tokenizer.encode(row["sentence"])): int(row["label"]) for row in rows}
    texts = [(tuple(ids), label) for one in job["runs"] for step in one["steps"] for ids, label in step]
    assert len(texts) > 12 and all(given[ids] == label for ids, label in texts)
    assert [tuple(ids) for ids in job["held_out"]] == [*given][:4] and job["right"] == [0, 1, 0, 1]
    _, base = load_base(model, "float32")
    score = with_new_head(base, 1).lora["score"]["weight"]
    np.testing.assert_array_equal(load_file(job["runs"][1]["initial"])[MATRIX], np.asarray(score).T)
    records = [*works(job, base)]
    assert [("loss" in record, "outputs" in record) for record in records] == [(True, False)] * 3 + [
        (False, True),
        *[(True, False)] * 3,
        (False, True),
    ]
    assert np.shape(records[3]["outputs"]) == (4, 2) and records[3]["outputs"] != records[7]["outputs"]
