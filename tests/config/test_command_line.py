"""Command lines of all commands: settings, flags, help, and errors without a traceback."""

import contextlib
import importlib
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import flax
import jax
import jaxlib
import optax
import orbax.checkpoint
import pytest

import qlora_jax
from qlora_jax import evaluate, export, plan, quantize, train
from qlora_jax.__main__ import COMMANDS, main, module_of
from qlora_jax.config import Command, ConfigError, read_arguments, run_main
from qlora_jax.config.parse import walk_settings
from qlora_jax.config.schema import Config

ROOT = Path(__file__).resolve().parent.parent.parent
NEEDED = ["--model.path", "m", "--data.train", "t", "--output", "o"]


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\nlora: {rank: 4, alpha: 8.0}\ndata: {train: t}\noutput: o\n")
    config = read_arguments(["--config", str(path), "--lora.rank", "32"])
    assert (config.lora.rank, config.lora.alpha) == (32, 8.0)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--optim.learning_rate", "1e-3"], "optim.learning_rate", 1e-3),
        (["--optim.learning_rate=1"], "optim.learning_rate", 1.0),
        (["--model.double_quant", "false"], "model.double_quant", False),
        (["--lora.target_modules", "[q_proj, v_proj]"], "lora.target_modules", ["q_proj", "v_proj"]),
        (["--data.format", "guanaco"], "data.format", "guanaco"),
        (["--data.columns", "{prompt: question}"], "data.columns", {"prompt": "question"}),
        (["--data.columns", "{t: {prompt: 'a: b'}}"], "data.columns", {"t": {"prompt": "a: b"}}),
        (["--data.bad_rows", "drop"], "data.bad_rows", "drop"),
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
    assert getattr(getattr(read_arguments([*NEEDED, *words]), section), name) == value


def test_files_with_weights():
    given = ["--model.path", "m", "--output", "o", "--data.train", "{a.jsonl: 1, b.jsonl: 0.5}"]
    data = read_arguments([*given, "--data.format", "{b.jsonl: guanaco}"]).data
    assert (data.train, data.format) == ({"a.jsonl": 1.0, "b.jsonl": 0.5}, {"b.jsonl": "guanaco"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora.rnk", "8"], "lora.rnk: unknown setting; did you mean lora.rank? (command line)"),
        (["--rank", "8"], "rank: unknown setting; did you mean lora.rank?"),
        (["--lr", "8"], "lr: unknown setting; did you mean optim.learning_rate?"),
        (["--frobnicate", "8"], "frobnicate: unknown setting; --help all lists all settings"),
        (
            ["--lora.zigzag", "none"],
            "lora.zigzag: unknown setting; --help all lists all settings",
        ),  # lora.rank shares only its section
        (["--model.load_in_4bit", "true"], "model.load_in_4bit: unknown setting; did you mean model.quant_type ("),
        (["--data.traim", "t"], "data.traim: unknown setting; did you mean data.train?"),
        (["--optim.schedule", "cosin"], "did you mean cosine?"),
        (["--data.format", "ShareGPT"], "did you mean sharegpt?"),
        (["--lora.rank", "8.5"], "lora.rank: found 8.5, expected a whole number"),
        (["--data.columns", "{query: prompt}"], "data.columns: unknown column (found 'query', expected any of"),
        (["--data.columns", "{Promt: q}"], "positive, negative); did you mean 'prompt'? Write our name first"),
        (["--data.columns", "{prompt: {a: b}}"], "data.columns: found 'prompt', expected the files of data.train"),
        (["--data.columns", "{t: {query: a}}"], "data.columns: unknown column (found 'query', expected any of"),
        (["--data.columns", "question"], "data.columns: found 'question', expected a mapping of text to text or a"),
        (["--data.columns", "{}"], "data.columns: found {}, expected not empty"),
        (["--data.bad_rows", "skip"], "data.bad_rows: found 'skip', expected one of error, drop"),
        (["--lora.rank"], "--lora.rank: its value is missing"),
        (["--lora.rank", "--lora.alpha", "3"], "--lora.rank: its value is missing"),
        (["--lora.rank", "8", "--lora.rank", "9"], "--lora.rank: given twice"),
        (["--lora.rank", "8", "--lora.rank", "nine"], "problems:\n  --lora.rank: given twice"),
        (["--data.train", "b.jsonl"], "--data.train: given twice; write several with weights: --data.train '{a"),
        (["--data.train=t", "b.jsonl", "c.jsonl"], "c.jsonl: found a second file; write several with weights: --data."),
        (["--train.seed", "1", "run"], "run: found a value without a name; write --name run"),
        (["--lora", "3"], "lora: found '3', expected a section"),
        (["--lora.rank.x", "3"], "expected a whole number; this setting has no settings below it"),
        (["--lora.modules_to_save", "lm_head"], "; did you mean [lm_head]?"),
        (["--train.track", "wandb"], "expected a list of one of tensorboard, wandb; did you mean [wandb]?"),
    ],
)
def test_errors(words, message):
    with pytest.raises(ConfigError) as error:
        read_arguments([*NEEDED, *words])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama", "--output", "o"], "llama: found a value without a name; write --model llama"),
        (["--model", "m", "--quant-type", "nf4"], "--quant-type: names have underscores; write --quant_type"),
        (
            ["--model", "m", "--no-double-quant"],
            "--no-double-quant: names have underscores; write --double_quant false",
        ),
    ],
)
def test_old_forms_print_the_new_form(words, message):
    with pytest.raises(ConfigError) as error:
        quantize.COMMAND.read(words)
    assert message in str(error.value)


