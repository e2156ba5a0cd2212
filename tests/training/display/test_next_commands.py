"""The commands after a run are quoted for a shell, and none is refused for the run."""

import dataclasses
import shlex

import pytest

from qlora_jax.config import Config, DataArgs, HeadArgs, LoraArgs, ModelArgs
from qlora_jax.training.display.banner import next_commands

CONFIG = Config(model=ModelArgs(path="m"), data=DataArgs(train="t"), output="it's my runs/1")
BASE = {"model_type": "llama"}


def test_what_to_type_next_passes_a_shell_whatever_the_folder_is_called():
    finished = {name: shlex.split(command)[2:] for name, command in next_commands(CONFIG, BASE, finished=True).items()}
    assert finished["try it"] == ["--run", CONFIG.output]
    assert finished["export"] == ["--run", CONFIG.output, "--format", "peft"]
    for method, form in {"bitfit": "hf", "houlsby": None}.items():
        commands = next_commands(dataclasses.replace(CONFIG, lora=LoraArgs(method=method)), BASE, finished=True)
        assert ("export" in commands) == (form is not None) and (form is None or form in commands["export"])
    go_on = next_commands(CONFIG, BASE, finished=False)["resume"]
    assert shlex.split(go_on)[2:] == ["--config", CONFIG.output + "/config.yaml", "--resume"]


@pytest.mark.parametrize(
    ("path", "quant_type", "lora", "model", "export"),
    [
        ("m.gguf", "stored", dict(), dict(), ["gguf-lora"]),
        ("m.gguf", "stored", dict(merge_into="q4_0"), dict(), ["gguf"]),
        ("m", "none", dict(merge_into="nf4"), dict(), ["hf"]),
        ("m.gguf", "stored", dict(method="lora_fa"), dict(), ["gguf-lora"]),
        ("m.gguf", "nf4", dict(), dict(), ["peft", "--with_base"]),
        ("m.gguf", "stored", dict(method="dora"), dict(), ["peft", "--with_base"]),
        ("m.gguf", "stored", dict(modules_to_save=["lm_head"]), dict(), ["peft", "--with_base"]),
        ("m.gguf", "stored", dict(), dict(new_tokens=["<t>"]), ["peft", "--with_base"]),
        ("gptq", "stored", dict(), dict(), ["peft"]),  # without --with_base, gguf-lora is refused
    ],
)
def test_a_run_on_the_codes_of_a_gguf_file_is_exported_for_that_file(path, quant_type, lora, model, export):
    settings = ModelArgs(path=path, quant_type=quant_type, **model)
    config = dataclasses.replace(CONFIG, model=settings, lora=LoraArgs(**lora))
    command = shlex.split(next_commands(config, BASE, finished=True)["export"])
    assert command[command.index("--format") + 1 :] == export


@pytest.mark.parametrize(
    ("objective", "pooling", "task", "base", "form"),
    [
        ("multi_label", "last", "labels", "llama", "peft"),
        ("multi_label", "last", "labels", "granite", None),
        ("regression", "mean", "labels", "llama", None),
        ("reward", "last", "pairs", "llama", "peft"),
        ("embedding", "mean", "embeddings", "granite", "peft"),
    ],
)
def test_runs_with_a_head_are_evaluated_by_it(objective, pooling, task, base, form):
    config = dataclasses.replace(CONFIG, objective=objective, head=HeadArgs(pooling=pooling))
    found = {
        name: shlex.split(command)[1:]
        for name, command in next_commands(config, {"model_type": base}, finished=True).items()
    }
    assert found["evaluate"] == ["evaluate", "--run", CONFIG.output, f"--{task}", "FILE"]
    assert found["predict"] == ["predict", "--run", CONFIG.output, "--rows", "FILE"]
    assert "try it" not in found and found.get("export", [None])[-1] == form
