"""A run on a mesh: its questions and samples, and the commands that open it, in a process with one device."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from qlora_jax.config import MeshArgs
from qlora_jax.measures.metrics import Metric
from qlora_jax.training.metrics.step_metrics import flatten_metrics
from tests.e2e.test_questions import asking, evaluations
from tests.e2e.test_samples import PROMPTS, samples
from tests.e2e.tiny_runs import run

# The arguments of each command, in one process: most of the time is its start.
COMMANDS = """
import json, sys
import jax
from qlora_jax import evaluate, export, generate
assert len(jax.devices()) == 1
for command, words in json.loads(sys.argv[1]):
    {"evaluate": evaluate, "export": export, "generate": generate}[command].main(words)
"""


@pytest.mark.exhaustive
@pytest.mark.slow
def test_it_is_evaluated_generated_from_and_exported_on_one_device(tmp_path):
    prompts, replies, scores = (tmp_path / name for name in ("prompts.txt", "replies.jsonl", "scores.json"))
    prompts.write_text("\n".join(PROMPTS))
    train = dict(steps=1, eval_every=1, micro_batch_size=4, samples=str(prompts), sample_tokens=8)
    config = asking(tmp_path, lora=dict(rank=16), data=dict(eval_fraction=0.0), train=train)
    questions = dataclasses.replace(config.questions, choices=None, answers=None)
    config = dataclasses.replace(config, mesh=MeshArgs(data=2, fsdp=2), questions=questions)
    assert run(config)
    of_run, output = ["--run", config.output], "--output"
    asked = ["--letters", str(questions.letters), "--columns", "[checkpoint]", "--json", str(scores)]
    on_one_device(
        ("evaluate", [*of_run, *asked]),
        ("generate", [*of_run, "--prompts", str(prompts), "--max_new_tokens", "8", output, str(replies)]),
        ("export", [*of_run, "--format", "peft", output, str(tmp_path / "adapter")]),
    )
    last, tasks = evaluations(config)[-1], json.loads(scores.read_text())["tasks"]
    figures = tasks["letters"]["columns"]["checkpoint"].items()
    found = [Metric(name, "number", one["value"], one.get("interval")) for name, one in figures]
    assert last == {"step": 1} | flatten_metrics("letters", found)
    told = [record["reply"] for record in samples(config) if record["step"] == 1]
    assert [json.loads(line)["reply"] for line in replies.read_text().splitlines()] == told
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def on_one_device(*commands: tuple[str, list[str]]) -> None:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    script = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    subprocess.run(script, env=environment, check=True, capture_output=True, text=True)
