"""Dotted overrides, help, and errors without a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax import train
from qlora_jax.config import ConfigError, parse, read_command_line, run_main
from qlora_jax.config.parse import walk
from qlora_jax.config.schema import Config

ROOT = Path(__file__).resolve().parent.parent.parent
NEEDED = ["--model.path", "m", "--data.train", "t", "--output", "o"]


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\nlora: {rank: 4, alpha: 8.0}\ndata: {train: t}\noutput: o\n")
    config = parse(["--config", str(path), "--lora.rank", "32"], "train")
    assert (config.lora.rank, config.lora.alpha) == (32, 8.0)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--optim.learning_rate", "1e-3"], "optim.learning_rate", 1e-3),
        (["--optim.learning_rate=1"], "optim.learning_rate", 1.0),
        (["--model.double_quant", "false"], "model.double_quant", False),
        (["--lora.target_modules", "[q_proj, v_proj]"], "lora.target_modules", ["q_proj", "v_proj"]),
        (["--data.format", "guanaco"], "data.format", "guanaco"),
        (["--lora.target_modules", r"[qv]_proj|.*\.mlp\..*"], "lora.target_modules", r"[qv]_proj|.*\.mlp\..*"),
        (["--lora.rank_pattern", "{q_proj: 8}"], "lora.rank_pattern", {"q_proj": 8}),
        (["--train.steps", "null"], "train.steps", None),
        (["--data.eval", "null"], "data.eval", None),
        (["--data.eval", "12"], "data.eval", "12"),
        (["--data.chat_template=-.jinja"], "data.chat_template", "-.jinja"),
    ],
)
def test_values(words, key, value):
    section, name = key.split(".")
    assert getattr(getattr(parse([*NEEDED, *words], "train"), section), name) == value


def test_files_with_weights():
    given = ["--model.path", "m", "--output", "o", "--data.train", "{a.jsonl: 1, b.jsonl: 0.5}"]
    data = parse([*given, "--data.format", "{b.jsonl: guanaco}"], "train").data
    assert (data.train, data.format) == ({"a.jsonl": 1.0, "b.jsonl": 0.5}, {"b.jsonl": "guanaco"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora.rnk", "8"], "lora.rnk: unknown key; did you mean lora.rank? (command line)"),
        (["--rank", "8"], "rank: unknown key; did you mean lora.rank?"),
        (["--lr", "8"], "lr: unknown key; did you mean optim.learning_rate?"),
        (["--frobnicate", "8"], "frobnicate: unknown key; --help lists all keys"),
        (["--lora.bias", "none"], "lora.bias: unknown key; --help lists all keys"),  # lora.rank shares only its section
        (["--model.load_in_4bit", "true"], "model.load_in_4bit: unknown key; did you mean model.quant_type?"),
        (["--data.traim", "t"], "data.traim: unknown key; did you mean data.train?"),
        (["--optim.schedule", "cosin"], "did you mean cosine?"),
        (["--data.format", "ShareGPT"], "did you mean sharegpt?"),
        (["--lora.rank", "8.5"], "lora.rank: found 8.5, expected a whole number"),
        (["--lora.rank"], "--lora.rank: lacks a value"),
        (["--lora.rank", "--lora.alpha", "3"], "--lora.rank: lacks a value"),
        (["--lora.rank", "8", "--lora.rank", "9"], "--lora.rank: given twice"),
        (["run"], "run: stands alone"),
        (["--lora", "3"], "lora: found '3', expected a section"),
        (["--lora.rank.x", "3"], "expected a whole number; it is one value, with no settings below it"),
        (["--lora.modules_to_save", "lm_head"], "; did you mean [lm_head]?"),
        (["--train.track", "wandb"], "expected a list of one of tensorboard, wandb; did you mean [wandb]?"),
    ],
)
def test_errors(words, message):
    with pytest.raises(ConfigError) as error:
        parse([*NEEDED, *words], "train")
    assert message in str(error.value)


def test_switches():
    assert read_command_line([*NEEDED, "--resume"], "train", {"resume": "go on"})[1] == {"resume"}
    assert read_command_line(NEEDED, "train", {"resume": "go on"})[1] == set()
    with pytest.raises(ConfigError, match="resume"):
        parse([*NEEDED, "--resume"], "train")


@pytest.mark.parametrize("output", [["--output", "my run"], ["--output=my run"]])
def test_a_run_that_goes_on_without_settings_is_told_the_command(output):
    with pytest.raises(ValueError, match="settings are not given") as error:
        train.main([*output, "--resume"])
    assert str(error.value).endswith("\n  python -m qlora_jax.train --config 'my run/config.yaml' --resume")
    with pytest.raises(ValueError, match=r"data\.train: missing"):
        train.main([*output, "--model.path", "m", "--resume"])


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as leave:
        read_command_line(["--help"], "python -m x", {"resume": "go on from the last checkpoint"})
    assert leave.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{key} " in text for key, _, _ in walk(Config))
    assert "go on from the last checkpoint" in text
    assert max(map(len, text.splitlines())) <= 120


def fail_with(error: BaseException):
    def main(argv: list[str]) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("rank is 0"), "error: rank is 0\n"),
        (FileNotFoundError(2, "No such file or directory", "a.gguf"), "error: a.gguf: No such file or directory\n"),
    ],
)
def test_user_errors_show_no_traceback(capsys, monkeypatch, error, message):
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as leave:
        run_main(fail_with(error))
    assert leave.value.code == 2
    assert capsys.readouterr().err == message
    monkeypatch.setenv("QLORA_JAX_TRACEBACK", "1")
    with pytest.raises(type(error)):
        run_main(fail_with(error))


def test_a_reader_that_stops_is_no_error():
    code = "from qlora_jax.config import run_main\ndef main(argv):\n    while True: print('a line')\nrun_main(main)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 141


def test_other_errors_are_ours_and_show_one(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(AssertionError):
        run_main(fail_with(AssertionError()))
