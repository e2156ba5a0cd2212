"""A run whose base is a name on the Hub: it stays with the commit that it began with, and its adapter names it."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_jax import evaluate, export, generate, plan, quantize, train
from qlora_jax.config import read_config, write_config
from qlora_jax.io.peft.reader import base_model_of
from tests.e2e.project import project, write_model
from tests.io.hub_server import Hub, running

REPO = "org/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.mark.slow
def test_every_command_takes_a_name(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = project(tmp_path, train=dict(steps=2), lora=dict(dropout=0.0))
    commit = hub.push_folder(REPO, Path(config.model.path))
    pinned, run = f"{REPO}@{commit}", config.output
    write_config(dataclasses.replace(config, model=dataclasses.replace(config.model, path=REPO)), tmp_path / "c.yaml")
    plan.main(["--config", str(tmp_path / "c.yaml"), "--card", "cpu"])
    assert set(hub.fetched) == {"config.json"}
    train.main(["--config", str(tmp_path / "c.yaml")])
    assert read_config(f"{run}/config.yaml").model.path == pinned
    hub.push_folder(REPO, write_model(tmp_path / "other", seed=1))  # a new revision of `org/tiny`

    with pytest.raises(ValueError, match=f"(?s)the base model: fingerprint .*{pinned}.*{REPO}@"):
        train.main(["--config", str(tmp_path / "c.yaml"), "--resume"])
    train.main(["--config", f"{run}/config.yaml", "--train.steps", "2", "--resume"])

    export.main(["--run", run, "--output", str(tmp_path / "peft")])
    saved = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == (REPO, commit)
    assert f"from_pretrained('{REPO}', revision='{commit}')" in (tmp_path / "peft/README.md").read_text()
    assert base_model_of(tmp_path / "peft") == pinned

    capsys.readouterr()
    replies = []
    for of in (["--run", run], ["--run", str(tmp_path / "peft")], ["--run", run, "--model", pinned]):
        generate.main([*of, "--prompt", "say sun", "--max_new_tokens", "8"])
        replies.append(capsys.readouterr().out)
    assert len(set(replies)) == 1 and replies[0].strip()

    export.main(["--run", run, "--format", "hf", "--output", str(tmp_path / "hf"), "--model", pinned])
    assert (tmp_path / "hf/model.safetensors").is_file()
    quantize.main(["--model", pinned, "--output", str(tmp_path / "nf4")])
    assert (tmp_path / "nf4/model.safetensors").is_file()
    (tmp_path / "text.txt").write_text("the sun and the moon " * 20)
    evaluate.main(["--model", pinned, "--text", str(tmp_path / "text.txt"), "--window", "32"])
    assert "quantized" in capsys.readouterr().out
