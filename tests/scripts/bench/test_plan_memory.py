"""A memory plan on a CPU compared with a measured process, both in new processes with cached programs."""

import json
import os
import subprocess
import sys

import pytest

from scripts.bench.support.random_model import make_random_model
from tests.conftest import ROOT


def last_line(*command: str) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    return done.stdout


def planned(model: str) -> int:
    settings = ("--data.max_length", "512", "--lora.rank", "16", "--train.accumulation", "1", "--json")
    text = last_line("-m", "qlora_jax.plan", "--model.path", model, "--card", "cpu", *settings)
    return json.loads(text)["asked"]["total"]


def grown(model: str) -> int:
    return json.loads(last_line("-m", "scripts.bench.plan_memory", "--model", model).splitlines()[-1])["growth"]


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2-0.5b"])
def test_a_plan_is_within_a_tenth_of_what_a_process_takes(name, request):
    path = request.getfixturevalue("smollm2_gguf") if name == "smollm2-135m" else make_random_model(name)
    model = str(path)
    plan = planned(model)
    grown(model)  # with a cold cache the compiler's memory counts too
    assert grown(model) == pytest.approx(plan, rel=0.1)