def test_a_hyphenated_flag_prints_the_new_form():
    with pytest.raises(ConfigError, match="--with-base: names have underscores; write --with_base"):
        export.COMMAND.read(["--run", "r", "--with-base"])


@pytest.mark.parametrize("command", [train, plan])
def test_model_is_short_for_its_path(command):
    words = ["--model", "m", "--data.train", "t", "--output", "o"]
    settings, _ = command.COMMAND.read([*words, "--model.block_size=32"])
    assert (settings.model.path, settings.model.block_size) == ("m", 32)
    with pytest.raises(ConfigError, match=r"--model\.path: given twice"):
        command.COMMAND.read([*words, "--model.path", "m"])


def test_flags():
    assert train.COMMAND.read([*NEEDED, "--resume"])[1] == {"resume"}
    assert train.COMMAND.read(NEEDED)[1] == set()
    with pytest.raises(ConfigError, match="resume"):
        read_arguments([*NEEDED, "--resume"])


@pytest.mark.parametrize("output", [["--output", "my run"], ["--output=my run"]])
def test_resume_without_settings_prints_the_command(output):
    with pytest.raises(ValueError, match="settings are missing") as error:
        train.main([*output, "--resume"])
    assert str(error.value).endswith("\n  qlora-jax train --config 'my run/config.yaml' --resume")
    with pytest.raises(ValueError, match=r"data\.train: missing"):
        train.main([*output, "--model", "m", "--resume"])


