"""A run whose base is a name on the Hub: it stays with the commit that it began with, and its adapter names it."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_jax import evaluate, export, generate, plan, predict, quantize, train
from qlora_jax.config import read_config, write_config
from qlora_jax.io.peft.reader import base_model_of
from qlora_jax.training.run_spec import open_inputs
from tests.e2e.project import project, write_model
from tests.io.hub_server import Hub, running

REPO = "org/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.mark.parametrize(
    ("data", "questions", "message"),
    [
        (dict(train="{folder}/none.jsonl"), {}, "none.jsonl: no such file"),
        (dict(eval="{folder}/none.jsonl", eval_fraction=0.0), {}, "none.jsonl: no such file"),
        (dict(train="{folder}/odd.jsonl"), {}, "the rows have no known format. Columns found: 'a'"),
        (dict(columns={"prompt": "ask"}), {}, r"40 of 40 rows can't be used:\n.*: data.columns: no column 'ask'"),
        (dict(train="{folder}/empty.jsonl"), {}, "found no rows"),
        ({}, dict(answers="{folder}/none.jsonl"), "none.jsonl: no such file"),
    ],
)
def test_data_is_checked_before_weights_are_fetched(
    hub: Hub, tmp_path: Path, data: dict[str, Any], questions: dict[str, Any], message: str
) -> None:
    (tmp_path / "odd.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "empty.jsonl").write_text("")
    sections: list[dict[str, Any]] = [data, questions]
    placed = [
        {name: value.format(folder=tmp_path) if isinstance(value, str) else value for name, value in section.items()}
        for section in sections
    ]
    config = project(tmp_path, data=placed[0], questions=placed[1])
    hub.push_folder(REPO, Path(config.model.path))
    on_hub = dataclasses.replace(config, model=dataclasses.replace(config.model, path=REPO))
    with pytest.raises(ValueError, match=message):
        open_inputs(on_hub)
    assert hub.fetched == ["config.json"]
    (Path(config.model.path) / "config.json").write_text('{"model_type": "bert"}')
    hub.push_folder(REPO, Path(config.model.path))
    with pytest.raises(ValueError, match="model_type='bert' is not supported"):
        open_inputs(on_hub)


def test_missing_files_are_errors_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.push_folder(REPO, write_model(tmp_path / "tiny"))
    missing, output = str(tmp_path / "none.jsonl"), str(tmp_path / "nf4")
    for command, arguments in (
        (evaluate, ["--rows", missing]),
        (generate, ["--prompts", missing]),
        (quantize, ["--measure", missing, "--output", output]),
    ):
        with pytest.raises(ValueError, match="no such file"):
            command.main(["--model", REPO, *arguments])
    with pytest.raises(ValueError, match="no such file"):
        predict.main(["--run", str(tmp_path / "run"), "--model", REPO, "--rows", missing])
    (tmp_path / "nf4").mkdir()
    (tmp_path / "nf4/kept.txt").write_text("kept")
    with pytest.raises(ValueError, match="exists"):
        quantize.main(["--model", REPO, "--output", output])
    assert hub.fetched == []


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's own
def test_a_pushed_export_has_a_card_without_rows_or_paths(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each format's files, and a card with the numbers of report.json and metrics.jsonl; the token is in no file."""
    config = project(tmp_path, train=dict(steps=2), lora=dict(dropout=0.0))
    (Path(config.model.path) / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    write_config(config, tmp_path / "c.yaml")
    train.main(["--config", str(tmp_path / "c.yaml")])
    monkeypatch.setenv("HF_TOKEN", "hf_written_nowhere")
    for form in ("peft", "hf"):
        export.main(["--run", config.output, "--format", form, "--push", f"me/{form}"])
        files = hub.repos[f"me/{form}"][hub.commit(f"me/{form}", "main") or ""]
        output = Path(config.output) / form
        on_disk = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
        assert {name: body for name, body in files.items() if name != ".gitattributes"} == {
            name: body for name, body in on_disk.items() if not name.startswith(".cache")
        }
        card = files["README.md"].decode()
        report = json.loads((Path(config.output) / "report.json").read_text())["data"]["train"]
        last = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()][-1]
        assert "license: apache-2.0" in card and f"tokens {report['tokens']:,}" in card
        interval = f"{last['eval_loss']:.4g} [{last['eval_loss_low']:.4g}, {last['eval_loss_high']:.4g}]"
        assert interval in card and "- train.steps: 2" in card
        assert str(tmp_path) not in card and "say sun" not in card
        assert not any(b"hf_written_nowhere" in body for body in files.values())
    shown = capsys.readouterr().out
    assert f"pushing; if it is interrupted, hf upload me/hf {config.output}/hf . --private continues\n" in shown
    assert f"pushed: {hub.url}/me/hf" in shown
    with pytest.raises(ValueError, match=r"push: me/hf exists \(found README.md.*Choose another name"):
        export.main(["--run", config.output, "--format", "gguf", "--push", "me/hf"])
    assert not (Path(config.output) / "gguf").exists()
