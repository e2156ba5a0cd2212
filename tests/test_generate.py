"""`qlora-jax generate`: output, files and errors."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.native.library import problem
from qlora_jax import evaluate, export, generate
from qlora_jax.config import ConfigError
from qlora_jax.inference import decode
from qlora_jax.inference.prompts import stop_ids
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.io.pretrained import apply_adapter, load_base, open_pretrained
from qlora_jax.io.run_folder.run_lock import lock_run
from qlora_jax.models.partition import partition
from tests.inference.small_run import STEPS, write_run

ROOT = Path(__file__).resolve().parents[1]
DRAWN = ("--temperature", "1.5", "--seed", "5", "--max_new_tokens", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    write_run(folder)
    return folder


def direct(folder: Path, prompt: str, step: int | None, **sampling) -> str:
    """The reply without the command, of the checkpoint at `step`, or of the base if `step` is None."""
    opened = open_pretrained(run=str(folder / "run"), step=step)
    model = load_base(opened, opened.args)
    parts = partition(model) if step is None else apply_adapter(model, opened.run)
    ids = opened.tokenizer.encode(opened.tokenizer.render([{"role": "user", "content": prompt}], True))
    stops = stop_ids(opened.tokenizer, [], chat=True)
    settings = dict(sampling=Sampling(**sampling), max_new_tokens=8, stop_ids=stops)
    return opened.tokenizer.decode(decode.generate(parts, [ids], **settings)[0].ids)


def test_a_prompt_is_answered_on_standard_output(folder, capsys):
    settings = dict(temperature=1.5, seed=5)
    base, newest, earlier = (direct(folder, "hello", step, **settings) for step in (None, STEPS[-1], STEPS[0]))
    assert len({base, newest, earlier}) == 3
    run, model = ["--run", str(folder / "run")], ["--model", str(folder / "model"), "--compute_dtype", "float32"]
    for words, expected in [(model, base), (run, newest), ([*run, "--step", "3"], earlier), ([*model, *run], newest)]:
        generate.main([*words, "--prompt", "hello", *DRAWN])
        printed = capsys.readouterr()
        assert printed.out == expected + "\n"
        assert "stopped at --max_new_tokens" in printed.err


@pytest.mark.slow
def test_a_run_that_trains_can_be_used(folder, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"text": "hello sun"}\n')
    run, expected = ["--run", str(folder / "run")], direct(folder, "hello", STEPS[-1], temperature=1.5, seed=5)
    with lock_run(folder / "run", pytest.fail):  # as training does
        generate.main([*run, "--prompt", "hello", *DRAWN])
        assert capsys.readouterr().out == expected + "\n"
        evaluate.main([*run, "--rows", str(tmp_path / "rows.jsonl")])
        export.main([*run, "--format", "peft", "--output", str(tmp_path / "adapter")])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_file_of_prompts(folder, tmp_path, capsys):
    rows = [
        {"prompt": "hello", "topic": "greeting"},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "left out"}]},
        {"instruction": "hello", "output": "left out"},
        {"prompt": "another"},
    ]
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "replies.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--run", str(folder / "run"), "--prompts", str(prompts)]
    generate.main([*words, "--output", str(output), "--max_new_tokens", "8"])
    replies = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{name: reply[name] for name in row} for row, reply in zip(rows, replies, strict=True)] == rows
    assert [reply["reply"] for reply in replies] == [direct(folder, p, 7) for p in ["hello"] * 3 + ["another"]]
    assert {(reply["end"], reply["reply_tokens"]) for reply in replies} == {("length", 8)}
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.splitlines()[-1] == f"4 replies: {output}"


def test_each_line_is_a_prompt_and_raw_uses_no_template(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("hello\n\n  \nand 'this'\n")
    words = ["--model", str(folder / "model"), "--prompts", str(tmp_path / "prompts.txt"), "--max_new_tokens", "3"]
    generate.main(words)
    chat = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    generate.main([*words, "--raw"])
    raw = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [reply["prompt"] for reply in raw] == ["hello", "and 'this'"]
    assert [reply["reply"] for reply in raw] != [reply["reply"] for reply in chat]


def test_a_chat_remembers_earlier_turns(folder, capsys, monkeypatch):
    first = direct(folder, "hello", 7)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nhello\n/reset\nhello\n/quit\nnever read\n"))
    generate.main(["--run", str(folder / "run"), "--max_new_tokens", "8"])
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("/", "stopped"))]
    assert len(lines) == 4
    assert (lines[0], lines[2], lines[3]) == (first, "starting over", first)
    assert lines[1] != first


def test_another_base_is_refused(folder, tmp_path):
    write_run(tmp_path, seed=1)
    words = ["--run", str(folder / "run"), "--model", str(tmp_path / "model"), "--prompt", "hello"]
    with pytest.raises(
        ValueError, match=r"is not the base that .*run was trained on: its fingerprint .* an earlier version"
    ):
        generate.main(words)


def test_another_weight_format_prints_a_note(folder, capsys):
    generate.main(["--run", str(folder / "run"), "--prompt", "hello", "--quant_type", "none", "--max_new_tokens", "1"])
    assert "trained on a base in nf4, and runs on one in none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--prompt x", r"model, run: found neither"),
        ("--model m --step 3", r"step: requires run"),
        ("--model m --prompt x --prompts y", r"prompt, prompts: found both"),
        ("--model m --output o", r"output: requires prompts"),
        ("--model m --prompts p --output nowhere/o", r"output: folder 'nowhere' does not exist"),
        ("--model m --top_p 0", r"top_p: found 0, expected more than 0 and at most 1"),
        ("--model m --topk 3", r"topk: unknown setting; did you mean top_k"),
        ("--model nowhere", r"nowhere: no such file or folder"),
        ("--run nowhere", r"nowhere: not a run folder"),
        ("--run RUN --step 4", r"does not have a checkpoint of step 4 \(found steps: \[3, 7\]\)"),
        (
            f"--model MODEL --prompt {'x' * 300}",
            r"--prompt:1: too long .found 3\d\d tokens; the model has 256 positions",
        ),
        ("--model MODEL --raw --system x", r"--system: requires a chat template. Remove --raw"),
    ],
)
def test_bad_settings(folder, words, message):
    places = {"RUN": folder / "run", "MODEL": folder / "model"}
    with pytest.raises(ValueError, match=message):
        generate.main([str(places.get(word, word)) for word in words.split()])


def test_malformed_prompts_are_reported_by_line_before_loading(folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"question": "x"}, {"prompt": 3}, {"messages": []}, {"prompt": "x" * 300}, {"prompt": "fine"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError) as error:
        generate.main(["--model", str(folder / "model"), "--prompts", str(path)])
    lines = str(error.value).splitlines()
    assert "4 of 5 rows can't be used" in lines[0]
    for line, (number, words) in zip(
        lines[1:],
        [(1, r"found columns 'question', expected one of 'messages', 'prompt', 'instruction'"), (2, "prompt is int"),
         (3, "assistant"), (4, "tokens; the model has 256 positions")],
        strict=True,
    ):  # fmt: skip
        assert f"{path}:{number}: " in line and words in line


def test_help_lists_every_setting_and_its_default(capsys):
    with pytest.raises(SystemExit) as left:
        generate.main(["--help", "all"])
    printed = capsys.readouterr().out
    assert left.value.code == 0
    assert printed.startswith("usage: qlora-jax generate [--config FILE] [--key value ...]")
    for name in ("--raw", "--prompts TEXT|null", "--max_new_tokens INT", "[256]", "{auto,nf4,"):
        assert name in printed


def test_the_command_shows_no_traceback():
    words = ["-m", "qlora_jax.generate", "--model", "nowhere", "--prompt", "x"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere: no such file or folder") and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--head_bits", "8"], ["--head_bits", "4"], ["--fast", "true"]])
def test_faster_decoding_answers(folder, capsys, words):
    if problem() is not None:
        pytest.skip(f"the C++ loops: {problem()}")
    generate.main(["--run", str(folder / "run"), "--prompt", "hello", *DRAWN, *words])
    assert capsys.readouterr().out.strip()


def test_bits_of_the_head_are_a_few_numbers(folder):
    with pytest.raises(ConfigError, match="head_bits: found 5, expected one of auto, 16, 8, 4"):
        generate.main(["--run", str(folder / "run"), "--prompt", "hello", "--head_bits", "5"])