def printed_help(command: Command, words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as leave:
        command.read(words)
    assert leave.value.code == 0
    return capsys.readouterr().out


def test_help_all_lists_every_setting(capsys):
    text = printed_help(train.COMMAND, ["--help", "all"], capsys)
    assert all(f"--{key} " in text for key, _, _ in walk_settings(Config))
    assert all(f"--{flag} " in text for flag in train.COMMAND.flags)
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", COMMANDS)
def test_help_starts_with_usage_and_an_example_that_reads(name, capsys):
    command = module_of(name).COMMAND
    text = printed_help(command, ["--help"], capsys)
    assert text.startswith(f"usage: qlora-jax {name} ") and command.example in text
    command.read(shlex.split(command.example))


@pytest.mark.parametrize(
    ("command", "shown", "left_out"),
    [(train, "lora.rank", "lora.svd_niter"), (plan, "card", "lora.svd_niter"), (evaluate, "rows", "stride")],
)
def test_help_of_many_settings_fits_one_screen(command, shown, left_out, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = printed_help(command.COMMAND, ["--help"], capsys)
    assert len(text.splitlines()) <= 50
    assert text.rstrip().endswith(f"--help all lists all {len([*walk_settings(command.COMMAND.schema)])} settings.")
    assert f"--{shown} " in text and f"--{left_out} " not in text


def test_help_shows_how_the_command_was_called():
    for words, shown in ((["qlora_jax", "plan"], "qlora-jax plan"), (["qlora_jax.plan"], "python -m qlora_jax.plan")):
        command = [sys.executable, "-m", *words, "--help"]
        text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert text.startswith(f"usage: {shown} [") and f"\n  {shown} {plan.COMMAND.example}\n" in text


def test_the_package_lists_its_commands():
    done = subprocess.run([sys.executable, "-m", "qlora_jax"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    words = ["quantize", "--model", "nowhere", "--output", "o"]
    done = subprocess.run([sys.executable, "-m", "qlora_jax", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere: ")
    done = subprocess.run([sys.executable, "-m", "qlora_jax", "trian"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: trian: unknown command")


def test_a_command_that_was_probably_meant_is_suggested(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["qlora-jax", "trian"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith("error: trian: unknown command; did you mean train?\n\nusage: ")


def test_version_is_that_of_the_project_and_its_libraries(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["qlora-jax", "--version"])
    main()
    found = dict(line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found["qlora-jax"] == qlora_jax.__version__ == project["version"]
    libraries = {"jax": jax, "jaxlib": jaxlib, "flax": flax, "optax": optax, "orbax-checkpoint": orbax.checkpoint}
    assert {name: found[name] for name in libraries} == {name: each.__version__ for name, each in libraries.items()}


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


def test_a_value_of_a_file_cannot_fill_the_terminal_with_a_message(capsys):
    key, fix = "tokenizer: eos_token ", ": not in the vocabulary. Correct its files."
    with pytest.raises(SystemExit):
        run_main(fail_with(ValueError(f"{key}{'x' * 10**6}{fix}\nsecond line")), [])
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {key}xxx") and printed.endswith(f"xxx{fix}\nsecond line\n")
    assert len(printed) < 4000 and "(997,064 characters left out)" in printed


def test_a_closed_pipe_is_not_an_error():
    code = "from qlora_jax.config import run_main\ndef main(argv):\n    while True: print('a line')\nrun_main(main)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 141


@pytest.mark.parametrize(
    ("number", "message"), [("SIGINT", "stopped by Ctrl-C\n"), ("SIGTERM", "stopped by SIGTERM\n")]
)
def test_a_signal_ends_a_command_with_its_status_and_one_message_after_it_has_cleaned_up(number, message):
    code = (
        "import time\nfrom qlora_jax.config import run_main\ndef main(argv):\n"
        "    try:\n        print('ready', flush=True)\n        time.sleep(60)\n"
        "    finally: print('cleaned up')\nrun_main(main)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "ready\n"
        run.send_signal(signal.Signals[number])
        assert run.communicate(timeout=50) == ("cleaned up\n", message)
    assert run.returncode == 128 + signal.Signals[number]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_an_import_ends_the_command_after_it(number, tmp_path, monkeypatch):
    """NumPy's import_array() prints an exception and raises ImportError instead, or ends the process."""
    name = f"loses_{number.name.lower()}"
    text = f"import os\ntry:\n    os.kill(os.getpid(), {number.value})\nexcept BaseException:\n    raise ImportError\n"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    def main(argv):
        importlib.import_module(name)
        time.sleep(60)

    with pytest.raises(SystemExit) as ended:
        run_main(main, [])
    assert ended.value.code == 128 + number


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_sigterm_has_its_action_again_after_a_command_and_stays_ignored(before, capsys):
    original = signal.signal(signal.SIGTERM, before)
    found = []

    def main(argv):
        found.append(signal.getsignal(signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)
        found.append(signal.getsignal(signal.SIGTERM))

    try:
        with pytest.raises(SystemExit) if before == signal.SIG_DFL else contextlib.nullcontext():
            run_main(main, [])
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGTERM, original)
    assert found[1:] == ([] if before == signal.SIG_DFL else [signal.SIG_IGN])
    assert capsys.readouterr().err == ("stopped by SIGTERM\n" if before == signal.SIG_DFL else "")


@pytest.mark.parametrize("statement", ["print('a line')", "print('a line', flush=True)"])
def test_a_full_disk_behind_standard_output_is_an_error(statement):
    """/dev/full is a device to which no byte can be written."""
    code = f"from qlora_jax.config import run_main\ndef main(argv):\n    {statement}\nrun_main(main, [])"
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: standard output: cannot be written: No space left on device. Free space")
    assert run.stderr.count("\n") == 1


def test_other_errors_show_a_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(AssertionError):
        run_main(fail_with(AssertionError()))
